"""Metrics of classes and of their probabilities, BLEU and chrF, against their reference libraries."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from fedspan.data.class_metrics import BINS, class_report
from fedspan.data.metrics import METRICS, check_metric, register_own
from fedspan.support.errors import FedspanError


@st.composite
def classified(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, some of them equal, and class ids of which some may not occur."""
    count, classes = draw(st.integers(1, 30)), draw(st.integers(2, 4))
    numbers = np.random.default_rng(draw(st.integers(0, 10**6)))
    logits = numbers.integers(-2, 3, (count, classes)) / draw(st.sampled_from([1, 3]))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return shares, numbers.integers(0, draw(st.integers(1, classes)), count)


def value(name: str, given: object, wanted: object) -> float:
    """The metric's value; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return METRICS[name].value(np.asarray(given).tolist(), np.asarray(wanted).tolist())


def same(found: float, expected: float) -> None:
    assert (math.isnan(found) and math.isnan(expected)) or found == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(classified())
def test_areas_are_scikit_learns(case: tuple[np.ndarray, np.ndarray]) -> None:
    shares, labels = case
    for name, score in (("auroc", reference.roc_auc_score), ("average_precision", reference.average_precision_score)):
        columns = [1] if shares.shape[1] == 2 else range(shares.shape[1])
        known = [score(labels == k, shares[:, k]) for k in columns if 0 < (labels == k).sum() < len(labels)]
        same(value(name, shares, labels), float(np.mean(known)) if known else math.nan)


@settings(max_examples=60, deadline=None)
@given(classified())
def test_an_auroc_of_several_classes_that_all_occur_is_that_of_one_against_the_rest(
    case: tuple[np.ndarray, np.ndarray],
) -> None:
    shares, labels = case
    if shares.shape[1] > 2 and len(set(labels.tolist())) == shares.shape[1]:
        same(value("auroc", shares, labels), reference.roc_auc_score(labels, shares, multi_class="ovr"))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(classified())
def test_scores_of_predicted_classes_are_scikit_learns(case: tuple[np.ndarray, np.ndarray]) -> None:
    shares, labels = case
    given = shares.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(value("balanced_accuracy", given, labels), reference.balanced_accuracy_score(labels, given))
        for name in ("precision", "recall"):
            expected = getattr(reference, f"{name}_score")(labels, given, average="macro", zero_division=0)
            same(value(f"macro_{name}", given, labels), expected)
            per_class = getattr(reference, f"{name}_score")(
                labels, given, labels=range(shares.shape[1]), average=None, zero_division=np.nan
            )
            names = [str(k) for k in range(shares.shape[1])]
            report = class_report(given.tolist(), labels.tolist(), names)
            found = [math.nan if x is None else x for x in dict(report)[name]]
            np.testing.assert_allclose(found, per_class)
    assert report["confusion"] == reference.confusion_matrix(labels, given, labels=range(len(names))).tolist()
    assert report["rows"] == np.bincount(labels, minlength=len(names)).tolist()


@settings(max_examples=100, deadline=None)
@given(classified())
def test_sensitivity_and_specificity_are_the_recalls_of_two_classes(case: tuple[np.ndarray, np.ndarray]) -> None:
    given, labels = case[0].argmax(axis=1) % 2, case[1] % 2
    for name, label in (("sensitivity", 1), ("specificity", 0)):
        expected = reference.recall_score(labels, given, pos_label=label, zero_division=np.nan)
        same(value(name, given, labels), float(expected))


@settings(max_examples=150, deadline=None)
@given(classified())
def test_the_calibration_error_is_that_of_scikit_learns_curve(case: tuple[np.ndarray, np.ndarray]) -> None:
    shares, labels = case
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == labels
    true, stated = calibration_curve(right, confidence, n_bins=BINS)
    counts = np.unique(np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence), return_counts=True)[1]
    same(value("calibration_error", shares, labels), float((counts * np.abs(true - stated)).sum() / len(labels)))


def test_a_calibration_error_by_hand() -> None:
    # Confidence 0.9 twice, right once: a gap of 0.4; 0.6 twice, right twice: a gap of 0.4 the other way.
    shares, labels = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]], [0, 1, 1, 1]
    assert value("calibration_error", shares, labels) == pytest.approx(0.4)


def test_what_is_not_determined_is_not_defined() -> None:
    """Neither a warning nor an error: NaN, which a summary shows as a dash."""
    for name, metric in METRICS.items():
        assert math.isnan(metric.value([], [])), name
    one_class = [[0.2, 0.8], [0.7, 0.3]]
    assert math.isnan(value("auroc", one_class, [1, 1]))
    assert math.isnan(value("average_precision", one_class, [0, 0]))
    assert math.isnan(value("auroc", [[math.nan, 0.5], [0.5, 0.5]], [0, 1]))
    assert math.isnan(value("calibration_error", [[math.nan, math.nan]], [0]))
    assert math.isnan(value("pearson", [1.0, math.inf, 2.0], [1.0, 2.0, 3.0]))
    assert math.isnan(value("sensitivity", [0, 1], [0, 0]))
    assert value("balanced_accuracy", [0, 1], [0, 0]) == 0.5
    report = class_report([0, 0], [0, 0], ["a", "b"])
    assert (report["precision"], report["recall"]) == ([1.0, None], [1.0, None])


WORDS = st.text(alphabet="ab cd.,é", max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]]) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    texts, wanted = [p for p, _ in pairs], [r for _, r in pairs]
    assert METRICS["bleu"].value(texts, wanted) == sacrebleu.corpus_bleu(texts, [wanted]).score
    assert METRICS["chrf"].value(texts, wanted) == sacrebleu.corpus_chrf(texts, [wanted]).score


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedspan.data.translation_metrics.find_spec", lambda name: None)
    with pytest.raises(FedspanError, match=r"^data.metrics = 'bleu' needs sacrebleu.*pip install 'fedspan\[text\]'$"):
        check_metric("bleu", "instruction", 0)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the user's own."""
    module = ModuleType("ward_metrics")
    monkeypatch.setitem(sys.modules, "ward_metrics", module)
    for name in ("ward_metrics:missed", "ward_metrics:broken", "ward_metrics:odd"):
        monkeypatch.delitem(METRICS, name, raising=False)
        monkeypatch.setitem(METRICS, name, METRICS["accuracy"])  # so that it is removed again
    return module


