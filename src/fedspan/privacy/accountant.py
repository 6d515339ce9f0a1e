"""The contract of a privacy accountant: a release is composed with those before it, and ε read off at a given δ."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class DPEvent:
    """`count` releases of a sum that one client (or example) moves by at most C, each with noise N(0, (zC)²)."""

    noise_multiplier: float
    """z; 0: no noise, and no privacy."""
    sample_rate: float
    """q: every client (or example) is in the sum by an independent coin of this probability; 1: all of them are."""
    count: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise FedspanError(f"noise_multiplier = {self.noise_multiplier}: expected at least 0")
        if not 0 < self.sample_rate <= 1:
            raise FedspanError(f"sample_rate = {self.sample_rate}: expected above 0 and at most 1")
        if self.count < 0:
            raise FedspanError(f"{self.count} steps: expected at least 0")


class Accountant(Protocol):
    """Bounds the privacy loss of all the releases composed into it.

    A new accountant has seen no release. Neighbouring data sets differ by one client (or example) that is added or
    removed.
    """

    def compose(self, event: DPEvent) -> None:
        """Account for the event's releases too.

        Parameters
        ----------
        event
            With noise_multiplier > 0 and count > 0: the other cases need no accountant.
        """

    def epsilon(self, delta: float) -> float:
        """Return an upper bound of ε at that δ, 0 < δ < 1, of everything composed so far."""


AccountantFactory = Callable[[], Accountant]
"""Makes a new accountant. Called with nothing composed yet, it raises a FedspanError where a library is missing."""
