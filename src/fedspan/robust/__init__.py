"""Filters that keep a few bad clients from spoiling a round, composed before any method.

`screen` makes what the round loop calls between the answers of an exchange and their fold. What it returns is a list
of updates again, so that no method knows of it: some of them (a norm bound, Krum), the same ones with other weights
(the geometric median), or the same ones with other contents (the median of every coordinate).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

from fedspan.config import Config
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Update
from fedspan.robust import filters
from fedspan.robust.distances import Cohort
from fedspan.robust.filters import Result
from fedspan.robust.rehearsal import averages_factors, sends_pairs

Filter = Literal["krum", "multi_krum", "geometric_median", "median", "trimmed_mean"]
Ask = Literal["train", "gradient", "again"]


@dataclass(frozen=True, slots=True)
class Screened:
    """What is folded of one exchange's answers."""

    updates: Sequence[Update]
    """In the order of the clients' ids."""
    rejected: Mapping[str, str]
    """Client -> what was wrong with its update, which takes no further part in the round. Whom a filter merely does
    not choose is not among them."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """One entry, ``robust``: what the filter did; JSON as it is."""


class Screen(Protocol):
    """What the round loop calls before it folds."""

    def __call__(
        self, updates: Sequence[Update], sent: Sequence[Broadcast], *, ask: Ask = "train", bad: int = 0
    ) -> Screened:
        """Filter the encoded updates of one exchange.

        Parameters
        ----------
        updates
            In sorted client order, weights in `num_examples`, their shapes and finiteness checked.
        sent
            What the server sent to each of them.
        ask
            Of the exchange: only of training is it known what a client that learnt nothing would have said.
        bad
            How many of the round's clients were rejected before this. They were among the `robust.attackers` that the
            filter expects: else a client could fail every round for the others by sending a NaN.

        Raises
        ------
        ValueError
            When the updates are too few for so many attackers, or their claimed weights too unequal.
        """


def screen(config: Config, method: Method) -> Screen | None:
    """The filter that `[robust]` asks for; none where it asks for nothing, or where nobody learns from another.

    The configuration has been through `fedspan.federation.requirements`, which refuses what a method cannot have.
    """
    asked = config.robust
    if (asked.filter == "none" and asked.max_norm is None) or method.info.pooled or method.info.alone:
        return None
    gauge = averages_factors(method)

    def screened(updates: Sequence[Update], sent: Sequence[Broadcast], *, ask: Ask = "train", bad: int = 0) -> Screened:
        cohort = Cohort.of(method, updates, sent, ask, gauge)
        # Gradients and sketches are no change of the weights.
        cohort, rejected = _fitting(cohort, asked.max_norm if ask == "train" else None)
        if asked.filter == "none" or not cohort.updates:
            return Screened(cohort.updates, rejected)
        attackers = max(0, asked.attackers - bad - len(rejected))
        filters.check_size(asked.filter, len(cohort.updates), attackers, gauge)
        found: Result = filters.FILTERS[asked.filter](cohort, attackers)
        about = {"filter": asked.filter, "attackers": attackers, **found.diagnostics}
        return Screened(found.updates, rejected | dict(found.rejected), {"robust": about})

    return screened


def refusal(method: Method, name: Filter | Literal["none"], max_norm: bool, mixed_ranks: bool) -> str | None:
    """Why the method cannot have the filter, or the limit of norms, as the end of a sentence; none: it can."""
    asks = [exchange.ask for exchange in method.exchanges]
    if method.info.pooled or method.info.alone:
        return "has no update of one client that another learns from"
    if max_norm and ("train", "again") in pairwise(asks):
        return "sends sketches of what was trained, which do not tell how large it is"
    if name in ("krum", "multi_krum") and len(asks) > 1:
        return "asks its clients more than once a round, and who is chosen first would not be looked at again"
    if name in ("median", "trimmed_mean"):
        if len(asks) > 1:
            return "asks its clients for sketches of matrices, whose medians are sketches of none"
        if sends_pairs(method) or not method.info.gauge_invariant:
            return "sends factors in a gauge of each client's own, whose coordinates cannot be compared"
        if mixed_ranks and method.info.trains == "adapter":
            return "has coordinates of its largest clients alone where federation.ranks differ"
    return None


def _fitting(cohort: Cohort, max_norm: float | None) -> tuple[Cohort, dict[str, str]]:
    """The updates that are what they should be, and what is wrong with the others."""
    rejected: dict[str, str] = {}
    for number, update in enumerate(cohort.updates):
        problem = cohort.scaling_problem(number)
        if problem is None and max_norm is not None:
            size = cohort.size(number)
            # Not >, or a size that is no number would pass.
            if not size <= max_norm:
                problem = f"its change of the weights has norm {size:.4g}, robust.max_norm = {max_norm:g}"
        if problem is not None:
            rejected[update.client_id] = problem
    keep = [k for k, update in enumerate(cohort.updates) if update.client_id not in rejected]
    return cohort.only(keep), rejected


__all__ = ["Ask", "Filter", "Screen", "Screened", "refusal", "screen"]
