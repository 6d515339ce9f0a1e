"""Polling intervals that are short while messages arrive and long while nothing happens."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedspan.support.errors import FedspanError

FIRST = 0.02
"""Seconds before the second poll."""
SHARE = 0.25


class Backoff:
    """Intervals that are a fixed share of the time waited so far, between `first` and `longest` seconds.

    An event that arrives after t seconds is noticed within a quarter of t, or within `longest` seconds if that is
    sooner; one that arrives at once is noticed at once.
    """

    def __init__(self, longest: float, first: float = FIRST, clock: Callable[[], float] = time.monotonic) -> None:
        if not longest >= FIRST:
            raise FedspanError(f"poll = {longest}: expected at least {FIRST} seconds")
        self.first, self.longest = first, longest
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Start a new wait: call it when an event has arrived."""
        self._since = self._clock()

    def seconds(self) -> float:
        """Return the seconds to sleep before the next poll."""
        return min(self.longest, max(self.first, SHARE * (self._clock() - self._since)))


def shorten_pull_backoff() -> None:
    """Make Flower ask again soon for the parts of a message that have not arrived yet.

    A message is announced before its parts are uploaded. Flower waits for a whole second when it finds one missing,
    which for messages of a few kilobytes is most of the transfer time.

    Raises
    ------
    FedspanError
        When the installed Flower's functions differ from those of the versions that this was written for.
    """
    from flwr.supercore.inflatable import inflatable_utils

    for name in ("pull_objects", "pull_and_inflate_object_from_tree"):
        defaults = getattr(getattr(inflatable_utils, name, None), "__kwdefaults__", None)
        if not defaults or "initial_backoff" not in defaults:
            raise FedspanError(f"flwr's {name} takes no initial_backoff: expected flwr>=1.41,<1.43")
        defaults["initial_backoff"] = FIRST
