"""Process 0: it leads the run, has the others work, and ends all of them when one is lost."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from fedspan.distributed.channel import RankChannel, join, open_store
from fedspan.distributed.dealer import Dealer
from fedspan.distributed.environment import Place
from fedspan.distributed.pulse import BEAT, HINT, PATIENCE, Pulse, Store

BEGIN, ENDED, BYE = "begin", "ended", "bye"
"""Keys of the store: process 0 wants the others; the run is over; the number of processes that know."""
_FAREWELL = 5.0
"""Seconds that the others have to notice the end."""
_ARRIVAL = 60.0
"""Seconds that the others have to come and notice that they are not wanted, where the store is in this process."""


class Ended(BaseException):
    """A process was lost, or the run was told to end (SIGTERM); the message is one line for the user.

    No Exception: it may be raised anywhere in the main thread, and nothing in between must take it for its own.
    """


class Leader:
    """The other processes as process 0 sees them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.dealer: Dealer | None = None
        self.hosts: dict[int, str] = {}
        """Process -> the machine and process id that it has named."""
        self._store: Store | None = None
        self._pulse: Pulse | None = None
        self._watching, self._ending = False, False
        self._lost: str | None = None
        self._lock = threading.Lock()

    def open(self) -> Dealer:
        """Call the others, connect with them, and return what deals tasks to them."""
        place = self.place
        others = range(1, place.size)
        self._store = open_store(place)
        self._pulse = Pulse(self._store, place.rank, others)
        self._pulse.beat()
        self._store.set(BEGIN, "")
        join(self._store, place)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._keep_alive, args=(self._pulse,), daemon=True).start()
        self.dealer = Dealer({rank: RankChannel(rank) for rank in others}, self.lose)
        return self.dealer

    def watch(self, hosts: Mapping[int, str]) -> None:
        """Begin to take a silent process for lost: all are ready, and none has a base to load any more."""
        self.hosts, self._watching = dict(hosts), True

    def lose(self, rank: int, how: str) -> Ended:
        """Return the error of a lost process, which is also raised in the main thread, wherever that is."""
        with self._lock:
            if self._lost is None:
                self._lost = (
                    f"{self._name(rank)} was lost at {datetime.now(UTC):%H:%M:%S} UTC{self._task(rank)} ({how})"
                )
                if not self._ending:
                    # To the main thread by name: only there can a handler interrupt what is waited for.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            return Ended(self._lost)

    def leave(self) -> None:
        """Let the others end, and return when they know, or are not to be waited for any longer."""
        self._ending = True
        store = self._store
        if store is None:
            store = self._store = open_store(self.place)
        wait = _FAREWELL if self._pulse is not None else 0.0 if self.place.agent_store else _ARRIVAL
        try:
            store.set(ENDED, "")
            until = time.monotonic() + wait
            others = self.place.size - 1 - (self._lost is not None)
            while store.add(BYE, 0) < others and time.monotonic() < until:
                time.sleep(0.05)
        except RuntimeError:
            return  # torchrun is gone, and its store with it: the others see that too

    def _keep_alive(self, pulse: Pulse) -> None:
        """Give signs of life, and look for those of the others, until the process ends."""
        try:
            while not self._ending:
                pulse.beat()
                pulse.look()
                silent = pulse.silent(PATIENCE) if self._watching else []
                if silent:
                    self.lose(silent[0], f"no sign of life for {pulse.silence(silent[0]):.0f} s")
                time.sleep(BEAT)
        except RuntimeError as error:
            if not self._ending:
                self._fail(f"torchrun's store is gone ({type(error).__name__}), and with it the other processes")

    def _fail(self, line: str) -> None:
        with self._lock:
            self._lost = self._lost or line
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """End the run: by `lose`, or by torchrun, which ends all processes when one of them has died."""
        if self._ending:
            return
        until = time.monotonic() + HINT + 4 * BEAT
        while self._lost is None and time.monotonic() < until:
            # A process in the middle of its work is noticed by its connection, an idle one by its silence.
            silent = self._pulse.silent(HINT) if self._pulse is not None and self._watching else []
            if silent:
                self._lost = (
                    f"{self._name(silent[0])} was lost at about {datetime.now(UTC):%H:%M:%S} UTC (it is silent)"
                )
            time.sleep(BEAT / 2)
        self._ending = True
        raise Ended(self._lost or "the run was told to end (SIGTERM)")

    def _name(self, rank: int) -> str:
        where = f" ({self.hosts[rank]})" if rank in self.hosts else ""
        return f"process {rank} of {self.place.size}{where}"

    def _task(self, rank: int) -> str:
        """Return what a process was busy with, to be read after the time."""
        message: Any = self.dealer.doing.get(rank) if self.dealer is not None else None
        if message is None:
            return ""
        work = message["work"]
        if work == "train":
            return f", while it trained clients of round {message['round_num'] + 1}"
        return ", during an evaluation" if work == "evaluate" else ", before the first round"


def _now() -> str:
    return f"{datetime.now(UTC):%H:%M:%S} UTC"


@functools.cache
def leader_of(place: Place) -> Leader:
    """Return this process's view of the others: there is one."""
    return Leader(place)


def exit_now(code: int) -> None:
    """End this process without Python's farewell, which threads that wait for messages would hold up."""
    os._exit(code)
