"""Metrics: thin faces over scikit-learn, SciPy and rouge-score, and a few text metrics of one line each.

Every score takes all predictions and references at once and gives one float. Nothing heavy is imported before
the first call that needs it.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.support.errors import FedspanError

Score = Callable[[Sequence[Any], Sequence[Any]], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A score of ``(predictions, references)``, sequences of equal length with at least one entry."""

    name: str
    higher_is_better: bool
    score: Score


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of predictions equal to their reference."""
    _check(predictions, references)
    right = sum(bool(p == r) for p, r in zip(predictions, references, strict=True))
    return right / len(references)


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """F1 of class 1 against class 0, as GLUE reports it; 0 without a true positive.

    Raises
    ------
    ValueError
        For labels other than 0 and 1.
    """
    _check(predictions, references)
    others = {*predictions, *references} - {0, 1}
    if others:
        raise FedspanError(f"f1 got the label {min(others)}: expected 0 and 1 (more classes: macro_f1)")
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0.0))


def macro_f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Unweighted mean, over the classes that occur, of each class's F1."""
    _check(predictions, references)
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Matthews correlation (Matthews 1975); 0 when either side has a single class."""
    _check(predictions, references)
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Linear correlation; 0 when either side is constant, where it is undefined."""
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Rank correlation with average ranks for ties; 0 when either side is constant."""
    return _correlation("spearmanr", predictions, references)


def _correlation(name: str, predictions: Sequence[float], references: Sequence[float]) -> float:
    _check(predictions, references)
    if len(set(predictions)) == 1 or len(set(references)) == 1:
        return 0.0
    from scipy import stats

    return float(getattr(stats, name)(predictions, references).statistic)


def normalise(text: str) -> str:
    """Lower case, single spaces, no punctuation at either end (unless it is all there is)."""
    plain = " ".join(text.lower().split())
    return plain.strip(string.punctuation + " ") or plain


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to their reference after :func:`normalise`."""
    _check(predictions, references)
    return accuracy([normalise(text) for text in predictions], [normalise(text) for text in references])


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the bags of words (normalised, split at spaces); two empty texts count as 1."""
    _check(predictions, references)
    return sum(map(_word_f1, predictions, references)) / len(references)


def _word_f1(prediction: str, reference: str) -> float:
    given, wanted = Counter(normalise(prediction).split()), Counter(normalise(reference).split())
    total = given.total() + wanted.total()
    return 2 * (given & wanted).total() / total if total else 1.0


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure in [0, 1], with Porter stemming as Super-NaturalInstructions scores it.

    Sources: Lin 2004; Wang et al. 2022 (arXiv:2204.07705).
    """
    _check(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    return sum(float(scorer.score(target, text)["rougeL"].fmeasure) for target, text in pairs) / len(references)


def perplexity_of(mean_nll: float) -> float:
    """exp of the mean negative log-likelihood per token in nats; infinite where that overflows."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def perplexity(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Perplexity per token: `predictions` are summed NLLs in nats, `references` the numbers of tokens."""
    _check(predictions, references)
    return perplexity_of(sum(predictions) / sum(references))


def _check(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references) or not len(references):
        raise FedspanError(
            f"{len(predictions)} predictions for {len(references)} references: expected as many, and at least one"
        )


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, accuracy),
        Metric("f1", True, f1),
        Metric("macro_f1", True, macro_f1),
        Metric("matthews", True, matthews),
        Metric("pearson", True, pearson),
        Metric("spearman", True, spearman),
        Metric("exact_match", True, exact_match),
        Metric("token_f1", True, token_f1),
        Metric("rouge_l", True, rouge_l),
        Metric("perplexity", False, perplexity),
    )
}

GLUE_METRICS: Mapping[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""The official metrics of each GLUE task (Wang et al. 2018, arXiv:1804.07461)."""

GLUE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""The text columns of each GLUE task on the hub."""

GLUE_NUM_LABELS: Mapping[str, int] = {name: {"mnli": 3, "stsb": 1}.get(name, 2) for name in GLUE_METRICS}
"""Number of classes; 1 is a regression."""
