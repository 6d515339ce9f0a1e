"""The statistics that metrics are computed from: their sums over rows, and the metrics as functions of those sums.

Shapes: N rows, C classes, B bins of a histogram. A confusion matrix is (C, C), flattened, with the true class first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedspan.data.class_metrics import BINS
from fedspan.data.metrics import METRICS

Vector = npt.NDArray[np.float64]

SCORE_BINS = 1024
"""Bins of a histogram of scores."""
_FARTHEST = 16.0
"""Log-odds that fall into the outermost bins: probabilities of 1e-7 and 1 - 1e-7."""
_ORDER = 4
BLEU_SIZE = 2 + 2 * _ORDER
"""Lengths of answers and references, and of each order the n-grams that match and those that there are."""
_CHARACTERS = 6
CHRF_SIZE = 3 * _CHARACTERS
"""Of each order the n-grams of the answers, those of the references, and those that match."""


@dataclass(frozen=True, slots=True)
class RowResults:
    """The outcome of a model for rows: as in `fedspan.client.evaluation.Figures`."""

    losses: Sequence[float]
    """Summed loss of each batch."""
    counts: Sequence[int]
    """Tokens or examples of each batch."""
    predicted: Sequence[Any]
    references: Sequence[Any]
    probabilities: Sequence[Sequence[float]] = field(default_factory=list)


def correct(rows: RowResults, num_labels: int) -> Vector:
    """Return the number of right predictions, (1,)."""
    return np.array([float(sum(bool(p == r) for p, r in zip(rows.predicted, rows.references, strict=True)))])


def confusion(rows: RowResults, num_labels: int) -> Vector:
    """Return the confusion matrix, (C²,)."""
    counts = np.zeros((num_labels, num_labels))
    np.add.at(counts, (np.asarray(rows.references), np.asarray(rows.predicted)), 1.0)
    return counts.reshape(-1)


def num_histograms(num_labels: int) -> int:
    """Return the number of classes that are told from the rest: one of two, otherwise all."""
    return 1 if num_labels == 2 else num_labels


def histogram_size(num_labels: int) -> int:
    """Return the numbers of all histograms."""
    return num_histograms(num_labels) * 2 * SCORE_BINS


def histogram(rows: RowResults, num_labels: int) -> Vector:
    """Return how many rows have a score in each bin, (classes · 2 · B,): of each class the others' first, then its own.

    The bins are of equal width in the log-odds, since confident models have most probabilities near 0 and 1.
    """
    given, labels = np.asarray(rows.probabilities, dtype=np.float64), np.asarray(rows.references)
    if not np.isfinite(given).all():
        return np.full(histogram_size(num_labels), np.nan)
    counts = np.zeros((num_histograms(num_labels), 2, SCORE_BINS))
    for place, k in enumerate([1] if num_labels == 2 else range(num_labels)):
        np.add.at(counts[place], ((labels == k).astype(np.int64), score_bins(given[:, k])), 1.0)
    return counts.reshape(-1)


def score_bins(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the bin of each probability, 0 to B - 1; the order of two in different bins is kept."""
    with np.errstate(divide="ignore"):
        odds = np.log(probabilities) - np.log1p(-probabilities)
    places = (np.clip(odds, -_FARTHEST, _FARTHEST) + _FARTHEST) / (2 * _FARTHEST) * SCORE_BINS
    bins: npt.NDArray[np.int64] = np.minimum(places.astype(np.int64), SCORE_BINS - 1)
    return bins


def calibration(rows: RowResults, num_labels: int) -> Vector:
    """Return the sum of right minus confidence in each bin of `calibration_error`."""
    given = np.asarray(rows.probabilities, dtype=np.float64)
    if not np.isfinite(given).all():
        return np.full(BINS, np.nan)
    confidence, right = given.max(axis=1), given.argmax(axis=1) == np.asarray(rows.references)
    places = np.searchsorted(np.linspace(0.0, 1.0, BINS + 1)[1:-1], confidence)
    return np.bincount(places, weights=right - confidence, minlength=BINS).astype(np.float64)


def moments(rows: RowResults, num_labels: int) -> Vector:
    """Return Σx, Σy, Σx², Σy² and Σxy of predictions x and references y."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (rows.predicted, rows.references))
    return np.array([x.sum(), y.sum(), x @ x, y @ y, x @ y])


def row_scores(metric: str) -> Callable[[RowResults, int], Vector]:
    """Return the sum of a metric that is the mean of one score for each row."""

    def total(rows: RowResults, num_labels: int) -> Vector:
        return np.array([METRICS[metric].score(rows.predicted, rows.references) * len(rows.references)])

    return total


def bleu(rows: RowResults, num_labels: int) -> Vector:
    """Return the lengths and the numbers of n-grams that sacrebleu's BLEU of these rows is computed from."""
    from sacrebleu.metrics import BLEU

    score = BLEU().corpus_score(list(rows.predicted), [list(rows.references)])
    return np.array([score.sys_len, score.ref_len, *score.counts, *score.totals], dtype=np.float64)


def bleu_value(sums: Vector, rows: float) -> float:
    """Return BLEU, 0 to 100, from the sums of `bleu`."""
    from sacrebleu.metrics import BLEU

    counts, totals = (list(map(int, part)) for part in (sums[2 : 2 + _ORDER], sums[2 + _ORDER :]))
    return float(BLEU.compute_bleu(counts, totals, int(sums[0]), int(sums[1]), smooth_method="exp").score)


