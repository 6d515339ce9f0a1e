"""Budgets of ε at a given δ: what was released so far, and whether one more release still fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedspan.privacy.accountant import AccountantFactory, DPEvent
from fedspan.privacy.accounting import merged, total_epsilon
from fedspan.privacy.pld import PLDAccountant
from fedspan.privacy.releases import joint_noise
from fedspan.support.errors import FedspanError

if TYPE_CHECKING:
    from fedspan.methods.folds import Exchange


class BudgetSpent(FedspanError):
    """A release would exceed the privacy budget; it was not made."""


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


@dataclass(frozen=True, slots=True)
class Account:
    """Spending of a run under client-level privacy that nothing interrupts: it depends on its rounds alone, and not on
    who took part. The ledger has the spending of a run as it was."""

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
        return DPEvent(joint_noise([self.noise_multiplier] * self.num_due(round_num)), self.sample_rate)

    def num_due(self, round_num: int) -> int:
        """Return the number of exchanges of a round, counted from 0."""
        return sum(exchange.due(round_num) for exchange in self.exchanges)

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
