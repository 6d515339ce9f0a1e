"""Estimates with intervals, and the limits that (ε, δ) puts on an attack."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fedspan.auditing.bounds import Guarantee, empirical_epsilon
from fedspan.auditing.statistics import Interval, OperatingPoint, at_false_positives, auc, curve, share


def test_the_auc_is_scikit_learns_with_ties_too() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, 30).astype(float), rng.integers(0, 5, 41).astype(float)
        expected = roc_auc_score([1] * 30 + [0] * 41, [*x, *y])
        assert auc(x, y).value == pytest.approx(expected, abs=1e-12)
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(curve(x, y), curve(x, y)[1:], strict=False))
        assert area == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("shift", "m", "n"), [(0.0, 40, 60), (0.5, 200, 80), (1.2, 30, 100), (2.2, 60, 60)])
def test_intervals_of_the_auc_cover_the_truth(shift: float, m: int, n: int) -> None:
    """Of 600 samples 95 % should cover it; 4σ of that is 3.5 %, and small samples are allowed 1.5 % more."""
    rng = np.random.default_rng(3)
    truth = 0.5 * (1 + math.erf(shift / 2))
    found = [auc(rng.normal(shift, 1, m), rng.normal(0, 1, n)) for _ in range(600)]
    covered = sum(x.low <= truth <= x.high for x in found) / 600
    assert 0.95 - 0.05 <= covered <= 0.95 + 0.035


def test_perfect_separation_is_not_certainty() -> None:
    few, many = (auc(np.arange(n) + 2000.0, np.arange(n) * 1.0) for n in (10, 1000))
    assert few.value == many.value == few.high == 1.0
    assert 0.5 < few.low < 0.9 < many.low < 1
    other_way = auc(np.arange(10) * 1.0, np.arange(10) + 100.0)
    assert other_way.high == pytest.approx(1 - few.low)


def test_shares_have_the_interval_of_clopper_and_pearson() -> None:
    """Values from R's binom.test(3, 20)."""
    found = share(3, 20)
    assert (found.low, found.high) == (pytest.approx(0.0320709, abs=1e-6), pytest.approx(0.3789268, abs=1e-6))
    assert share(0, 50).low == 0.0
    assert share(50, 50).high == 1.0


def test_a_threshold_is_chosen_on_the_others_alone() -> None:
    """At most the limit of them are beyond it, whatever the ties."""
    rng = np.random.default_rng(1)
    others = rng.integers(0, 40, 250).astype(float)
    for limit in (0.01, 0.1):
        point = at_false_positives(rng.normal(25, 9, 80), others, limit)
        assert point is not None
        assert point.fpr.value <= limit
    assert at_false_positives(others, others[:99], 0.01) is None, "fewer than 100 cannot show 1 %"
    assert at_false_positives(others, np.zeros(100), 0.01) is not None


def test_the_share_found_at_one_percent_is_covered_exactly() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        others, members = rng.uniform(0, 1, 200), rng.uniform(0, 1, 150)
        point = at_false_positives(members, others, 0.01)
        assert point is not None
        threshold = np.sort(others)[::-1][2]
        hits += point.tpr.low <= 1 - threshold <= point.tpr.high
    assert hits / 400 >= 0.93


def test_the_bound_of_epsilon_is_kairouzs() -> None:
    bound = Guarantee(1.0, 1e-3, "")
    assert bound.best_tpr(0.01) == pytest.approx(math.e * 0.01 + 1e-3)
    assert bound.best_tpr(0.9) == pytest.approx(1 - math.exp(-1) * (1 - 1e-3 - 0.9))
    assert Guarantee(0.0, 0.0, "").best_auc() == pytest.approx(0.5)
    grid = np.linspace(0, 1, 20001)
    for epsilon, delta in ((0.3, 0.0), (1.0, 1e-3), (4.0, 0.05), (60.0, 1e-5), (5000.0, 1e-5)):
        some = Guarantee(epsilon, delta, "")
        assert some.best_auc() == pytest.approx(np.trapezoid([some.best_tpr(x) for x in grid], grid), abs=1e-4)


def test_randomised_response_attains_the_bound_and_no_more() -> None:
    """The best test of one bit that is told truly with probability e^ε/(1 + e^ε) lies on the bound."""
    epsilon = 1.3
    true = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert Guarantee(epsilon, 0.0, "").best_tpr(1 - true) == pytest.approx(true)
    point = OperatingPoint(0.3, Interval(true, true, true), Interval(1 - true, 1 - true, 1 - true))
    assert empirical_epsilon(point, 0.0) == pytest.approx(epsilon)
    assert not Guarantee(epsilon + 1e-9, 0.0, "").is_exceeded(point)
    assert Guarantee(epsilon - 0.01, 0.0, "").is_exceeded(point)


def test_the_guarantee_of_a_site_is_weaker_for_a_row() -> None:
    row = Guarantee(2.0, 1e-5, "").for_one_row()
    assert (row.epsilon, row.delta) == (4.0, pytest.approx(1e-5 * (1 + math.exp(2))))
