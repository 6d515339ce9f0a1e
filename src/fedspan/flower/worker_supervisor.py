"""Keeps a site's worker alive: starts it, restarts it when it died or hung, and ends it with its keeper."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedspan.wire import unix_socket

_LOOK = 0.05
"""Seconds between two looks for the socket of a worker that starts."""
_STEADY = 60.0
"""A worker that lived so long was no bad start."""
_LONGEST_PAUSE = 30.0
_LOADING = 900.0
"""Seconds that a worker may take before its first answer: killed for a question that came meanwhile, it would begin
anew, and never end where the base takes longer to load than a question may wait."""


class WorkerSupervisor:
    """One worker process, and the calls to it.

    The worker holds the reading end of a pipe as its standard input and ends when that closes, so that it cannot
    outlive its keeper however the keeper dies.

    Parameters
    ----------
    folder
        The site's.
    command
        What to run instead of `python -m fedspan.site.worker FOLDER --lifeline`.
    """

    def __init__(self, folder: Path, command: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.command = command or [sys.executable, "-m", "fedspan.site.worker", str(folder), "--lifeline"]
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._pause, self._proven = float("-inf"), 0.0, False

    @property
    def pid(self) -> int | None:
        """Of the worker that runs now."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ensure(self) -> bool:
        """Start the worker if it does not run, but not again at once when it keeps dying; whether it runs."""
        if self.pid is not None:
            return True
        now = time.monotonic()
        if self._process is not None:
            if self._proven or now - self._started > _STEADY:
                self._pause = 0.0
            if now < self._started + self._pause:
                return False
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause + 1)
        self._started, self._proven = now, False
        unix_socket.socket_path(self.folder).unlink(missing_ok=True)  # of one that was killed: nobody listens there
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE)
        return True

    def call(self, folder: Path, content: bytes, timeout: float) -> bytes:
        """Ask the worker, once one that is still starting has come up; one that is too late is replaced.

        Raises
        ------
        CallFailed
            As there, and when the worker ended before it answered.
        """
        end = time.monotonic() + timeout
        self._await(end)
        try:
            answer = unix_socket.call(folder, content, max(_LOOK, end - time.monotonic()))
        except unix_socket.CallTimedOut:
            if self._proven or time.monotonic() - self._started > _LOADING:
                # Whatever it is still at is not wanted any more, and would keep the next question waiting.
                self.kill()
                self._pause = 0.0
                self.ensure()
            raise
        self._proven = True
        return answer

    def _await(self, end: float) -> None:
        """Until the worker listens."""
        path = unix_socket.socket_path(self.folder)
        while self.ensure() and not path.exists():
            if time.monotonic() >= end:
                raise unix_socket.CallTimedOut(f"the worker of {self.folder.name} was still starting")
            time.sleep(_LOOK)
        if self.pid is None and self._process is not None:
            raise unix_socket.CallFailed(
                f"the worker of {self.folder.name} ended with exit status {self._process.returncode}; its log says why"
            )

    def kill(self) -> None:
        """End the worker now, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._close()

    def stop(self, patience: float = 10.0) -> None:
        """End the worker, and wait until it has ended."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self.kill()

    def _close(self) -> None:
        assert self._process is not None
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
