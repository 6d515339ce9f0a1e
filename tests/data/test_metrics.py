"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspan.data.metrics import GLUE_COLUMNS, GLUE_METRICS, GLUE_NUM_LABELS, METRICS, normalise


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("accuracy", [0, 1, 2, 2], [0, 1, 1, 2], 0.75),
        # tp 2, fp 1, fn 1
        ("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2 * 2 / (2 * 2 + 1 + 1)),
        ("f1", [0, 0], [1, 0], 0.0),
        # per class: 0 -> 2/3, 1 -> 0, 2 -> 1
        ("macro_f1", [0, 0, 2], [0, 1, 2], (2 / 3 + 0 + 1) / 3),
        # tp 2, tn 1, fp 1, fn 1: (2·1 - 1·1) / √(3·3·2·2)
        ("matthews", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 1 / 6),
        ("matthews", [1, 1, 1], [1, 0, 1], 0.0),
        # deviations (-1, 0, 1) and (-1, -1, 2)
        ("pearson", [1.0, 2.0, 3.0], [1.0, 1.0, 4.0], 3 / math.sqrt(2 * 6)),
        ("pearson", [2.0, 2.0, 2.0], [1.0, 1.0, 4.0], 0.0),
        ("spearman", [1.0, 2.0, 30.0, 4.0], [1.0, 4.0, 9.0, 16.0], 1 - 6 * 2 / (4 * 15)),
        ("exact_match", [" Yes. ", "no", "a  b"], ["yes", "yes", "A b"], 2 / 3),
        ("token_f1", ["the cat sat", "x"], ["the cat", "y"], (2 * 2 / 5 + 0) / 2),
        ("token_f1", ["a a b"], ["a b b"], 2 * 2 / 6),
        ("token_f1", [""], [""], 1.0),
        # common subsequence "the cat mat": precision 3/4, recall 3/5
        ("rouge_l", ["the cat a mat"], ["the old cat ate mat"], 2 * 3 / 9),
        # stemming makes cats and cat, runs and running the same
        ("rouge_l", ["cats running", ""], ["cat runs", "dog"], 0.5),
        # 12 nats over 6 tokens, weighted by tokens and not by examples
        ("perplexity", [2.0, 10.0], [2, 4], math.exp(2.0)),
    ],
)
def test_hand_computed_values(name: str, predictions: list, references: list, expected: float) -> None:
    assert METRICS[name].score(predictions, references) == pytest.approx(expected, abs=1e-12)


HIGHER = [name for name, metric in METRICS.items() if metric.higher_is_better]
TEXT = {name for name, metric in METRICS.items() if metric.needs == "texts"}
SACREBLEU = {"bleu", "chrf"}
"""Of texts, in percent, and with a library that may not be installed."""


@pytest.mark.parametrize("name", HIGHER)
def test_a_perfect_prediction_scores_one(name: str) -> None:
    if name in SACREBLEU:
        pytest.importorskip("sacrebleu")
    references = ["one", "two words and two more", "3"] if name in TEXT else [0, 1, 1]
    given = [[1.0, 0.0], [0.0, 1.0], [0.2, 0.8]] if METRICS[name].needs == "probabilities" else references
    assert METRICS[name].score(given, references) == pytest.approx(100.0 if name in SACREBLEU else 1.0)


def test_only_errors_and_perplexity_fall() -> None:
    falling = [name for name, metric in METRICS.items() if not metric.higher_is_better]
    assert falling == ["calibration_error", "perplexity"]


@pytest.mark.parametrize("name", METRICS)
def test_unequal_and_empty_inputs_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        METRICS[name].score([1], [1, 0])
    with pytest.raises(ValueError, match="0 predictions for 0 references"):
        METRICS[name].score([], [])


def test_f1_refuses_more_than_two_classes() -> None:
    with pytest.raises(ValueError, match=r"label 2.*macro_f1"):
        METRICS["f1"].score([0, 2], [0, 1])


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=5))
def test_text_metrics_stay_between_0_and_1(pairs: list[tuple[str, str]]) -> None:
    predictions, references = ([pair[i] for pair in pairs] for i in (0, 1))
    for name in TEXT - SACREBLEU:
        assert 0.0 <= METRICS[name].score(predictions, references) <= 1.0 + 1e-12


@given(st.text(max_size=30))
def test_normalise_is_idempotent_and_ignores_case_and_outer_space(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f" {once}\n.") in (once, normalise(f"{once} ."))


def test_normalise_keeps_inner_punctuation_and_bare_punctuation() -> None:
    assert normalise('"It\'s 3.5, OK!"') == "it's 3.5, ok"
    assert normalise(" ?! ") == "?!"
    assert normalise("+") != normalise("-")


def test_perplexity_overflows_to_infinity() -> None:
    perplexity = METRICS["perplexity"].score
    assert perplexity([0.0], [1]) == 1.0
    assert perplexity([1e6], [1]) == math.inf


def test_the_glue_tables_speak_of_the_same_nine_tasks() -> None:
    assert set(GLUE_METRICS) == set(GLUE_COLUMNS) == set(GLUE_NUM_LABELS)
    assert len(GLUE_METRICS) == 9
    assert all(name in METRICS for names in GLUE_METRICS.values() for name in names)
    assert [task for task, num in GLUE_NUM_LABELS.items() if num != 2] == ["stsb", "mnli"]


def test_importing_metrics_imports_no_heavy_library() -> None:
    code = (
        "import sys, fedspan.data.metrics; print([m for m in ('sklearn', 'scipy', 'rouge_score', 'sacrebleu', 'nltk',"
        " 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
