"""Metrics: thin wrappers of scikit-learn, SciPy, rouge-score and sacrebleu, and a few text metrics written here.

A metric is one function and its line in :data:`METRICS`; nothing else in the package knows its name. A function takes
all predictions and references at once and returns one float, NaN where they do not determine it. A function of your own
is named in the settings as ``module:function`` (:mod:`fedspan.data.own_metrics`). To runs that are started from Python
it can also be added by registering it before the run, and naming it in ``data.metrics``::

    from fedspan.data.metrics import METRICS, Metric

    def first_word(predictions, references):
        pairs = zip(predictions, references, strict=True)
        return sum(p.split()[:1] == r.split()[:1] for p, r in pairs) / len(references)

    METRICS["first_word"] = Metric(first_word, needs="texts", kinds=("instruction",))
    fedspan.run(fedspan.load_config(overrides=["data.metrics=first_word"]))

Worker processes need no registration: they predict, and the process that started the run scores. Every *process* that
reads the settings does need it: one that resumes the run, and a real site whose settings name the metric.

Nothing heavy is imported before the first call that needs it.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedspan.data.class_metrics import (
    auroc,
    average_precision,
    balanced_accuracy,
    calibration_error,
    macro_precision,
    macro_recall,
    sensitivity,
    specificity,
)
from fedspan.data.own_metrics import guarded, is_own, load_function
from fedspan.data.rows import Kind
from fedspan.data.score_inputs import all_finite
from fedspan.data.score_inputs import check_pairs as _check
from fedspan.data.translation_metrics import bleu, check_installed, chrf
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

Score = Callable[[Sequence[Any], Sequence[Any]], float]
Needs = Literal["labels", "probabilities", "numbers", "texts", "losses"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A score, and all that the rest of the package has to know of it.

    Attributes
    ----------
    score
        Function of ``(predictions, references)``, sequences of equal length with at least one entry.
    needs
        The form of predictions and references. ``labels``: class ids, one per example. ``probabilities``: of each
        example those of all classes, against class ids. ``numbers``: floats, one per example; in ``data.metrics`` it
        makes the labels of a classification a regression. ``texts``: the text that
        the model generates after each prompt, and the answer. ``losses``: per batch, the summed loss in nats, and
        the number of answer tokens (or examples) that it was summed over; no text is generated for it.
    kinds
        The kinds of data that it applies to.
    higher_is_better
        The direction in which it improves.
    num_labels
        The only number of classes that it is defined for; None for any.
    """

    score: Score
    needs: Needs
    kinds: tuple[Kind, ...]
    higher_is_better: bool = True
    num_labels: int | None = None

    def value(self, predictions: Sequence[Any], references: Sequence[Any]) -> float:
        """Return the score; NaN, which is "not defined", without examples and for predictions that are not finite.

        Raises
        ------
        ValueError
            For predictions and references of different numbers.
        """
        if len(predictions) != len(references):
            _check(predictions, references)
        # The mean loss of a model that has diverged is no number either, and perplexity says so by itself.
        if not len(references) or (self.needs != "losses" and not all_finite(predictions)):
            return math.nan
        return float(self.score(predictions, references))

    def applies_to(self, kind: Kind, num_labels: int) -> bool:
        """Return whether it is defined for data of this kind with this number of labels (1: a regression)."""
        if self.needs in ("labels", "probabilities", "numbers") and (self.needs == "numbers") != (num_labels == 1):
            return False
        return kind in self.kinds and self.num_labels in (None, num_labels)


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Return the share of predictions that equal their reference."""
    _check(predictions, references)
    right = sum(bool(p == r) for p, r in zip(predictions, references, strict=True))
    return right / len(references)


def f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the F1 of class 1 against class 0, as GLUE reports it; 0 without a true positive.

    Raises
    ------
    ValueError
        For labels other than 0 and 1.
    """
    _check(predictions, references)
    others = {*predictions, *references} - {0, 1}
    if others:
        raise ValueError(f"f1 got the label {min(others)}: expected 0 and 1 (more classes: macro_f1)")
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0.0))


