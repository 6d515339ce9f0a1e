"""Metrics from sums over rows, so that several parties can compute one figure without showing anybody their rows.

A vector of statistics is a sum over rows: the number of rows, the summed loss with its number of tokens or examples,
and one block for each kind of statistics that the metrics need (`data.metric_blocks`). The sum of several parties'
vectors is the vector of all their rows together, and the figures follow from it: those of the pooled rows, to the
rounding of float64. A few metrics are of scores in bins (`auroc`, `average_precision`), and a few have no such sums:
Spearman's correlation needs the ranks among all values.

Shapes: N rows, C classes; a vector is (size,) of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedspan.data import metric_blocks as blocks
from fedspan.data.class_metrics import BINS, ClassReport, report_of_counts
from fedspan.data.metric_blocks import RowResults, Vector

HEADER = 3
"""Rows, summed loss, and the tokens or examples of that loss, before the blocks."""
MOST_ROWS = 10**12
_MOST_REPORTED = 64
"""Classes, above which no confusion matrix is added for a report alone."""

Value = Callable[[Vector, float], float]
"""(a block's sums, N) -> the metric; NaN where they do not determine it."""


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of statistics: how many numbers they are, and their sums over rows."""

    size: Callable[[int], int]
    """C -> numbers."""
    sums: Callable[[RowResults, int], Vector]
    """(rows, C) -> (size,)."""
    bounded: bool
    """Of any one row, all numbers together have a norm of at most 1 (√C of histograms over C > 2 classes)."""
    whole: bool = False
    """They are counts that add up to N."""


BLOCKS: Mapping[str, Block] = {
    "correct": Block(lambda c: 1, blocks.correct, bounded=True),
    "confusion": Block(lambda c: c * c, blocks.confusion, bounded=True, whole=True),
    "histogram": Block(blocks.histogram_size, blocks.histogram, bounded=True),
    "calibration": Block(lambda c: BINS, blocks.calibration, bounded=True),
    "moments": Block(lambda c: 5, blocks.moments, bounded=False),
    "exact_match": Block(lambda c: 1, blocks.row_scores("exact_match"), bounded=True),
    "token_f1": Block(lambda c: 1, blocks.row_scores("token_f1"), bounded=True),
    "rouge_l": Block(lambda c: 1, blocks.row_scores("rouge_l"), bounded=True),
    "bleu": Block(lambda c: blocks.BLEU_SIZE, blocks.bleu, bounded=False),
    "chrf": Block(lambda c: blocks.CHRF_SIZE, blocks.chrf, bounded=False),
    "tokens": Block(lambda c: 0, lambda rows, c: np.zeros(0), bounded=False),
}

SUMS: Mapping[str, tuple[str, Value]] = {
    "accuracy": ("correct", blocks.mean_of_rows),
    "f1": ("confusion", blocks.f1),
    "macro_f1": ("confusion", blocks.macro_f1),
    "matthews": ("confusion", blocks.matthews),
    "balanced_accuracy": ("confusion", blocks.balanced_accuracy),
    "macro_precision": ("confusion", blocks.macro_precision),
    "macro_recall": ("confusion", blocks.macro_recall),
    "sensitivity": ("confusion", blocks.sensitivity),
    "specificity": ("confusion", blocks.specificity),
    "auroc": ("histogram", blocks.auroc),
    "average_precision": ("histogram", blocks.average_precision),
    "calibration_error": ("calibration", blocks.calibration_error),
    "pearson": ("moments", blocks.pearson),
    "exact_match": ("exact_match", blocks.mean_of_rows),
    "token_f1": ("token_f1", blocks.mean_of_rows),
    "rouge_l": ("rouge_l", blocks.mean_of_rows),
    "bleu": ("bleu", blocks.bleu_value),
    "chrf": ("chrf", blocks.chrf_value),
    "perplexity": ("tokens", blocks.mean_of_rows),
}
"""Metric -> its block, and the metric from it; `perplexity` follows from the header."""


def summable(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return those of the metrics that follow from sums."""
    return tuple(name for name in metrics if name in SUMS)


@dataclass(frozen=True, slots=True)
class StatisticsLayout:
    """The blocks of a vector of statistics, in their order, which everybody derives from the same settings."""

    metrics: tuple[str, ...]
    """All of them have sums."""
    num_labels: int
    """C; 0 for instruction data, 1 for a regression."""
    blocks: tuple[str, ...]
    with_loss: bool = True

    @classmethod
    def of(cls, metrics: Sequence[str], num_labels: int, *, bounded: bool = False) -> StatisticsLayout:
        """Return the layout for those of these metrics that have sums.

        Parameters
        ----------
        bounded
            Take only statistics to which one row adds a bounded amount, as noise needs it: no loss, for one.
        """
        chosen = [name for name in summable(metrics) if not bounded or BLOCKS[SUMS[name][0]].bounded]
        needed = dict.fromkeys(SUMS[name][0] for name in chosen)
        if not bounded and "correct" in needed and 2 <= num_labels <= _MOST_REPORTED:
            needed["confusion"] = None  # for the report on classes
        return cls(tuple(chosen), num_labels, tuple(needed), not bounded)

    @property
    def size(self) -> int:
        """Numbers of a vector."""
        return HEADER + sum(self._sizes().values())

    @property
    def sensitivity(self) -> float:
        """The largest norm of what one row adds to a vector of bounded statistics, its count apart."""
        classes = math.sqrt(blocks.num_histograms(self.num_labels))
        return math.sqrt(sum((classes if name == "histogram" else 1.0) ** 2 for name in self.blocks))

    def vector(self, rows: RowResults) -> Vector:
        """Return the statistics of these rows, (size,); not finite where a prediction or the loss is not."""
        count = len(rows.references)
        head = [count, sum(rows.losses), sum(rows.counts)] if self.with_loss else [count, 0.0, 0.0]
        pieces = [np.asarray(head, dtype=np.float64)]
        for name, size in self._sizes().items():
            pieces.append(BLOCKS[name].sums(rows, self.num_labels) if count else np.zeros(size))
        return np.concatenate(pieces).astype(np.float64)

    def figures(self, vector: Vector) -> dict[str, float]:
        """Return `loss` and every metric of the rows that a vector, or a sum of vectors, is of."""
        rows, loss, tokens = vector[:HEADER].tolist()
        mean_loss = loss / tokens if tokens > 0 else math.nan
        found = {"loss": mean_loss}
        held = self.held(vector)
        for name in self.metrics:
            block, value = SUMS[name]
            if name == "perplexity":
                found[name] = _exp(mean_loss)
            else:
                found[name] = float(value(held[block], rows)) if rows > 0 else math.nan
        return found

    def held(self, vector: Vector) -> dict[str, Vector]:
        """Return the blocks of a vector by their names."""
        found, start = {}, HEADER
        for name, size in self._sizes().items():
            found[name] = vector[start : start + size]
            start += size
        return found

    def report(self, vector: Vector, names: Sequence[str]) -> ClassReport | None:
        """Return the confusion matrix with precision and recall of each class; None where it is not among the sums."""
        if "confusion" not in self.blocks or len(names) != self.num_labels or not self.with_loss:
            return None
        counts = np.rint(self.held(vector)["confusion"]).astype(np.int64)
        return report_of_counts(counts.reshape(self.num_labels, self.num_labels), names)

    def problem(self, vector: npt.NDArray[Any]) -> str | None:
        """Return what shows that a vector cannot be the statistics of any rows; None: nothing does."""
        if vector.shape != (self.size,):
            return f"sent {vector.size} statistics: expected {self.size}"
        if not np.isfinite(vector).all():
            return "sent statistics that are not finite"
        rows = float(vector[0])
        if not 0 <= rows <= MOST_ROWS or not rows.is_integer():
            return f"sent statistics of {rows:g} rows: expected a whole number, at most {MOST_ROWS:g}"
        for name, held in self.held(vector).items():
            # What one row adds to a bounded number is between -1 and 1.
            if BLOCKS[name].bounded and np.abs(held).max(initial=0.0) > rows * (1 + 1e-9):
                return f"sent {name} statistics that are larger than {rows:g} rows can make them"
            if BLOCKS[name].whole and held.sum() != rows:
                return f"sent {name} statistics of {held.sum():g} rows: expected {rows:g}"
        return None

    def described(self) -> str:
        """Return all that a layout depends on, in one line that both sides of a sum can compare."""
        return f"{','.join(self.metrics)} of {self.num_labels} labels in {','.join(self.blocks)}"

    def _sizes(self) -> dict[str, int]:
        return {name: BLOCKS[name].size(self.num_labels) for name in self.blocks}


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
