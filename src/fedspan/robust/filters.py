"""The filters: each returns the updates that are folded, their weights, or other contents in their place.

Those that choose clients decide from the distances of `fedspan.robust.distances` alone. f is the number of clients that
may be bad, n that of the updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.methods.messages import Payload, Tensors, Update, Vector
from fedspan.robust.distances import Cohort, padded
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class FilterResult:
    """The updates to fold in place of those that a filter was given."""

    updates: Sequence[Update]
    rejected: Mapping[str, str] = field(default_factory=dict)
    """Client -> what was wrong with its update."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


def least(name: str, attackers: int, averages_factors: bool) -> int:
    """Return the smallest number of updates with which the filter withstands that many attackers."""
    if name in ("krum", "multi_krum"):
        return 2 * attackers + 3
    if name == "geometric_median" and averages_factors:
        return 3 * attackers + 1
    return 2 * attackers + 1


def check_size(name: str, num_updates: int, attackers: int, averages_factors: bool) -> None:
    """Raise a FedspanError where there are fewer updates than the filter needs."""
    needed = least(name, attackers, averages_factors)
    if num_updates < needed:
        raise FedspanError(
            f"robust.filter = '{name}': {num_updates} valid updates, expected at least {needed} "
            f"with {attackers} bad clients among them"
        )


def krum(cohort: Cohort, attackers: int) -> FilterResult:
    """Choose by Krum the one update whose n − f − 2 nearest others are nearest: Σ ‖X_i − X_j‖² over them is its score.

    For n > 2f + 2 it is an update near the honest ones' mean, whatever f others send. Numbers of examples, which
    clients claim, play no part.

    Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"
    (1703.02757).
    Differences: the distances (`Cohort`); of equal scores the first client's id wins.
    """
    return _chosen(cohort, attackers, 1)


def multi_krum(cohort: Cohort, attackers: int) -> FilterResult:
    """Choose by Multi-Krum the n − f updates of the smallest scores, each with the same weight.

    Source: Blanchard et al. 2017 (1703.02757), as `krum`.
    Differences: m = n − f always, the most that leaves out f; the paper proves m = 1. The method's own rule takes the
    place of the mean.
    """
    return _chosen(cohort, attackers, len(cohort.updates) - attackers)


def _chosen(cohort: Cohort, attackers: int, number: int) -> FilterResult:
    distances = cohort.distances()
    if cohort.averages_factors:
        distances = torch.hypot(distances, cohort.crossings())
    scores = krum_scores(distances, attackers)
    # Ties go to the first client by id, so that the choice is the same wherever and however often it is computed.
    order = sorted(range(len(scores)), key=lambda k: (scores[k], k))
    keep = sorted(order[:number])
    if not scores[order[0]] < float("inf"):
        raise FedspanError("robust.filter: every update is infinitely far from the others; expected most of them near")
    ids = [update.client_id for update in cohort.updates]
    aside = [client for k, client in enumerate(ids) if k not in keep]
    # Equal weights: numbers of examples are claims, with which a chosen attacker could outweigh all the others.
    updates = [replace(cohort.updates[k], num_examples=1.0) for k in keep]
    return FilterResult(updates, {}, {"chosen": [ids[k] for k in keep], "set_aside": aside})


def krum_scores(distances: Tensor, attackers: int) -> list[float]:
    """Return Σ d_ij² over the n − f − 2 nearest j of every i (at least one); (K, K) -> K numbers."""
    num_near = max(1, len(distances) - attackers - 2)
    # The smallest of a row is the update's own zero; another that is as near stands for it just as well.
    near = distances.square().sort(dim=1).values[:, 1 : 1 + num_near]
    return [float(x) for x in near.sum(dim=1)]


FAR = 1e6
"""In units of the typical distance: an update farther away has no weight in the geometric median."""
_SMOOTH = 1e-6
_STEPS = 1000


