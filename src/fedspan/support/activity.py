"""The work in hand (reading a file, encoding rows, loading a base), for a display to show while it lasts.

The listener belongs to the context of the caller, so that the readers of files and models far below a display need no
argument for it. It shows something and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activity:
    """One piece of work, and the part of it that is done."""

    what: str
    """Such as `reading charite.csv (103.4 MB)`."""
    done: int = 0
    """Rows or parts that are done; 0 at the beginning."""
    total: int | None = None
    """Their number, where it is known."""

    @property
    def extent(self) -> str:
        """The part that is done, such as `2,048 of 9,000`; empty at the beginning."""
        if not self.done:
            return ""
        return f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"


Listener = Callable[[Activity], None]
_listener: ContextVar[Listener | None] = ContextVar("fedspan_activity", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Hand every activity that begins or moves on inside the block to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(what: str, done: int = 0, total: int | None = None) -> None:
    """Hand what is being done now to the listener, if there is one."""
    listener = _listener.get()
    if listener is not None:
        listener(Activity(what, done, total))