def test_a_function_of_ones_own_is_a_metric(own: ModuleType) -> None:
    def missed(probabilities: list[list[float]], references: list[int]) -> float:
        return sum(p[r] < 0.5 for p, r in zip(probabilities, references, strict=True))

    vars(missed).update(needs="probabilities", higher_is_better=False)
    vars(own)["missed"] = missed
    register_own(["ward_metrics:missed"], "classification")
    metric = METRICS["ward_metrics:missed"]
    assert (metric.needs, metric.higher_is_better) == ("probabilities", False)
    assert metric.value([[0.9, 0.1], [0.8, 0.2]], [0, 1]) == 1.0


def test_its_failures_are_one_line(own: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(own).update(broken=lambda predictions, references: 1 / 0, odd=lambda predictions, references: "much")
    register_own(["ward_metrics:broken", "ward_metrics:odd"], "instruction")
    with pytest.raises(FedspanError, match=r"'ward_metrics:broken' failed: ZeroDivisionError: division by zero$"):
        METRICS["ward_metrics:broken"].value(["a"], ["b"])
    with pytest.raises(FedspanError, match=r"'ward_metrics:odd' returned 'much': expected a number$"):
        METRICS["ward_metrics:odd"].value(["a"], ["b"])
    (tmp_path / "fails_on_import.py").write_text("raise ValueError('two\\nlines')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("fails_on_import:f", r"cannot be imported \(ValueError: two lines\)"),
        ("ward_metrics:absent", "has no function 'absent'"),
        ("ward_metrics:", "expected module:function"),
        ("../evil:f", "expected module:function"),
    ):
        with pytest.raises(FedspanError, match=message) as caught:
            register_own([name], "instruction")
        assert "\n" not in str(caught.value)
