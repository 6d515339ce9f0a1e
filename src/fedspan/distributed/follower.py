"""Every other process: it does the work that process 0 deals, and ends when that ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable

from fedspan.client.processes import Answer, answer_messages
from fedspan.distributed.channel import RankChannel, join, open_store
from fedspan.distributed.environment import Place
from fedspan.distributed.leader import BEGIN, BYE, ENDED, exit_now
from fedspan.distributed.pulse import BEAT, PATIENCE, Pulse, Store

LOST = 1
"""The exit code where process 0 is gone."""


def follow(place: Place, answer: Answer, say: Callable[[str], None]) -> int:
    """Work for process 0 until the run ends; return the exit code.

    Parameters
    ----------
    answer
        Answers the messages of process 0.
    say
        Shows the user a line.

    Raises
    ------
    FedspanError
        When the processes do not reach each other.
    """
    store = open_store(place)
    if not _is_wanted(store):
        return 0
    # Process 0 ends the others: it must find those alive that torchrun ends because one has died.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pulse = Pulse(store, place.rank, [0])
    pulse.beat()
    join(store, place)
    watch = _Watch(place, store, pulse, say)
    threading.Thread(target=watch.run, daemon=True).start()
    answer_messages(RankChannel(0), answer)
    # Process 0 has closed the channel. Whether the run is over stands in the store, which `watch` reads.
    time.sleep(4 * BEAT)
    return watch.lost("it has closed its connections")


def _is_wanted(store: Store) -> bool:
    """Return whether process 0 wants others, once it says."""
    while True:
        if store.check([ENDED]):
            store.add(BYE, 1)
            return False
        if store.check([BEGIN]):
            return True
        time.sleep(BEAT / 4)


class _Watch:
    """Gives signs of life and ends this process with process 0, in the middle of any work."""

    def __init__(self, place: Place, store: Store, pulse: Pulse, say: Callable[[str], None]) -> None:
        self._place, self._store, self._pulse, self._say = place, store, pulse, say

    def run(self) -> None:
        """Work until the end of the process."""
        try:
            while not self._store.check([ENDED]):
                self._pulse.beat()
                self._pulse.look()
                if self._pulse.silent(PATIENCE):
                    exit_now(self.lost(f"no sign of life for {self._pulse.silence(0):.0f} s"))
                time.sleep(BEAT)
            self._store.add(BYE, 1)
            exit_now(0)
        except RuntimeError:
            exit_now(self.lost("the store is gone"))

    def lost(self, how: str) -> int:
        """Say that process 0 is gone, and return the exit code."""
        if self._place.speaks:
            self._say(
                f"process 0 of {self._place.size}, which leads the run, was lost ({how}); "
                "continue with: fedspan resume, and the run's folder"
            )
            sys.stderr.flush()
        return LOST
