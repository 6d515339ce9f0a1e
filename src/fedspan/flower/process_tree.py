"""Processes that never outlive the one that started them, however it ended, kill -9 included.

Some of Flower's processes start others in sessions of their own, so a process group is not enough to find them all.
Every process gets a mark in its environment, which its children inherit. A watcher in a session of its own waits for
its pipe to close and then ends every process with the mark; without /proc it ends the process groups only.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fedspan.support.errors import FedspanError

MARK = "FEDSPAN_PROCESS_TREE"
"""Environment variable that holds the mark."""
PATIENCE = 5.0
"""Seconds that a process has to end after SIGTERM, and again after SIGKILL."""
_POLL = 0.05
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|[\u2500-\u257f]")
"""Colours and frames."""
# The most informative line of a log: our own last line, else an exception, else an "error", else the last line.
_INFORMATIVE = (
    re.compile(r"^fedspan: "),
    re.compile(r"^\w*(Error|Exception|Lost|Refused)\b.*:"),
    re.compile(r"(?i)\berror\b|unable to"),
    re.compile(""),
)


class ProcessTree:
    """Context manager that starts processes, and ends them in reverse order on exit.

    Parameters
    ----------
    logs
        Folder for one log file per process, with everything that it prints.
    """

    def __init__(self, logs: Path) -> None:
        self._logs, self._mark = logs, secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> ProcessTree:
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "fedspan.flower.process_tree", self._mark],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C, or a signal to our group, must not reach it
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Processes of one command, such as the sites, end together: one after the other, each could take PATIENCE.
        for _, group in itertools.groupby(reversed(self._processes.values()), lambda process: process.args):
            processes = list(group)
            _end([process.pid for process in processes], functools.partial(_any_group_lives, processes))
        # The watcher ends what these left behind in sessions of their own.
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()

    def start(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Start one process in a group of its own.

        Parameters
        ----------
        environment
            Variables to add to those of this process.
        """
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        assert self._watcher.stdin is not None
        # By its number too, because some programs, such as nginx, overwrite their environment.
        self._watcher.stdin.write(f"{process.pid} {_start_time(process.pid)}\n".encode())
        self._watcher.stdin.flush()

    @property
    def names(self) -> list[str]:
        """Return the processes that were started, in this order."""
        return list(self._processes)

    def ended(self, name: str) -> int | None:
        """Return a process's exit status; none while it runs."""
        return self._processes[name].poll()

    def wait(self, name: str, until: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition that this process brings about is true.

        Raises
        ------
        FedspanError
            When it ended first, or took too long; with the most informative line of its log.
        """
        end = time.monotonic() + seconds
        while not until():
            if self.ended(name) is not None:
                raise FedspanError(self.exit_report(name))
            if time.monotonic() > end:
                raise FedspanError(f"{name} was not ready after {seconds:g} s{self._last_line(name)}")
            time.sleep(_POLL)

    def finish(self, name: str, seconds: float) -> None:
        """Wait until a process has ended with exit status 0.

        Raises
        ------
        FedspanError
            When it took too long, or ended with another status.
        """
        try:
            status = self._processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise FedspanError(f"{name} was not done after {seconds:g} s{self._last_line(name)}") from None
        if status:
            raise FedspanError(self.exit_report(name))

    def exit_report(self, name: str) -> str:
        """Return a process's exit status and the most informative line of its log, in one line."""
        return f"{name} ended (exit status {self.ended(name)}){self._last_line(name)}"

    def _last_line(self, name: str) -> str:
        path = self._logs / f"{name}.log"
        text = _DECORATION.sub("", path.read_text(encoding="utf-8", errors="replace"))
        lines = [" ".join(line.split()) for line in text.splitlines() if any(map(str.isalnum, line))]
        if not lines:
            return f"; {path} is empty"
        matches = ([line for line in lines if pattern.search(line)] for pattern in _INFORMATIVE)
        best = next(filter(None, matches))
        return f": {best[-1][:300]}; all of it is in {path}"


def marked(mark: str) -> list[int]:
    """Return the ids of the processes with this mark, except this one; none without /proc."""
    wanted = f"{MARK}={mark}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                pids.append(int(folder.name))
    return pids


def _end(pids: Sequence[int], alive: Callable[[], bool], groups: bool = True) -> None:
    """End groups or single processes, with SIGTERM and then, if any is still alive, with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                (os.killpg if groups else os.kill)(pid, number)
        end = time.monotonic() + PATIENCE
        while alive():
            if time.monotonic() > end:
                break
            time.sleep(_POLL)
        else:
            return


def _any_group_lives(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    for process in processes:
        process.poll()  # otherwise a leader that is a zombie would count as a member of its group
    return bool(_living_groups({process.pid for process in processes}))


def _living_groups(groups: set[int]) -> set[int]:
    """Return those of these process groups that have a living member; zombies are dead."""
    if not Path("/proc/self/stat").exists():
        return {group for group in groups if _exists(group)}
    living = set()
    for folder in Path("/proc").glob("[0-9]*"):
        state, fields = _status(int(folder.name))
        if state not in ("Z", "") and int(fields[1]) in groups:
            living.add(int(fields[1]))
    return living


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True


def _status(pid: int) -> tuple[str, list[str]]:
    """Return a process's state and the fields after it in /proc (parent, group, …); empty without such a process."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", []
    return state, fields


def _start_time(pid: int) -> str:
    """Return a process's start time, which distinguishes it from a later process with the same number."""
    fields = _status(pid)[1]
    return fields[18] if fields else "unknown"


def _watch(mark: str, lines: Iterable[str]) -> None:
    """Wait until the pipe closes, then end the processes that are left: the watcher's whole work."""
    start_times: dict[int, str] = {}
    for line in lines:
        pid, _, start_time = line.partition(" ")
        start_times[int(pid)] = start_time.strip()
    left = [pid for pid, start_time in start_times.items() if _start_time(pid) == start_time]
    _end(left, lambda: bool(_living_groups(set(left))))
    _end(marked(mark), lambda: bool(marked(mark)), groups=False)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number, signal.SIG_IGN)
    _watch(sys.argv[1], sys.stdin)
