"""Budgets of ε at a given δ: what was released so far, and whether one more release still fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedspan.privacy.accountant import AccountantFactory, DPEvent
from fedspan.privacy.accounting import merged, total_epsilon
from fedspan.privacy.pld import PLDAccountant
from fedspan.support.errors import FedspanError

if TYPE_CHECKING:
    from fedspan.methods.folds import Exchange


@dataclass(frozen=True, slots=True)
class Budget:
    """The releases made of one client's (or example's) data, and the limit of what they may spend."""

    delta: float
    limit: float | None = None
    """The largest ε; none: no limit, spending is only counted."""
    events: tuple[DPEvent, ...] = ()
    accountant: AccountantFactory = PLDAccountant

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise FedspanError(f"delta = {self.delta}: expected above 0 and below 1")
        if self.limit is not None and not self.limit > 0:
            raise FedspanError(f"epsilon = {self.limit}: expected above 0")

    @property
    def spent(self) -> float:
        """ε at δ of everything that was released."""
        return total_epsilon(self.events, self.delta, self.accountant)

    def plus(self, event: DPEvent) -> Budget:
        """Return the budget after that release."""
        return replace(self, events=merged((*self.events, event)))

    def allows(self, event: DPEvent) -> bool:
        """Return whether the limit would still be kept after that release."""
        return self.limit is None or self.plus(event).spent <= self.limit

    def record(self) -> dict[str, Any]:
        """Return the budget as JSON. It names the releases, not their ε, so that any accountant can count them."""
        return {
            "delta": self.delta,
            "epsilon": self.limit,
            "events": [[e.noise_multiplier, e.sample_rate, e.count] for e in self.events],
        }

    @classmethod
    def restored(cls, record: Mapping[str, Any]) -> Budget:
        """Return the budget that `record` was made of.

        Raises
        ------
        FedspanError
            When the JSON is not that of a budget.
        """
        try:
            events = tuple(DPEvent(float(z), float(q), int(count)) for z, q, count in record["events"])
            limit = record["epsilon"]
            return cls(float(record["delta"]), None if limit is None else float(limit), events)
        except (KeyError, TypeError, ValueError) as error:
            raise FedspanError(f"a privacy budget that cannot be read ({error})") from None


@dataclass(frozen=True, slots=True)
class Account:
    """Spending of a run under client-level privacy, which depends on its rounds alone and not on who took part."""

    exchanges: Sequence[Exchange]
    """The method's."""
    noise_multiplier: float
    sample_rate: float
    """q: every client is in a round by an independent coin of this probability."""
    delta: float
    limit: float | None = None
    accountant: AccountantFactory = PLDAccountant

    def event(self, round_num: int) -> DPEvent:
        """Return one round's release.

        The exchanges of a round ask the same clients, so they are one release about one sample: k Gaussian mechanisms
        of noise z are one of noise z/√k, and that is what the sampling amplifies.
        """
        num_due = sum(exchange.due(round_num) for exchange in self.exchanges)
        return DPEvent(self.noise_multiplier / math.sqrt(num_due), self.sample_rate)

    def budget(self, rounds: int) -> Budget:
        """Return the budget after the first `rounds` rounds."""
        budget = Budget(self.delta, self.limit, accountant=self.accountant)
        for round_num in range(rounds):
            budget = budget.plus(self.event(round_num))
        return budget

    def spent(self, rounds: int) -> float:
        """Return ε after the first `rounds` rounds."""
        return self.budget(rounds).spent

    def allows(self, round_num: int) -> bool:
        """Return whether this round, counted from 0, still fits the limit after all rounds before it."""
        return self.budget(round_num).allows(self.event(round_num))