def geometric_median(cohort: Cohort, attackers: int) -> FilterResult:
    """Take the geometric median, argmin_z Σ α_k ‖z − X_k‖, through the weights w_k of z = Σ w_k X_k, which replace α_k.

    Weiszfeld's iteration, smoothed: w_k ∝ α_k / max(ν, ‖z − X_k‖). While the bad clients hold less than half of the
    weight, z stays within a multiple of the honest ones' spread of their median.

    α_k are the clients' numbers of examples. They are claims, so none counts for more than the (f+1)-th largest, which
    at least one honest client equals or exceeds.

    Where the method averages factors, the weighted mean of the factors is the weighted mean of the products only for
    clients in nearly one gauge: the f whose `crossings` are farthest from the others' are set aside first.

    Source: Pillutla et al. 2019, "Robust Aggregation for Federated Learning" (1912.13445, RFA).
    Differences: the distances (`Cohort`); claims are bounded; ν is 1e-6 of the typical distance, not 1e-6 itself; the
    iteration runs to convergence, since it costs no client anything; an update farther than `FAR` times the typical
    distance is rejected: its pull would be bounded, but a huge tensor times a tiny weight is not exact.

    Raises
    ------
    FedspanError
        When f clients could hold half of the weight.
    """
    aside: list[str] = []
    if cohort.averages_factors and attackers:
        cohort, aside = _without_far_gauges(cohort, attackers)
    distances = cohort.distances()
    centre, reach = _middle(distances)
    near = (distances[centre] <= FAR * reach) if reach > 0 else distances[centre].isfinite()
    keep = near.nonzero()[:, 0].tolist()
    rejected = {
        update.client_id: f"more than {FAR:g} times as far from the others as they are from each other"
        for k, update in enumerate(cohort.updates)
        if k not in keep
    }
    cohort, distances = cohort.only(keep), distances[keep][:, keep]
    # The rejected were attackers, so fewer claims need bounding.
    left = max(0, attackers - len(rejected))
    claims = bounded_claims([update.num_examples for update in cohort.updates], left)
    weights, steps = weiszfeld(distances, claims, keep.index(centre), reach)
    updates = [replace(u, num_examples=w) for u, w in zip(cohort.updates, weights, strict=True) if w > 0]
    by_id = {u.client_id: w for u, w in zip(cohort.updates, weights, strict=True)}
    return FilterResult(updates, rejected, {"weights": by_id, "set_aside": aside, "iterations": steps})


def _without_far_gauges(cohort: Cohort, attackers: int) -> tuple[Cohort, list[str]]:
    """Return the cohort without the f updates whose `crossings` are farthest from the others', and their clients."""
    scores = krum_scores(cohort.crossings(), attackers)
    order = sorted(range(len(scores)), key=lambda k: (scores[k], k))
    keep, aside = order[: len(order) - attackers], order[len(order) - attackers :]
    return cohort.only(sorted(keep)), [cohort.updates[k].client_id for k in sorted(aside)]


def bounded_claims(claims: Sequence[float], attackers: int) -> list[float]:
    """Return the clients' shares of the weight, where no claim counts for more than the (f+1)-th largest.

    Raises
    ------
    FedspanError
        When the f largest of these would be half of all or more.
    """
    most = sorted(claims, reverse=True)[min(attackers, len(claims) - 1)]
    capped = [min(claim, most) for claim in claims]
    total = sum(capped)
    if attackers * most >= total / 2:
        raise FedspanError(
            f"robust.filter = 'geometric_median': {attackers} bad clients could hold {attackers * most / total:.0%} of "
            f"the weight; expected less than half; federation.weighting = 'equal' gives every client the same"
        )
    return [claim / total for claim in capped]


