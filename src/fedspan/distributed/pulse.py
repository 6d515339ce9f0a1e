"""Signs of life: every process counts up in the store, and a process whose count stands still is taken for dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

BEAT = 0.5
"""Seconds between two signs of life."""
PATIENCE = 20.0
"""Seconds of silence after which a process counts as lost: its interpreter may be busy with one long call."""
HINT = 4.0
"""The same where something is known to have gone wrong, so that the process that is silent is to be named."""


class Store(Protocol):
    """The part of torch's store that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Store a value."""

    def get(self, key: str, /) -> bytes:
        """Return a value, once there is one."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a number, 0 at first, and return the sum."""

    def check(self, keys: list[str], /) -> bool:
        """Return whether there is a value of every key."""


class Pulse:
    """The signs of life of this process, and the last ones of others."""

    def __init__(
        self, store: Store, rank: int, watched: Sequence[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._rank, self._clock = store, rank, clock
        self._count = 0
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(watched, (b"", clock()))

    def beat(self) -> None:
        """Give a sign of life."""
        self._count += 1
        self._store.set(f"pulse/{self._rank}", str(self._count))

    def look(self) -> None:
        """Read the others' signs of life, each of which has given one by now."""
        for rank, (before, _) in self._seen.items():
            value = self._store.get(f"pulse/{rank}")
            if value != before:
                self._seen[rank] = (value, self._clock())

    def silence(self, rank: int) -> float:
        """Return the seconds since the last new sign of life of a watched process."""
        return self._clock() - self._seen[rank][1]

    def silent(self, seconds: float) -> list[int]:
        """Return the watched processes that have given no sign of life for that long."""
        return [rank for rank in self._seen if self.silence(rank) > seconds]
