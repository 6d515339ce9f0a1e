"""A metric is one entry of `METRICS`: nothing else has to know of it for a run to report it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import tiny

import fedspan
from fedspan.data.metrics import METRICS, Metric
from fedspan.support.errors import FedspanError

CASES = {"first_word": "llama", "mean_recall": "bert"}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The metrics of `own_metrics`, as after its import, for one test."""
    before = dict(METRICS)
    sys.modules.pop("own_metrics", None)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import_module("own_metrics")
    yield
    METRICS.clear()
    METRICS.update(before)


def settings(bases: dict[str, Path], texts: Path, instructions: Path, name: str, workers: int) -> fedspan.Config:
    base = CASES[name]
    data = instructions if tiny.KIND[base] == "instruction" else texts
    return tiny.config(
        bases[base],
        data,
        "fedit",
        data={"metric": name},
        federation={"rounds": 1, "ranks": 2},
        engine={"workers": workers},
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", CASES)
def test_a_metric_of_ones_own_is_reported_whoever_predicts(
    bases: dict[str, Path], texts: Path, instructions: Path, tmp_path: Path, name: str
) -> None:
    """In this process, and with two that were forked from it."""
    figures = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        result = fedspan.run(settings(bases, texts, instructions, name, workers), out)
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["metric"], summary["higher_is_better"]) == (name, True)
        assert 0 <= summary["federated"] <= 1
        assert summary["federated"] == summary["metrics"]["clients"][name]
        assert [record["eval"][name] for record in result.history] == [summary["metrics"]["server"][name]]
        figures.append(summary["metrics"])
    assert figures[0] == figures[1]


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_workers_need_not_know_the_metric(
    bases: dict[str, Path], texts: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New interpreters, which have never imported the module that registers it, predict; this process scores."""
    one = fedspan.run(settings(bases, texts, instructions, "first_word", 1), tmp_path / "one")
    monkeypatch.setattr("fedspan.client.executors.start_method", lambda device, threads: "spawn")
    two = fedspan.run(settings(bases, texts, instructions, "first_word", 2), tmp_path / "two")
    assert one.summary["metrics"] == two.summary["metrics"]


@pytest.mark.usefixtures("registered")
def test_a_metric_that_does_not_fit_is_refused_before_anything_trains(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = tiny.config(bases["bert"], texts, "fedit", data={"metric": "first_word"})
    fitting = "accuracy, macro_f1, matthews, .*calibration_error, mean_recall$"
    with pytest.raises(FedspanError, match=f"'first_word' does not apply to classification data; .* {fitting}"):
        fedspan.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_metric_of_the_loss_generates_no_text_and_falls(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every property of the entry is read: what it needs, and which way is better."""

    def nats(losses: list[float], counts: list[int]) -> float:
        return sum(losses) / sum(counts)

    monkeypatch.setitem(METRICS, "nats", Metric(nats, "losses", ("instruction",), higher_is_better=False))
    # Not by its dotted name, which is the function of that module.
    monkeypatch.setattr(sys.modules["fedspan.data.load"], "default_metrics", lambda kind, num_labels: ())
    monkeypatch.setattr("fedspan.client.evaluation.generate", None)
    config = tiny.config(bases["llama"], instructions, "fedit", data={"metric": "nats"}, federation={"rounds": 1})
    summary = fedspan.run(config, tmp_path / "run").summary
    assert summary["higher_is_better"] is False
    assert summary["federated"] == summary["metrics"]["clients"]["loss"]


def test_numbers_make_a_regression(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absolute_error(predictions: list[float], references: list[float]) -> float:
        return sum(abs(p - r) for p, r in zip(predictions, references, strict=True)) / len(references)

    own = Metric(absolute_error, "numbers", ("classification",), higher_is_better=False)
    monkeypatch.setitem(METRICS, "absolute_error", own)
    rows = [{"text": row["text"], "label": i % 3} for i, row in enumerate(tiny.words(24))]
    data = tiny.write_jsonl(tmp_path / "scores.jsonl", rows)
    config = tiny.config(bases["bert"], data, "fedit", data={"metric": "absolute_error"}, federation={"rounds": 1})
    summary = fedspan.run(config, tmp_path / "run").summary
    assert summary["metric"] == "absolute_error"
    assert set(summary["metrics"]["server"]) == {"loss", "absolute_error", "pearson", "spearman"}
    assert summary["metrics"]["server"]["absolute_error"] ** 2 <= summary["metrics"]["server"]["loss"] * (1 + 1e-5)
