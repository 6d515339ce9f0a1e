"""Sums in fixed point where all clients are in one process, with or without masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedspan.methods.folds import Partial
from fedspan.methods.messages import Update
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.sum_layout import SumLayout
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class SumSettings:
    """Settings of a run's sums: the arithmetic, and whether and with which threshold they are masked."""

    arithmetic: FixedPoint
    masked: bool
    threshold: float
    """Share of the clients that must stay until the end of a masked sum."""
    run: str = ""
    """Names the run in the sums' sessions."""
    least: int = 2
    """Fewest clients in a masked sum, however few take part."""

    def begin(self, layout: SumLayout, num_clients: int) -> RunningSum:
        """Begin a sum over at most `num_clients` clients."""
        return RunningSum(self, layout, num_clients)

    def needed(self, num_clients: int) -> int:
        """Return how many clients must stay until the end: at least two, as a sum of one hides nothing."""
        return max(2, self.least, math.ceil(self.threshold * num_clients))


@dataclass(slots=True)
class RunningSum:
    """One sum while clients are added to it."""

    settings: SumSettings
    layout: SumLayout
    num_clients: int
    vectors: dict[str, Words] = field(default_factory=dict)
    total: Words | None = None
    count: int = 0

    def add(self, update: Update, train_loss: float) -> str | None:
        """Add one client's answer; return what is wrong with it where it cannot be added, else None."""
        try:
            words = self.settings.arithmetic.encode(self.layout.flatten(update, train_loss), self.num_clients)
        except FedspanError as error:
            return str(error)
        self.count += 1
        if self.settings.masked:
            self.vectors[update.client_id] = words
        else:
            self.total = words if self.total is None else self.total + words
        return None

    def partial(self, round_num: int, exchange: int) -> tuple[Partial, float]:
        """Return the fold over all clients that were added, and their mean loss.

        Raises
        ------
        FedspanError
            When fewer clients stayed than a masked sum needs.
        """
        if self.settings.masked and self.vectors:
            from fedspan.privacy.secure_sum import sum_in_process  # which needs the extra `secure`

            session = f"{self.settings.run}/{round_num}/{exchange}".encode()
            self.total = sum_in_process(self.vectors, self.settings.needed(self.num_clients), session)
        if self.total is None:
            return Partial(), 0.0
        return self.layout.partial(self.settings.arithmetic.decode(self.total), self.count)
