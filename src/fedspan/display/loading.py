"""A sign of life while a run is prepared: the file that is read, the rows that are encoded, the base that is loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from fedspan.support.activity import Activity, listening

AFTER = 1.0
"""Seconds that an activity takes before a line says so: a run that starts at once needs none."""
AGAIN = 15.0
"""Seconds between two lines about one activity."""
_TICK = 0.2
END = " …"
"""End of every line about an activity that goes on."""


class LoadingLines:
    """Plain lines on stderr about whatever takes time, for logs and pipes; results and errors are other lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._activity: Activity | None = None
        self._began = self._said = time.monotonic()
        # The main thread may be inside an import or a library's call for seconds.
        self._thread = threading.Thread(target=self._watch, name="fedspan-loading", daemon=True)
        self._thread.start()

    def __call__(self, activity: Activity) -> None:
        """Take note of what is being done."""
        with self._lock:
            if self._activity is None or self._activity.what != activity.what:
                self._began = time.monotonic()
                self._said = 0.0
            self._activity = activity

    def close(self) -> None:
        """Say nothing any more."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_TICK):
            with self._lock:
                line = self._due(time.monotonic())
            if line is not None and not self._written(line):
                return

    def _written(self, line: str) -> bool:
        """Write a line; return False where nobody reads on, which is no reason for a run to fail."""
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except (OSError, ValueError):
            return False
        return True

    def _due(self, now: float) -> str | None:
        """Return the line that is to be printed now, if any."""
        activity = self._activity
        if activity is None or now - self._began < AFTER or (self._said and now - self._said < AGAIN):
            return None
        again, self._said = bool(self._said), now
        so_far = activity.extent or (f"{now - self._began:.0f} s so far" if again else "")
        return f"{activity.what}{': ' if so_far else ''}{so_far}{END}"


@contextmanager
def loading_lines(file: TextIO | None) -> Iterator[LoadingLines | None]:
    """Print lines about what a run waits for, until the block ends or the lines are closed.

    Parameters
    ----------
    file
        Standard error; None where it is closed.
    """
    if file is None:
        yield None
        return
    lines = LoadingLines(file)
    try:
        with listening(lines):
            yield lines
    finally:
        lines.close()
