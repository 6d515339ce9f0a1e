"""How soon to look again: what keeps polling prompt while much happens and cheap while nothing does."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedspan.support.errors import FedspanError

FIRST = 0.02
"""Seconds before the second look."""
SHARE = 0.25


class Backoff:
    """Waits for a fixed share of the time already waited, between `first` and `most` seconds.

    Whoever waits for something that comes after t seconds notices within a quarter of t, and never later than `most`;
    what comes at once is noticed at once.
    """

    def __init__(self, most: float, first: float = FIRST, clock: Callable[[], float] = time.monotonic) -> None:
        if not most >= FIRST:
            raise FedspanError(f"poll = {most}: expected at least {FIRST} seconds")
        self.first, self.most = first, most
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Something came: whatever follows it is waited for anew."""
        self._since = self._clock()

    def seconds(self) -> float:
        """How long to wait before the next look."""
        return min(self.most, max(self.first, SHARE * (self._clock() - self._since)))


def quicken() -> None:
    """Have Flower look again soon for the parts of a message that are still on their way.

    A message is announced before its parts are uploaded. Flower waits for a whole second when it finds one missing,
    which for messages of a few kilobytes is most of their way.

    Raises
    ------
    RuntimeError
        When Flower's functions are not what they were in the versions that this was written for.
    """
    from flwr.supercore.inflatable import inflatable_utils

    for name in ("pull_objects", "pull_and_inflate_object_from_tree"):
        defaults = getattr(getattr(inflatable_utils, name, None), "__kwdefaults__", None)
        if not defaults or "initial_backoff" not in defaults:
            raise RuntimeError(f"flwr's {name} takes no initial_backoff: expected flwr>=1.41,<1.43")
        defaults["initial_backoff"] = FIRST
