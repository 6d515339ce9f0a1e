"""Metrics from sums over rows: whatever the division of the rows, the figures of all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.data.class_metrics import class_report
from fedspan.data.metric_blocks import SCORE_BINS, RowResults, score_bins
from fedspan.data.metric_sums import BLOCKS, HEADER, SUMS, StatisticsLayout, summable
from fedspan.data.metrics import METRICS

pytestmark = pytest.mark.filterwarnings("ignore:A single label was found")

LABELLED = [name for name, metric in METRICS.items() if metric.needs == "labels"]
OF_PROBABILITIES = [name for name, metric in METRICS.items() if metric.needs == "probabilities"]
TEXTS = ["exact_match", "token_f1", "rouge_l", "bleu", "chrf"]
WORDS = ["a b c d e", "the cat sat on the mat", "a", "", "the dog sat on a mat today", "b c d e f g"]


def classified(seed: int, num_rows: int, num_labels: int) -> RowResults:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, num_labels)) * 3
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = rng.integers(num_labels, size=num_rows).tolist()
    losses = (-np.log(shares[np.arange(num_rows), labels])).tolist()
    return RowResults(losses, [1] * num_rows, shares.argmax(axis=1).tolist(), labels, shares.tolist())


def cut(rows: RowResults, *stops: int) -> list[RowResults]:
    """The rows of several parties, some of which may have none."""
    places = [0, *sorted(stops), len(rows.references)]

    def part(start: int, stop: int) -> RowResults:
        kept = (list(x[start:stop]) for x in (rows.losses, rows.counts, rows.predicted, rows.references))
        return RowResults(*kept, list(rows.probabilities[start:stop]))

    return [part(start, stop) for start, stop in pairwise(places)]


def summed(layout: StatisticsLayout, parts: Sequence[RowResults]) -> np.ndarray:
    return np.sum([layout.vector(part) for part in parts], axis=0)


def pooled(name: str, rows: RowResults) -> float:
    """The metric of the pooled rows as every other evaluation computes it."""
    pairs = {
        "losses": (rows.losses, rows.counts),
        "probabilities": (rows.probabilities, rows.references),
    }
    return METRICS[name].value(*pairs.get(METRICS[name].needs, (rows.predicted, rows.references)))


def same(found: float, expected: float) -> None:
    if math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 40),
    num_labels=st.integers(2, 5),
    stops=st.lists(st.integers(0, 40), max_size=4),
)
def test_the_sums_give_the_figures_of_the_pooled_rows(
    seed: int, num_rows: int, num_labels: int, stops: list[int]
) -> None:
    """Of every metric of classes, in float64; a party may have no rows, or one class alone."""
    rows = classified(seed, num_rows, num_labels)
    names = [name for name in LABELLED if METRICS[name].num_labels in (None, num_labels)]
    layout = StatisticsLayout.of([*names, "calibration_error"], num_labels)
    total = summed(layout, cut(rows, *(min(stop, num_rows) for stop in stops)))
    found = layout.figures(total)
    assert layout.problem(total) is None
    same(found["loss"], sum(rows.losses) / num_rows)
    for name in layout.metrics:
        same(found[name], pooled(name, rows))
    report = layout.report(total, [str(k) for k in range(num_labels)])
    assert report == class_report(rows.predicted, rows.references, [str(k) for k in range(num_labels)])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(2, 200), num_labels=st.integers(2, 4))
def test_scores_in_bins_give_the_metrics_of_binned_scores(seed: int, num_rows: int, num_labels: int) -> None:
    """Exactly those of the bins' numbers as scores, and the area within the bound that its docstring states."""
    rows = classified(seed, num_rows, num_labels)
    given_scores = np.asarray(rows.probabilities)
    bins = np.stack([score_bins(given_scores[:, k]) for k in range(num_labels)], axis=1)
    layout = StatisticsLayout.of(OF_PROBABILITIES, num_labels)
    total = summed(layout, cut(rows, num_rows // 3, num_rows // 2))
    found = layout.figures(total)
    for name in ("auroc", "average_precision"):
        same(found[name], METRICS[name].value((bins / SCORE_BINS).tolist(), rows.references))
    counts = layout.held(total)["histogram"].reshape(-1, 2, SCORE_BINS)
    bounds = [0.5 * float((q / q.sum()) @ (p / p.sum())) for q, p in counts if q.sum() and p.sum()]
    if bounds:
        assert abs(found["auroc"] - pooled("auroc", rows)) <= sum(bounds) / len(bounds) + 1e-12


def test_bins_keep_the_order_of_scores_and_take_certain_ones() -> None:
    scores = np.array([0.0, 1e-9, 0.2, 0.5, 0.7, 1 - 1e-9, 1.0])
    places = score_bins(scores)
    assert (np.diff(places) >= 0).all()
    assert (places[0], places[-1], len(set(places.tolist()))) == (0, SCORE_BINS - 1, 5)


@settings(deadline=None, max_examples=25)
@given(
    numbers=st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=2, max_size=30),
    stop=st.integers(0, 30),
)
def test_correlations_come_from_moments(numbers: list[tuple[float, float]], stop: int) -> None:
    predicted, references = (list(column) for column in zip(*numbers, strict=True))
    if np.std(predicted) < 1e-3 or np.std(references) < 1e-3:
        return  # cancellation: see the next test
    rows = RowResults([1.0] * len(numbers), [1] * len(numbers), predicted, references)
    layout = StatisticsLayout.of(["pearson", "spearman"], 1)
    assert layout.metrics == ("pearson",)  # ranks need all values at one place
    found = layout.figures(summed(layout, cut(rows, min(stop, len(numbers)))))["pearson"]
    assert found == pytest.approx(pooled("pearson", rows), abs=1e-7)


def test_a_constant_side_has_no_correlation() -> None:
    rows = RowResults([1.0] * 4, [1] * 4, [0.1, 0.1, 0.1, 0.1], [1.0, 2.0, 3.0, 4.0])
    layout = StatisticsLayout.of(["pearson"], 1)
    assert layout.figures(summed(layout, cut(rows, 2)))["pearson"] == 0.0


@settings(deadline=None, max_examples=25)
@given(
    pairs=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS[:3] + WORDS[4:])), min_size=1, max_size=8),
    stop=st.integers(0, 8),
)
def test_texts(pairs: list[tuple[str, str]], stop: int) -> None:
    """Means of scores, and the corpus figures of sacrebleu from its own n-gram counts."""
    predicted, references = (list(column) for column in zip(*pairs, strict=True))
    rows = RowResults([2.5] * len(pairs), [3] * len(pairs), predicted, references)
    layout = StatisticsLayout.of([*TEXTS, "perplexity"], 0)
    total = summed(layout, cut(rows, min(stop, len(pairs))))
    found = layout.figures(total)
    for name in layout.metrics:
        same(found[name], pooled(name, rows))


