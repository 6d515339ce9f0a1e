"""Processes of which none outlives the one that started them, whatever ended it, kill -9 included.

Some of Flower's processes start others in sessions of their own, so a process group is not enough to find them all.
Every process is given a mark in its environment, which its own children inherit, and a watcher in a session of its own
waits for its pipe to close: then it ends whatever carries the mark.  Where there is no /proc, it ends the groups alone.
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

MARK = "FEDSPAN_HOUSEHOLD"
PATIENCE = 5.0
"""Seconds that a process has to end by itself."""
_LOOK = 0.05
_ORNAMENT = re.compile(r"\x1b\[[0-9;]*m|[\u2500-\u257f]")
"""Colours and frames."""
# What says most of a log: our own last line, an exception, then what calls itself an error, then anything.
_TELLING = (
    re.compile(r"^fedspan: "),
    re.compile(r"^\w*(Error|Exception|Lost|Refused)\b.*:"),
    re.compile(r"(?i)\berror\b|unable to"),
    re.compile(""),
)


class ProcessTree:
    """Starts processes, and ends them in reverse order when it is left.

    Parameters
    ----------
    logs
        A folder that gets one file for each process, with all that it prints.
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
        # What was started by one command, as the sites were, is ended together.
        for _, alike in itertools.groupby(reversed(self._processes.values()), lambda process: process.args):
            processes = list(alike)
            _end([process.pid for process in processes], functools.partial(_any_group_lives, processes))
        # What these have left behind in sessions of its own, the watcher ends.
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()

    def start(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Start one process in a group of its own.

        Parameters
        ----------
        environment
            Beside our own.
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
        # For what hides its environment, as nginx does.
        self._watcher.stdin.write(f"{process.pid} {_started(process.pid)}\n".encode())
        self._watcher.stdin.flush()

    def ended(self, name: str) -> int | None:
        """The exit status of a process that has ended."""
        return self._processes[name].poll()

    def wait(self, name: str, until: Callable[[], bool], seconds: float) -> None:
        """Wait until something is so that this process brings about.

        Raises
        ------
        ValueError
            When it ended first, or was too late; with the line of its log that says most.
        """
        end = time.monotonic() + seconds
        while not until():
            if self.ended(name) is not None:
                raise FedspanError(self.obituary(name))
            if time.monotonic() > end:
                raise FedspanError(f"{name} was not ready after {seconds:g} s{self._last(name)}")
            time.sleep(_LOOK)

    def finish(self, name: str, seconds: float) -> None:
        """Wait until a process has ended well.

        Raises
        ------
        ValueError
            When it did not.
        """
        try:
            status = self._processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise FedspanError(f"{name} was not done after {seconds:g} s{self._last(name)}") from None
        if status:
            raise FedspanError(self.obituary(name))

    def obituary(self, name: str) -> str:
        """How a process ended, in one line."""
        return f"{name} ended (exit status {self.ended(name)}){self._last(name)}"

    def _last(self, name: str) -> str:
        path = self._logs / f"{name}.log"
        text = _ORNAMENT.sub("", path.read_text(encoding="utf-8", errors="replace"))
        lines = [" ".join(line.split()) for line in text.splitlines() if any(map(str.isalnum, line))]
        if not lines:
            return f"; {path} is empty"
        said = next(found for telling in _TELLING if (found := [line for line in lines if telling.search(line)]))
        return f": {said[-1][:300]}; all of it is in {path}"


def marked(mark: str) -> list[int]:
    """The processes with this mark, but for the one that asks; none where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def _end(pids: Sequence[int], living: Callable[[], bool], groups: bool = True) -> None:
    """End groups or single processes: with SIGTERM, and with SIGKILL what then still lives."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
        for pid in pids:
            with suppress(ProcessLookupError, PermissionError):
                (os.killpg if groups else os.kill)(pid, number)
        end = time.monotonic() + patience
        while living():
            if time.monotonic() > end:
                break
            time.sleep(_LOOK)
        else:
            return


def _any_group_lives(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    for process in processes:
        process.poll()  # or a dead leader would count as one of its group
    return bool(_living({process.pid for process in processes}))


def _living(groups: set[int]) -> set[int]:
    """Those of these groups that have a member which is not dead; a zombie, for whom nobody has asked yet, is."""
    if not Path("/proc/self/stat").exists():
        return {group for group in groups if _answers(group)}
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        state, fields = _status(int(folder.name))
        if state not in ("Z", "") and int(fields[1]) in groups:
            found.add(int(fields[1]))
    return found


def _answers(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True


def _status(pid: int) -> tuple[str, list[str]]:
    """A process's state and what follows it in /proc (parent, group, …); empty when there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", []
    return state, fields


def _started(pid: int) -> str:
    """When a process started, by which it is told from a later one with the same number."""
    fields = _status(pid)[1]
    return fields[18] if fields else "unknown"


def _watch(mark: str, lines: Iterable[str]) -> None:
    """A watcher's whole life: wait until the pipe closes, then end whatever is left."""
    started: dict[int, str] = {}
    for line in lines:
        pid, _, when = line.partition(" ")
        started[int(pid)] = when.strip()
    left = [pid for pid, when in started.items() if _started(pid) == when]
    _end(left, lambda: bool(_living(set(left))))
    _end(marked(mark), lambda: bool(marked(mark)), groups=False)


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number, signal.SIG_IGN)
    _watch(sys.argv[1], sys.stdin)
