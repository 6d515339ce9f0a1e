"""Metrics of classification beyond accuracy: of the predicted classes, and of their probabilities.

What a set of examples does not determine, such as an AUROC of one class, is NaN; a summary shows it as "–".

Shapes: N examples, C classes; probabilities are N lists of C numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from fedspan.data.score_inputs import check_pairs

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""

Probabilities = Sequence[Sequence[float]]


def balanced_accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the unweighted mean of the recall of every class among the references."""
    return _mean_of_classes("recall_score", predictions, references, sorted(set(references)))


def macro_recall(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the unweighted mean of the recall of every class that occurs on either side; 0 without a reference."""
    return _mean_of_classes("recall_score", predictions, references, sorted({*predictions, *references}))


def macro_precision(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the unweighted mean of the precision of every class that occurs; 0 where it is never predicted."""
    return _mean_of_classes("precision_score", predictions, references, sorted({*predictions, *references}))


def _mean_of_classes(name: str, predictions: Sequence[int], references: Sequence[int], labels: list[int]) -> float:
    check_pairs(predictions, references)
    from sklearn import metrics

    score = getattr(metrics, name)
    return float(score(references, predictions, labels=labels, average="macro", zero_division=0.0))


def sensitivity(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the share of class 1 that is predicted as such (the recall of class 1); NaN without any of it."""
    return _share_found(predictions, references, 1)


def specificity(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the share of class 0 that is predicted as such (the recall of class 0); NaN without any of it."""
    return _share_found(predictions, references, 0)


def _share_found(predictions: Sequence[int], references: Sequence[int], label: int) -> float:
    check_pairs(predictions, references)
    found = [p == r for p, r in zip(predictions, references, strict=True) if r == label]
    return sum(found) / len(found) if found else math.nan


def auroc(probabilities: Probabilities, references: Sequence[int]) -> float:
    """Return the area under the ROC curve: of class 1 where there are two classes, else one class against the rest.

    With more than two classes it is the unweighted mean over the classes that some but not all references have; NaN
    where there is none, as with references of a single class.
    """
    from sklearn.metrics import roc_auc_score

    return _one_against_rest(probabilities, references, roc_auc_score)


def average_precision(probabilities: Probabilities, references: Sequence[int]) -> float:
    """Return the average precision, Σₙ (Rₙ − Rₙ₋₁) Pₙ, with the classes taken as in :func:`auroc`."""
    from sklearn.metrics import average_precision_score

    return _one_against_rest(probabilities, references, average_precision_score)


def _one_against_rest(
    probabilities: Probabilities, references: Sequence[int], score: Callable[[Any, Any], float]
) -> float:
    check_pairs(probabilities, references)
    given, labels = np.asarray(probabilities, dtype=np.float64), np.asarray(references)
    classes = [1] if given.shape[1] == 2 else range(given.shape[1])
    scores = [
        float(score(is_class, given[:, k])) for k in classes if (is_class := labels == k).any() and not is_class.all()
    ]
    return sum(scores) / len(scores) if scores else math.nan


def calibration_error(probabilities: Probabilities, references: Sequence[int]) -> float:
    """Return the expected calibration error of the predicted class, over 15 bins of equal width:

        Σ_b (N_b / N) |accuracy in b − mean confidence in b|,    b = ((i − 1)/15, i/15].

    The confidence is the probability of the predicted class. Source: Guo et al. 2017 (1706.04599), after Naeini et
    al. 2015.
    """
    check_pairs(probabilities, references)
    given = np.asarray(probabilities, dtype=np.float64)
    confidence, right = given.max(axis=1), given.argmax(axis=1) == np.asarray(references)
    places = np.searchsorted(np.linspace(0.0, 1.0, BINS + 1)[1:-1], confidence)
    gaps = np.bincount(places, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(given))


class ClassReport(TypedDict):
    """The predicted classes against the true ones; lists in the order of the class ids."""

    classes: list[str]
    """Their names, or their ids as text."""
    confusion: list[list[int]]
    """Row i, column j: the examples of class i that are predicted as class j."""
    rows: list[int]
    """Examples of each class."""
    precision: list[float | None]
    """Share of right ones among those predicted as the class; None where none is."""
    recall: list[float | None]
    """Share of the class that is predicted as such; None without examples of it."""


def class_report(predictions: Sequence[int], references: Sequence[int], names: Sequence[str]) -> ClassReport:
    """Return the confusion matrix with precision and recall of each class.

    Parameters
    ----------
    names
        Names of all classes in the order of their ids.
    """
    check_pairs(predictions, references)
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(counts, (np.asarray(references), np.asarray(predictions)), 1)
    return report_of_counts(counts, names)


def report_of_counts(counts: npt.NDArray[np.int64], names: Sequence[str]) -> ClassReport:
    """Return precision and recall of each class beside the confusion matrix, (C, C), that they follow from."""
    right, predicted, true = counts.diagonal().tolist(), counts.sum(axis=0).tolist(), counts.sum(axis=1).tolist()
    return {
        "classes": list(names),
        "confusion": counts.tolist(),
        "rows": true,
        "precision": [_share(k, n) for k, n in zip(right, predicted, strict=True)],
        "recall": [_share(k, n) for k, n in zip(right, true, strict=True)],
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
