"""Paired differences between arms: intervals, corrected tests, verdicts, and the seeds that a difference would need.

Every arm has the same seeds, and a seed fixes what chance decides for all arms alike (split, schedule, head), so that
differences are taken seed by seed. With d_1, …, d_n the differences of n seeds, their mean d and deviation s:

* the interval is d ± t(n−1, (1+c)/2) · s/√n at confidence c (Student's t, from SciPy);
* p is that of the paired t-test, and `p_adjusted` Holm's correction over all differences of the comparison (Holm 1979);
* *better* or *worse*: `p_adjusted` < 1 − c. The adjusted interval has the confidence 1 − (1−c)·p/p_adjusted at which
  Holm's procedure tests this difference, so it excludes 0 in exactly these cases;
* *equivalent*: two one-sided t-tests (Schuirmann 1987), each at level (1−c)/2 after Holm's correction over all
  differences, show that the mean lies within ± the margin; with one difference this says that the interval at
  confidence c lies within it;
* *open*: neither, or a run that diverged.

A deviation below 1/(rows·√6) is replaced by it: a figure counted on that many test rows is known to a step of 1/rows
only, which is an error of variance 1/(12 rows²) in each of the two figures. Without this, two seeds that happen to give
the same difference would seem to prove it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "equivalent", "open"]
POWER = 0.8
"""Probability of finding a difference that is there, in the number of seeds that it would need."""
_MOST_SEEDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Pairs:
    """The differences of an arm to the baseline under one condition, one for each seed that both have finished."""

    condition: str
    arm: str
    values: tuple[float, ...]
    """Arm minus baseline, in the unit of the metric."""
    rows: int
    """Test rows that the figures were counted on."""
    missing: int = 0
    """Seeds of which one of the two has no figure, since it diverged."""

    @property
    def mean(self) -> float | None:
        """The mean difference."""
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds (n − 1), and at least that of rounding to whole rows."""
        n, mean = len(self.values), self.mean
        if n < 2 or mean is None:
            return None
        return max(math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (n - 1)), _resolution(self.rows))


@dataclass(frozen=True, slots=True)
class Difference:
    """The judgement of one difference; None for what a single seed cannot tell."""

    pairs: Pairs
    interval: tuple[float, float] | None
    p: float | None
    p_adjusted: float | None
    adjusted_interval: tuple[float, float] | None
    verdict: Verdict
    size: Literal["beyond the margin", "within the margin", "about the margin"] | None
    """Of a difference that is better or worse: where the adjusted interval lies."""
    seeds_for_a_point: int | None


def _resolution(rows: int) -> float:
    return 1 / (rows * math.sqrt(6))


def judge(
    family: Sequence[Pairs], *, margin: float, confidence: float, higher_is_better: bool, point: float
) -> list[Difference]:
    """Return the judgement of every difference of a comparison, corrected for their number.

    Parameters
    ----------
    margin, point
        The largest difference that does not matter, and the one that `seeds_for_a_point` is for, both in the unit of
        the metric.
    """
    ps = [paired_p(pairs) for pairs in family]
    within = [equivalence_p(pairs, margin) for pairs in family]
    adjusted, within_adjusted = holm(ps), holm(within)
    found = []
    for i, pairs in enumerate(family):
        p, corrected = ps[i], adjusted[i]
        low_high = None if p is None or corrected is None else interval(pairs, _confidence(p, corrected, confidence))
        verdict = _verdict(pairs, corrected, within_adjusted[i], confidence, higher_is_better)
        size = _size(low_high, margin) if verdict in ("better", "worse") else None
        seeds = seeds_needed(pairs.deviation, point, confidence)
        found.append(Difference(pairs, interval(pairs, confidence), p, corrected, low_high, verdict, size, seeds))
    return found


def _confidence(p: float, adjusted: float, confidence: float) -> float:
    """Return the confidence whose interval excludes 0 in exactly the cases in which the adjusted p says so."""
    return 1 - (1 - confidence) * (p / adjusted if adjusted > 0 else 1.0)


