"""Estimates of how well scores tell members from non-members, each with the interval that its sample size allows.

Shapes: m members and n non-members; a higher score says "member".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The attack's best threshold under a limit on false positives, with exact intervals of both rates."""

    limit: float
    """The largest share of non-members that may be taken for members."""
    tpr: Interval
    """Share of the members that are found."""
    fpr: Interval
    """Share of the non-members that are taken for members: at most the limit in this sample."""


def normal_quantile(confidence: float) -> float:
    """Return z with P(|N(0, 1)| ≤ z) = confidence."""
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2))


def auc(members: Scores, others: Scores, confidence: float = CONFIDENCE) -> Interval:
    """Return the probability that a member has a higher score than a non-member (ties count half), with an interval.

    The variance is DeLong's, by midranks, and the interval is symmetric in log(AUC/(1 − AUC)), so that it stays within
    0 and 1. Where the two do not overlap that variance is 0, which proves nothing; the interval is then Newcombe's.

    Sources: DeLong et al. 1988 (doi 10.2307/2531595); Sun and Xu 2014 (doi 10.1109/LSP.2014.2337313); Newcombe 2006,
    method 5 (doi 10.1002/sim.2324).

    Parameters
    ----------
    members, others
        (m,) and (n,), at least two each, finite.
    """
    m, n = len(members), len(others)
    if min(m, n) < 2:
        raise ValueError(f"{m} members and {n} non-members: expected at least two of each")
    value, variance = _delong(members, others)
    z = normal_quantile(confidence)
    if variance <= 0 or not 0 < value < 1:
        return Interval(value, *_newcombe(value, m, n, z))
    center, half = math.log(value / (1 - value)), z * math.sqrt(variance) / (value * (1 - value))
    return Interval(value, _logistic(center - half), _logistic(center + half))


def _delong(members: Scores, others: Scores) -> tuple[float, float]:
    """Return the AUC and the variance of it."""
    m, n = len(members), len(others)
    together = _midranks(np.concatenate([members, others]))
    above = (together[:m] - _midranks(members)) / n  # of each member, the share of non-members below it
    below = 1 - (together[m:] - _midranks(others)) / m  # of each non-member, the share of members above it
    return float(above.mean()), float(above.var(ddof=1) / m + below.var(ddof=1) / n)


def _midranks(values: Scores) -> Scores:
    """Return ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Scores = (last - (counts - 1) / 2)[place]
    return ranks


def _newcombe(value: float, m: int, n: int, z: float) -> tuple[float, float]:
    """Return the ends at which |θ − value| is z standard errors of an AUC θ."""
    star = (m + n) / 2 - 1

    def error(theta: float) -> float:
        spread = 1 + star * (1 - theta) / (2 - theta) + star * theta / (1 + theta)
        return math.sqrt(theta * (1 - theta) * spread / (m * n))

    def end(outside: float) -> float:
        inside = value
        for _ in range(80):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(middle - value) <= z * error(middle) else (inside, middle)
        return (inside + outside) / 2

    # At the very ends the error is 0 although the estimate says nothing of the kind: the search begins beside them.
    return (0.0 if value == 0 else end(0.0)), (1.0 if value == 1 else end(1.0))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def share(hits: int, count: int, confidence: float = CONFIDENCE) -> Interval:
    """Return hits/count with the exact interval of Clopper and Pearson 1934 (doi 10.1093/biomet/26.4.404)."""
    from scipy.special import betaincinv

    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} of {count}: expected 0 to count, of at least 1")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, count - hits + 1, tail))
    high = 1.0 if hits == count else float(betaincinv(hits + 1, count - hits, 1 - tail))
    return Interval(hits / count, low, high)


def at_false_positives(
    members: Scores, others: Scores, limit: float, confidence: float = CONFIDENCE
) -> OperatingPoint | None:
    """Return the operating point with at most that share of false positives; None where there are too few rows for it.

    The threshold is chosen on the non-members alone, so that the number of members beyond it is binomial. With fewer
    than 1/limit non-members not one of them may be beyond it, and no rate as small as the limit can be measured.
    """
    allowed = int(limit * len(others) + 1e-9)
    if allowed < 1 or not len(members):
        return None
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -np.inf
    hits, false = int((members > threshold).sum()), int((others > threshold).sum())
    return OperatingPoint(limit, share(hits, len(members), confidence), share(false, len(others), confidence))


def curve(members: Scores, others: Scores) -> list[tuple[float, float]]:
    """Return the ROC curve: (false positives, true positives) at every threshold that changes them, from 0 to 1."""
    scores = np.concatenate([members, others])
    order = np.argsort(-scores, kind="stable")
    is_member = order < len(members)
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    true = np.cumsum(is_member)[last] / len(members)
    false = np.cumsum(~is_member)[last] / len(others)
    return [(0.0, 0.0), *zip(false.tolist(), true.tolist(), strict=True)]