def _middle(distances: Tensor) -> tuple[int, float]:
    """Return the update nearest to half of the others, and its distance from the farthest of these."""
    if len(distances) == 1:
        return 0, 0.0
    half = distances.sort(dim=1).values[:, len(distances) // 2]
    centre = int(half.argmin())
    return centre, float(half[centre])


def weiszfeld(distances: Tensor, shares: Sequence[float], centre: int, reach: float) -> tuple[list[float], int]:
    """Return the weights (K) of the geometric median, from the distances (K, K) alone, and the number of steps.

    With u_k = X_k − X_c, ‖X_k − Σ w_j X_j‖² is that of Σ_j a_j u_j for a = e_k − w, and the inner products of the u are
    (d_jc² + d_kc² − d_jk²)/2. Because c is in the middle of the honest updates, what is subtracted there is of their
    own size, and an outlier's weight falls as its distance grows: in float64 nothing of note cancels.

    Parameters
    ----------
    shares
        α, of sum 1.
    centre, reach
        c, and the typical distance.
    """
    alpha = torch.tensor(shares, dtype=torch.float64)
    squares = distances.square()
    gram = (squares[centre][:, None] + squares[centre] - squares) / 2
    positive = distances[distances > 0]
    unit = reach or (float(positive.median()) if len(positive) else 1.0)
    weights, eye, steps = alpha, torch.eye(len(alpha), dtype=torch.float64), 0
    while steps < _STEPS:
        apart = eye - weights
        sizes = ((apart @ gram) * apart).sum(dim=1).clamp(min=0).sqrt()
        updated = alpha / sizes.clamp(min=_SMOOTH * unit)
        updated = updated / updated.sum()
        change = float((updated - weights).abs().sum())
        weights, steps = updated, steps + 1
        if change <= 1e-9:
            break
    # Where the median is one of the updates the steps may come to it slowly: it is tried by itself.
    apart = eye - weights
    reached = float(((apart @ gram) * apart).sum(dim=1).clamp(min=0).sqrt() @ alpha)
    costs = distances @ alpha
    if float(costs.min()) < reached:
        weights = eye[int(costs.argmin())]
    return [float(w) for w in weights], steps


def median(cohort: Cohort, attackers: int) -> FilterResult:
    """Take the median of every coordinate, for n > 2f; the mean of the middle two where n is even.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates" (1803.01498).
    Differences: none in the rule; numbers of examples play no part, as there. Every client's update is replaced by the
    result, with equal weights, so that whatever the method counts is as it was.
    """

    def middle(x: Tensor) -> Tensor:
        low, high = (len(x) - 1) // 2, len(x) // 2
        return x[low] if low == high else x[low] / 2 + x[high] / 2

    return _by_coordinate(cohort, middle)


def trimmed_mean(cohort: Cohort, attackers: int) -> FilterResult:
    """Take the mean of every coordinate without its f largest and its f smallest values, for n > 2f.

    Source: Yin et al. 2018 (1803.01498), with β = f/n.
    Differences: as for `median`.
    """

    def middle(x: Tensor) -> Tensor:
        return x[attackers : len(x) - attackers].mean(dim=0)

    return _by_coordinate(cohort, middle)


def _by_coordinate(cohort: Cohort, middle: Callable[[Tensor], Tensor]) -> FilterResult:
    """Replace each tensor of every update by `middle` of the clients' values in increasing order (n, …)."""
    updates = cohort.updates

    def joined(held: Sequence[Tensors]) -> Tensors:
        for other in held:
            if other.keys() != held[0].keys():
                raise FedspanError(f"updates name different tensors: {sorted(other.keys() ^ held[0].keys())[:3]}")
        # One tensor at a time: n copies of a whole model would not fit in memory.
        columns = ((name, padded([lowrank.promote(x[name]) for x in held])) for name in held[0])
        return {name: middle(torch.stack(column).sort(dim=0).values) for name, column in columns}

    modules: dict[str, Payload] = {}
    for name in updates[0].modules:
        payloads = [update.modules[name] for update in updates]
        vectors = [payload.values for payload in payloads if isinstance(payload, Vector)]
        if len(vectors) < len(payloads):
            raise ValueError(f"{name} holds factor pairs, whose coordinates cannot be compared: expected vectors")
        modules[name] = Vector(joined(vectors))
    dense, moments = joined([u.dense for u in updates]), joined([u.moments for u in updates])
    return FilterResult([replace(u, num_examples=1.0, modules=modules, dense=dense, moments=moments) for u in updates])


FILTERS: Mapping[str, Callable[[Cohort, int], FilterResult]] = {
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
    "median": median,
    "trimmed_mean": trimmed_mean,
}
"""Name in `robust.filter` -> the filter, from (the cohort, f)."""