def macro_f1(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the unweighted mean of the F1 of every class that occurs."""
    _check(predictions, references)
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))


def matthews(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Return the Matthews correlation (Matthews 1975); 0 when either side has a single class."""
    _check(predictions, references)
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return the linear correlation; 0 when either side is constant, where it is undefined."""
    return _correlation("pearsonr", predictions, references)


def spearman(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Return the rank correlation with average ranks for ties; 0 when either side is constant."""
    return _correlation("spearmanr", predictions, references)


def _correlation(name: str, predictions: Sequence[float], references: Sequence[float]) -> float:
    _check(predictions, references)
    if len(set(predictions)) == 1 or len(set(references)) == 1:
        return 0.0
    from scipy import stats

    return float(getattr(stats, name)(predictions, references).statistic)


def normalise(text: str) -> str:
    """Return `text` in lower case, with single spaces and no punctuation at either end (unless that is all it is)."""
    plain = " ".join(text.lower().split())
    return plain.strip(string.punctuation + " ") or plain


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that equal their reference after :func:`normalise`."""
    _check(predictions, references)
    return accuracy([normalise(text) for text in predictions], [normalise(text) for text in references])


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the bags of words (normalised, split at spaces); two empty texts count as 1."""
    _check(predictions, references)
    return sum(map(_word_f1, predictions, references)) / len(references)


def _word_f1(prediction: str, reference: str) -> float:
    given, wanted = Counter(normalise(prediction).split()), Counter(normalise(reference).split())
    total = given.total() + wanted.total()
    return 2 * (given & wanted).total() / total if total else 1.0


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure in [0, 1], with Porter stemming as Super-NaturalInstructions scores it.

    Sources: Lin 2004; Wang et al. 2022 (arXiv:2204.07705).
    """
    _check(predictions, references)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    return sum(float(scorer.score(target, text)["rougeL"].fmeasure) for target, text in pairs) / len(references)


def perplexity(losses: Sequence[float], counts: Sequence[int]) -> float:
    """Return exp of the mean negative log-likelihood per token, from sums in nats and the numbers of tokens.

    It is infinite where that overflows, as for a model that has diverged.
    """
    _check(losses, counts)
    try:
        return math.exp(sum(losses) / sum(counts))
    except OverflowError:
        return math.inf


_LABELLED: tuple[Kind, ...] = ("classification", "image")
_INSTRUCTION: tuple[Kind, ...] = ("instruction",)

METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, "labels", _LABELLED),
    "f1": Metric(f1, "labels", _LABELLED, num_labels=2),
    "macro_f1": Metric(macro_f1, "labels", _LABELLED),
    "matthews": Metric(matthews, "labels", _LABELLED),
    "balanced_accuracy": Metric(balanced_accuracy, "labels", _LABELLED),
    "macro_precision": Metric(macro_precision, "labels", _LABELLED),
    "macro_recall": Metric(macro_recall, "labels", _LABELLED),
    "sensitivity": Metric(sensitivity, "labels", _LABELLED, num_labels=2),
    "specificity": Metric(specificity, "labels", _LABELLED, num_labels=2),
    "auroc": Metric(auroc, "probabilities", _LABELLED),
    "average_precision": Metric(average_precision, "probabilities", _LABELLED),
    "calibration_error": Metric(calibration_error, "probabilities", _LABELLED, higher_is_better=False),
    "pearson": Metric(pearson, "numbers", ("classification",)),
    "spearman": Metric(spearman, "numbers", ("classification",)),
    "exact_match": Metric(exact_match, "texts", _INSTRUCTION),
    "token_f1": Metric(token_f1, "texts", _INSTRUCTION),
    "rouge_l": Metric(rouge_l, "texts", _INSTRUCTION),
    "bleu": Metric(bleu, "texts", _INSTRUCTION),
    "chrf": Metric(chrf, "texts", _INSTRUCTION),
    "perplexity": Metric(perplexity, "losses", _INSTRUCTION, higher_is_better=False),
}
"""Every metric by the name that settings and results use."""


def register_own(names: Sequence[str], kind: Kind) -> None:
    """Import and register the functions among these that are named as ``module:function``.

    Raises
    ------
    FedspanError
        For one that cannot be imported, or says nonsense of itself.
    """
    for name in filter(is_own, names):
        function = load_function(name)
        needs: Any = getattr(function, "needs", "texts" if kind == "instruction" else "labels")
        if needs not in get_args(Needs):
            known = ", ".join(get_args(Needs))
            raise FedspanError(f"data.metrics = {name!r}: needs = {needs!r}; expected one of {known}")
        higher = bool(getattr(function, "higher_is_better", True))
        METRICS[name] = Metric(guarded(name, function), needs, get_args(Kind), higher_is_better=higher)


def check_metric(name: str, kind: Kind, num_labels: int) -> None:
    """Check that the metric of this name applies to a run's data, and that its library is installed.

    Raises
    ------
    FedspanError
        For an unknown metric, or one that does not fit the data; it names those that do.
    """
    fitting = [other for other, metric in METRICS.items() if metric.applies_to(kind, num_labels)]
    if name not in METRICS:
        raise FedspanError(f"data.metrics = {name!r}: no such metric for {kind} data{nearest(name, fitting)}")
    if name not in fitting:
        size = "" if kind not in METRICS[name].kinds else f" with {num_labels} labels"
        raise FedspanError(
            f"data.metrics = {name!r} does not apply to {kind} data{size}; expected one of {', '.join(fitting)}"
        )
    if name in ("bleu", "chrf"):
        check_installed(name)


def is_regression(metrics: Sequence[str], kind: Kind) -> bool:
    """Return whether these metrics, as ``data.metrics``, make the labels of such data plain numbers."""
    known = [METRICS[name] for name in metrics if name in METRICS]
    return any(metric.needs == "numbers" and kind in metric.kinds for metric in known)


def default_metrics(kind: Kind, num_labels: int) -> tuple[str, ...]:
    """Return the metrics of data that settings and source name none for; one label is a regression."""
    if kind == "instruction":
        return ("rouge_l", "exact_match")
    return ("pearson", "spearman") if num_labels == 1 else ("accuracy",)


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