def chrf(rows: RowResults, num_labels: int) -> Vector:
    """Return the numbers of n-grams that sacrebleu's chrF2 of these rows is computed from."""
    from sacrebleu.metrics import CHRF

    # Its results hold the score alone; the statistics behind them have no public name.
    by_row = CHRF()._extract_corpus_statistics(list(rows.predicted), [list(rows.references)])
    total: Vector = np.asarray(by_row, dtype=np.float64).sum(axis=0)
    return total


def chrf_value(sums: Vector, rows: float) -> float:
    """Return chrF2, 0 to 100, from the sums of `chrf`."""
    from sacrebleu.metrics import CHRF

    return float(CHRF()._compute_f_score(sums.tolist()))


def mean_of_rows(sums: Vector, rows: float) -> float:
    """Return the mean of one number for each row."""
    return float(sums[0]) / rows


def f1(sums: Vector, rows: float) -> float:
    """Return the F1 of class 1; 0 without a true positive."""
    right, predicted, true = _margins(sums)
    return float(2 * right[1] / (predicted[1] + true[1])) if right[1] > 0 else 0.0


def macro_f1(sums: Vector, rows: float) -> float:
    """Return the mean F1 of every class that occurs."""
    right, predicted, true = _margins(sums)
    return _mean(2 * right, predicted + true, predicted + true > 0)


def balanced_accuracy(sums: Vector, rows: float) -> float:
    """Return the mean recall of every class that rows have."""
    right, _, true = _margins(sums)
    return _mean(right, true, true > 0)


def macro_recall(sums: Vector, rows: float) -> float:
    """Return the mean recall of every class that occurs on either side; 0 for one that no row has."""
    right, predicted, true = _margins(sums)
    return _mean(right, true, predicted + true > 0)


def macro_precision(sums: Vector, rows: float) -> float:
    """Return the mean precision of every class that occurs on either side; 0 for one that is never predicted."""
    right, predicted, true = _margins(sums)
    return _mean(right, predicted, predicted + true > 0)


def sensitivity(sums: Vector, rows: float) -> float:
    """Return the recall of class 1; NaN without any of it."""
    right, _, true = _margins(sums)
    return float(right[1] / true[1]) if true[1] > 0 else math.nan


def specificity(sums: Vector, rows: float) -> float:
    """Return the recall of class 0; NaN without any of it."""
    right, _, true = _margins(sums)
    return float(right[0] / true[0]) if true[0] > 0 else math.nan


def matthews(sums: Vector, rows: float) -> float:
    """Return the Matthews correlation (Gorodkin 2004 for C > 2); 0 when either side has a single class."""
    right, predicted, true = _margins(sums)
    total = true.sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float((right.sum() * total - predicted @ true) / math.sqrt(float(spread))) if spread > 0 else 0.0


def pearson(sums: Vector, rows: float) -> float:
    """Return the linear correlation from the sums of `moments`; 0 when either side is constant."""
    x, y, xx, yy, xy = sums.tolist()
    spread_x, spread_y = xx - x * x / rows, yy - y * y / rows
    # Constant values leave rounding alone, of this size.
    if spread_x <= 1e-13 * xx or spread_y <= 1e-13 * yy:
        return 0.0
    correlation: float = (xy - x * y / rows) / math.sqrt(spread_x * spread_y)
    return max(-1.0, min(1.0, correlation))


def calibration_error(sums: Vector, rows: float) -> float:
    """Return the expected calibration error from the sums of `calibration`."""
    return float(np.abs(sums).sum() / rows)


def auroc(sums: Vector, rows: float) -> float:
    """Return the area under the ROC curve of the scores in bins, the mean over classes as `class_metrics.auroc` has it.

    Scores in one bin count as equal. The area of the scores themselves differs by at most ½ Σ_b p_b q_b, with p_b and
    q_b the shares in bin b of the class and of the others.
    """
    return _mean_of_classes(sums, _area)


def average_precision(sums: Vector, rows: float) -> float:
    """Return the average precision, Σₙ (Rₙ − Rₙ₋₁) Pₙ, of the scores in bins."""
    return _mean_of_classes(sums, _precision)


def _area(others: Vector, own: Vector) -> float:
    below = np.cumsum(others) - others
    return float(own @ (below + others / 2) / (own.sum() * others.sum()))


def _precision(others: Vector, own: Vector) -> float:
    found, passed = np.cumsum(own[::-1]), np.cumsum(others[::-1])
    precision = np.divide(found, found + passed, out=np.zeros_like(found), where=found + passed > 0)
    return float(own[::-1] @ precision / own.sum())


def _mean_of_classes(sums: Vector, score: Callable[[Vector, Vector], float]) -> float:
    by_class = sums.reshape(-1, 2, SCORE_BINS)
    scores = [score(others, own) for others, own in by_class if own.sum() > 0 and others.sum() > 0]
    return float(np.mean(scores)) if scores else math.nan


def _margins(sums: Vector) -> tuple[Vector, Vector, Vector]:
    """Return the right, the predicted and the true rows of each class, (C,) each."""
    classes = math.isqrt(sums.size)
    counts = sums.reshape(classes, classes)
    return counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1)


def _mean(parts: Vector, wholes: Vector, chosen: npt.NDArray[np.bool_]) -> float:
    shares = np.divide(parts, wholes, out=np.zeros_like(parts, dtype=np.float64), where=wholes > 0)
    return float(shares[chosen].mean()) if chosen.any() else math.nan