def _verdict(
    pairs: Pairs, adjusted: float | None, within: float | None, confidence: float, higher_is_better: bool
) -> Verdict:
    if pairs.missing or pairs.mean is None or adjusted is None or within is None:
        return "open"
    if adjusted < 1 - confidence:
        return "better" if (pairs.mean > 0) == higher_is_better else "worse"
    return "equivalent" if within < (1 - confidence) / 2 else "open"


def _size(
    found: tuple[float, float] | None, margin: float
) -> Literal["beyond the margin", "within the margin", "about the margin"] | None:
    if found is None:
        return None
    low, high = found
    if low > margin or high < -margin:
        return "beyond the margin"
    return "within the margin" if -margin < low and high < margin else "about the margin"


def interval(pairs: Pairs, confidence: float) -> tuple[float, float] | None:
    """Return Student's interval of the mean difference; None for fewer than two seeds."""
    mean, deviation, n = pairs.mean, pairs.deviation, len(pairs.values)
    if mean is None or deviation is None:
        return None
    half = _quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return mean - half, mean + half


def paired_p(pairs: Pairs) -> float | None:
    """Return the two-sided p of the paired t-test; None for fewer than two seeds."""
    mean, deviation, n = pairs.mean, pairs.deviation, len(pairs.values)
    if mean is None or deviation is None:
        return None
    return 2 * _upper_tail(abs(mean) / (deviation / math.sqrt(n)), n - 1)


def equivalence_p(pairs: Pairs, margin: float) -> float | None:
    """Return the larger p of the two one-sided tests that the mean lies above −margin and below margin."""
    mean, deviation, n = pairs.mean, pairs.deviation, len(pairs.values)
    if mean is None or deviation is None:
        return None
    error = deviation / math.sqrt(n)
    return max(_upper_tail((mean + margin) / error, n - 1), _upper_tail((margin - mean) / error, n - 1))


def _upper_tail(t: float, freedom: int) -> float:
    """Return the probability that Student's t is larger."""
    from scipy.special import stdtr

    return float(stdtr(freedom, -t))


def _quantile(probability: float, freedom: int) -> float:
    """Return the value that Student's t exceeds with probability 1 − `probability`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Return the p-values adjusted by Holm's step-down procedure; None stays None and does not count."""
    order = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def seeds_needed(deviation: float | None, difference: float, confidence: float) -> int | None:
    """Return the seeds with which a paired t-test finds a difference of this size with probability 0.8.

    From the noncentral t distribution, without correction for other differences; None where the deviation is not
    known, or where it would take over a million.
    """
    if deviation is None:
        return None
    fewest, most = 2, 2
    while power(most, deviation, difference, confidence) < POWER:
        fewest, most = most + 1, most * 2
        if most > _MOST_SEEDS:
            return None
    while fewest < most:
        middle = (fewest + most) // 2
        if power(middle, deviation, difference, confidence) < POWER:
            fewest = middle + 1
        else:
            most = middle
    return most


def power(num_seeds: int, deviation: float, difference: float, confidence: float) -> float:
    """Return the probability that a paired t-test of this many seeds finds a true mean difference of this size."""
    from scipy.special import nctdtr

    critical = _quantile((1 + confidence) / 2, num_seeds - 1)
    shift = difference / deviation * math.sqrt(num_seeds)
    if shift > critical + 30:  # beyond what the noncentral t distribution is computed for, and certain
        return 1.0
    # SciPy's value is not a number for some larger shifts, where this tail is below 1e-9.
    other_side = nctdtr(num_seeds - 1, shift, -critical) if shift < 6 else 0.0
    return float(1 - nctdtr(num_seeds - 1, shift, critical) + other_side)


def pair(
    condition: str, arm: str, own: Mapping[int, float | None], baseline: Mapping[int, float | None], rows: int
) -> Pairs:
    """Return the differences of an arm to the baseline, by the seeds that both have finished."""
    both = [(own[seed], baseline[seed]) for seed in sorted(own.keys() & baseline.keys())]
    known = tuple(x - y for x, y in both if x is not None and y is not None)
    return Pairs(condition, arm, known, rows, len(both) - len(known))
