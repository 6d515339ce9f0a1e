"""The statistics against the same figures from scratch, and their promises over many simulated comparisons."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedspan.comparison.differences import Pairs, holm, interval, judge, pair, paired_p, power, seeds_needed

DIFFERENCES = st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=12).filter(lambda d: np.std(d) > 1e-3)


def pairs(values: object, rows: int = 10_000, missing: int = 0, arm: str = "x") -> Pairs:
    return Pairs("c", arm, tuple(np.asarray(values, dtype=float).tolist()), rows, missing)


@given(DIFFERENCES, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_interval_and_p_are_those_of_the_paired_t_test(values: list[float], confidence: float) -> None:
    """Against SciPy's own test of the two columns, and the textbook's formula in NumPy."""
    baseline = np.linspace(0.2, 0.7, len(values))
    reference = stats.ttest_rel(baseline + values, baseline)
    found = interval(pairs(values), confidence)
    assert found is not None
    expected = reference.confidence_interval(confidence)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)
    assert paired_p(pairs(values)) == pytest.approx(reference.pvalue, rel=1e-6, abs=1e-12)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    assert found == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=20))
def test_holm_rejects_what_its_procedure_rejects(ps: list[float]) -> None:
    """Holm (1979), literally: in increasing order, as long as p(k) is below α/(m−k+1)."""
    adjusted = holm(ps)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for k, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
            if ps[i] * (len(ps) - k) >= alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p is not None and p < alpha} == rejected
    assert holm([None, *ps]) == [None, *adjusted]


@given(st.lists(DIFFERENCES, min_size=1, max_size=8))
def test_the_corrected_interval_says_what_the_corrected_p_says(family: list[list[float]]) -> None:
    for one in judge([pairs(d) for d in family], margin=0.01, confidence=0.95, higher_is_better=True, point=0.01):
        assert one.p is not None
        assert one.p_adjusted is not None
        assert one.adjusted_interval is not None
        low, high = one.adjusted_interval
        if abs(one.p_adjusted - 0.05) > 1e-9:
            assert (low > 0 or high < 0) == (one.p_adjusted < 0.05)
        assert one.interval is not None
        assert low <= one.interval[0] + 1e-12 or one.p_adjusted == one.p or one.p > 0.05


@pytest.mark.parametrize(
    ("values", "options", "verdict"),
    [
        ([0.05, 0.06, 0.055, 0.052, 0.061], {}, "better"),
        ([0.05, 0.06, 0.055, 0.052, 0.061], {"higher_is_better": False}, "worse"),
        ([-0.05, -0.06, -0.055, -0.052, -0.061], {}, "worse"),
        ([0.001, -0.001, 0.0, 0.002, -0.002], {}, "equivalent"),
        ([0.001, -0.001, 0.0, 0.002, -0.002], {"margin": 0.0}, "open"),
        ([0.05, -0.06, 0.02, 0.0, 0.03], {}, "open"),
        ([0.05], {}, "open"),
        ([], {}, "open"),
    ],
)
def test_verdicts(values: list[float], options: dict[str, Any], verdict: str) -> None:
    given_options: dict[str, Any] = {
        "margin": 0.01,
        "confidence": 0.95,
        "higher_is_better": True,
        "point": 0.01,
        **options,
    }
    (one,) = judge([pairs(values)], **given_options)
    assert one.verdict == verdict


def test_a_single_equivalence_is_the_interval_within_the_margin() -> None:
    rng = np.random.default_rng(3)
    seen = set()
    for _ in range(300):
        drawn = pairs(rng.normal(0, 0.006, 5))
        (one,) = judge([drawn], margin=0.01, confidence=0.95, higher_is_better=True, point=0.01)
        assert one.interval is not None
        assert one.p is not None
        inside = one.interval[0] > -0.01 and one.interval[1] < 0.01
        assert (one.verdict == "equivalent") == (inside and one.p >= 0.05)
        seen.add(one.verdict)
    assert seen >= {"equivalent", "open"}


def test_size_of_a_difference_that_is_there() -> None:
    sizes = {}
    for name, centre in (("beyond the margin", 0.2), ("about the margin", 0.0105), ("within the margin", 0.006)):
        drawn = pairs(centre + 0.001 * np.array([-1, 0, 1, 0.5, -0.5]))
        (one,) = judge([drawn], margin=0.01, confidence=0.95, higher_is_better=True, point=0.01)
        sizes[name] = (one.verdict, one.size)
    assert sizes == {name: ("better", name) for name in sizes}


def test_a_diverged_seed_leaves_the_question_open() -> None:
    own: dict[int, float | None] = {0: 0.9, 1: 0.91, 2: None, 3: 0.92, 5: 0.5}
    found = pair("c", "x", own, {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}, 100)
    assert found.values == pytest.approx((0.4, 0.41, 0.42))
    assert found.missing == 1
    (one,) = judge([found], margin=0.01, confidence=0.95, higher_is_better=True, point=0.01)
    assert one.p is not None
    assert one.p < 0.01
    assert one.verdict == "open"


def test_equal_differences_prove_no_more_than_the_rows_can() -> None:
    """Two seeds with one and the same difference of one row in fifty."""
    (one,) = judge([pairs([0.02, 0.02], rows=50)], margin=0.01, confidence=0.95, higher_is_better=True, point=0.01)
    assert one.verdict == "open"
    assert one.pairs.deviation == pytest.approx(1 / (50 * math.sqrt(6)))
    assert one.interval is not None
    assert one.interval[0] < 0 < one.interval[1]


@pytest.mark.parametrize("deviation", [0.004, 0.01, 0.05])
def test_seeds_needed_is_the_fewest_with_the_power(deviation: float) -> None:
    """Simulated: that many seeds find the difference in 80 % of all comparisons, to 5 σ; one fewer do not suffice."""
    n = seeds_needed(deviation, 0.01, 0.95)
    assert n is not None
    assert power(n, deviation, 0.01, 0.95) >= 0.8
    assert n == 2 or power(n - 1, deviation, 0.01, 0.95) < 0.8
    draws = np.random.default_rng(0).normal(0.01, deviation, (20_000, n))
    share = float((stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean())
    assert share == pytest.approx(power(n, deviation, 0.01, 0.95), abs=5 * math.sqrt(0.25 / 20_000))
    assert seeds_needed(None, 0.01, 0.95) is None
    assert seeds_needed(1e6, 0.01, 0.95) is None


def test_power_grows_with_the_difference_and_is_always_a_number() -> None:
    for num_seeds in (2, 3, 5, 10, 31, 1000):
        found = [power(num_seeds, 0.01, difference, 0.95) for difference in np.linspace(0, 0.5, 60)]
        assert all(x <= y + 1e-9 for x, y in itertools.pairwise(found))
        assert found[0] == pytest.approx(0.05)


def test_coverage_and_errors_over_simulated_comparisons() -> None:
    """800 comparisons of four arms of which none differs, to 5 σ: 95 % of the intervals hold 0, and in at most 5 % of
    the comparisons does any arm win or lose."""
    rng, num = np.random.default_rng(1), 800
    covered, wrong = 0, 0
    for _ in range(num):
        family = [pairs(rng.normal(0, 0.03, 5), arm=str(k)) for k in range(3)]
        judged = judge(family, margin=0.01, confidence=0.95, higher_is_better=True, point=0.01)
        covered += sum(one.interval[0] < 0 < one.interval[1] for one in judged if one.interval is not None)
        wrong += any(one.verdict in ("better", "worse") for one in judged)
    spread = 5 * math.sqrt(0.05 * 0.95 / (3 * num))
    assert covered / (3 * num) == pytest.approx(0.95, abs=spread)
    assert wrong / num <= 0.05 + 5 * math.sqrt(0.05 * 0.95 / num)


def test_arms_that_differ_by_the_margin_are_seldom_called_equivalent() -> None:
    """At the margin itself, in at most 2.5 % of the comparisons, to 5 σ."""
    rng, num, wrong = np.random.default_rng(2), 1000, 0
    for _ in range(num):
        (one,) = judge(
            [pairs(rng.normal(0.01, 0.002, 5))], margin=0.01, confidence=0.95, higher_is_better=True, point=0.01
        )
        wrong += one.verdict == "equivalent"
    assert wrong / num <= 0.025 + 5 * math.sqrt(0.025 * 0.975 / num)
