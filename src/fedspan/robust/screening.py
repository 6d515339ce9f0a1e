"""The step between the answers of an exchange and their fold: the norm bound and the filter that `[robust]` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

from fedspan.config import RobustConfig
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Update
from fedspan.robust import filters
from fedspan.robust.distances import Cohort
from fedspan.robust.dry_run import averages_factors, sends_pairs

Filter = Literal["krum", "multi_krum", "geometric_median", "median", "trimmed_mean"]
Ask = Literal["train", "gradient", "again"]


@dataclass(frozen=True, slots=True)
class Screened:
    """The answers of one exchange that are folded, and those that are not."""

    updates: Sequence[Update]
    """In the order of the clients' ids."""
    rejected: Mapping[str, str]
    """Client -> what was wrong with its update, which takes no further part in the round. Clients that a filter merely
    does not choose are not among them."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """One entry, ``robust``: what the filter did; JSON as it is."""


class Screen(Protocol):
    """The function that the round loop calls before it folds."""

    def __call__(
        self, updates: Sequence[Update], sent: Sequence[Broadcast], *, ask: Ask = "train", bad: int = 0
    ) -> Screened:
        """Filter the encoded updates of one exchange.

        Parameters
        ----------
        updates
            In sorted client order, weights in `num_examples`, their shapes and finiteness checked.
        sent
            The broadcast that each of them answers.
        ask
            Of the exchange: only for training is it known what a client that learnt nothing would have sent.
        bad
            How many of the round's clients were rejected before this. They count towards the `robust.attackers` that
            the filter expects: otherwise one client could fail every round for the others by sending a NaN.

        Raises
        ------
        FedspanError
            When the updates are too few for that many attackers, or their claimed weights too unequal.
        """


def screen(robust: RobustConfig, method: Method) -> Screen | None:
    """Return the filter that `[robust]` asks for; None where it asks for none, or where no client learns from another.

    The configuration has been through `fedspan.federation.requirements`, which refuses what a method cannot have.
    """
    if (robust.filter == "none" and robust.max_norm is None) or method.info.pooled or method.info.alone:
        return None
    gauge = averages_factors(method)

    def screened(updates: Sequence[Update], sent: Sequence[Broadcast], *, ask: Ask = "train", bad: int = 0) -> Screened:
        cohort = Cohort.of(method, updates, sent, ask, gauge)
        # Gradients and sketches are no change of the weights.
        cohort, rejected = _fitting(cohort, robust.max_norm if ask == "train" else None)
        if robust.filter == "none" or not cohort.updates:
            return Screened(cohort.updates, rejected)
        # Each client that has been rejected was one of the expected attackers: that many fewer are left.
        attackers = max(0, robust.attackers - bad - len(rejected))
        filters.check_size(robust.filter, len(cohort.updates), attackers, gauge)
        result = filters.FILTERS[robust.filter](cohort, attackers)
        about = {"filter": robust.filter, "attackers": attackers, **result.diagnostics}
        return Screened(result.updates, rejected | dict(result.rejected), {"robust": about})

    return screened


def refusal(method: Method, name: Filter | Literal["none"], max_norm: bool, mixed_ranks: bool) -> str | None:
    """Return the reason why the method cannot have the filter or the norm bound, as the end of a sentence, or None."""
    asks = [exchange.ask for exchange in method.exchanges]
    if method.info.pooled or method.info.alone:
        return "has no update of one client that another learns from"
    if max_norm and ("train", "again") in pairwise(asks):
        return "sends sketches of what was trained, which do not show how large it is"
    if name in ("krum", "multi_krum") and len(asks) > 1:
        return "asks its clients more than once a round, and who is chosen first would not be looked at again"
    return _coordinate_refusal(method, mixed_ranks) if name in ("median", "trimmed_mean") else None


def _coordinate_refusal(method: Method, mixed_ranks: bool) -> str | None:
    """Return the reason why the coordinates of the clients' answers cannot be compared one by one, or None."""
    if len(method.exchanges) > 1:
        return "asks its clients for sketches of matrices, whose medians are sketches of none"
    if sends_pairs(method) or not method.info.gauge_invariant:
        return "sends factors in a gauge of each client's own, whose coordinates cannot be compared"
    if mixed_ranks and method.info.trains == "adapter":
        return "has coordinates of its largest clients alone where federation.ranks differ"
    return None


def _fitting(cohort: Cohort, max_norm: float | None) -> tuple[Cohort, dict[str, str]]:
    """Return the updates with the server's scalings and norms within the bound, and what is wrong with the others."""
    rejected: dict[str, str] = {}
    for number, update in enumerate(cohort.updates):
        problem = cohort.scaling_problem(number)
        if problem is None and max_norm is not None:
            size = cohort.size(number)
            # Not >, or a size that is NaN would pass.
            if not size <= max_norm:
                problem = f"its change of the weights has norm {size:.4g}, robust.max_norm = {max_norm:g}"
        if problem is not None:
            rejected[update.client_id] = problem
    keep = [k for k, update in enumerate(cohort.updates) if update.client_id not in rejected]
    return cohort.only(keep), rejected