def test_every_metric_has_sums_or_is_known_to_have_none() -> None:
    assert set(METRICS) - set(summable(tuple(METRICS))) <= {"spearman", *(n for n in METRICS if ":" in n)}
    assert {block for block, _ in SUMS.values()} <= BLOCKS.keys()


def test_one_row_adds_no_more_than_the_stated_norm() -> None:
    """The bound that noise is scaled to, for every bounded block."""
    for num_labels in (2, 4):
        layout = StatisticsLayout.of([*LABELLED, *OF_PROBABILITIES], num_labels, bounded=True)
        for part in cut(classified(5, 60, num_labels), *range(60)):
            norm = float(np.linalg.norm(layout.vector(part)[HEADER:]))
            assert norm <= layout.sensitivity * (1 + 1e-12)
    texts = StatisticsLayout.of(TEXTS, 0, bounded=True)
    assert texts.metrics == ("exact_match", "token_f1", "rouge_l")  # n-grams of a text have no bound
    assert not StatisticsLayout.of(["perplexity", "pearson"], 1, bounded=True).metrics


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, -1.0, "rows"),
        (0, 1.5, "rows"),
        (0, 1e13, "rows"),
        (HEADER, 1e6, "larger than"),
        (HEADER + 1, 40.0, "statistics"),
        (1, math.inf, "not finite"),
    ],
)
def test_statistics_that_no_rows_have_are_recognised(place: int, value: float, said: str) -> None:
    layout = StatisticsLayout.of(["accuracy", "macro_f1"], 3)
    vector = layout.vector(classified(1, 20, 3))
    assert layout.problem(vector) is None
    vector[place] = value
    problem = layout.problem(vector)
    assert problem is not None
    assert said in problem
    assert layout.problem(vector[:-1]) is not None
