"""Supervision of a site's worker process: start it, restart it when it has died or hangs, and end it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedspan.wire import unix_socket

_LOOK = 0.05
"""Seconds between two checks for the socket of a worker that is starting."""
_STEADY = 60.0
"""Seconds; a worker that ran longer than this had started properly."""
_LONGEST_PAUSE = 30.0
_LOADING = 900.0
"""Seconds that a worker may take before its first answer. If it were killed whenever a message timed out meanwhile, a
worker whose base takes longer to load than a message may wait would start over for ever."""


class WorkerSupervisor:
    """One worker process, and the calls to it.

    The worker's standard input is the reading end of a pipe, and the worker ends when the pipe closes, so it cannot
    outlive its supervisor, however that ends.

    Parameters
    ----------
    folder
        The site's folder.
    command
        Command to run instead of `python -m fedspan.site.worker FOLDER --lifeline`.
    """

    def __init__(self, folder: Path, command: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.command = command or [sys.executable, "-m", "fedspan.site.worker", str(folder), "--lifeline"]
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._pause, self._proven = float("-inf"), 0.0, False

    @property
    def pid(self) -> int | None:
        """The running worker's process id; none when no worker runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ensure(self) -> bool:
        """Start the worker unless it runs, with a growing pause when it keeps dying; return whether it runs."""
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
        unix_socket.socket_path(self.folder).unlink(missing_ok=True)  # left by a worker that was killed
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE)
        return True

    def call(self, folder: Path, content: bytes, timeout: float) -> bytes:
        """Return the worker's answer, after waiting for a worker that is still starting; replace one that hangs.

        Raises
        ------
        CallFailed
            As `unix_socket.call`, and when the worker ended before it answered.
        """
        end = time.monotonic() + timeout
        self._wait_until_listening(end)
        try:
            answer = unix_socket.call(folder, content, max(_LOOK, end - time.monotonic()))
        except unix_socket.CallTimedOut:
            if self._proven or time.monotonic() - self._started > _LOADING:
                # Its answer is not wanted any more, and the next message would have to wait for it.
                self.kill()
                self._pause = 0.0
                self.ensure()
            raise
        self._proven = True
        return answer

    def _wait_until_listening(self, end: float) -> None:
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
        """Kill the worker at once."""
        if self._process is not None:
            self._process.kill()
            self._close()

    def stop(self, patience: float = 10.0) -> None:
        """Ask the worker to end, wait up to `patience` seconds, then kill it."""
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
