"""The best round by validation data, early stopping, and evaluation by time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny

import fedspan
from fedspan.config import DataConfig, from_mapping
from fedspan.data import load
from fedspan.federation.requirements import chosen
from fedspan.runs.best import best_record, best_round, is_spent
from fedspan.support.errors import FedspanError


def records(*values: float | None) -> list[dict[str, Any]]:
    """One record per round; None: a round that is not evaluated."""
    figures = [None if v is None else {"accuracy": v, "perplexity": v} for v in values]
    return [{"round_num": i, "validation": own, "eval": own} for i, own in enumerate(figures, 1)]


@pytest.mark.parametrize(
    ("values", "highest", "lowest"),
    [
        ([0.1, 0.3, 0.2], 2, 1),
        ([0.0, 0.0, 0.0], 1, 1),
        ([None, 0.2, None, 0.2, 0.4, 0.1], 5, 6),
        ([math.nan, 0.2, math.nan], 2, 2),
        ([-1.0, math.nan, -0.5], 3, 1),
        ([None, math.nan], None, None),
        ([], None, None),
    ],
)
def test_the_best_round_is_the_first_of_the_best(
    values: list[float | None], highest: int | None, lowest: int | None
) -> None:
    for metric, expected in (("accuracy", highest), ("perplexity", lowest)):
        best = best_record(records(*values), metric)
        assert (None if best is None else best["round_num"]) == expected
        entry = best_round(records(*values), metric, 7)
        assert (None if entry is None else (entry["round_num"], entry["rows"])) == (expected and (expected, 7))


def test_patience_counts_evaluations_without_a_better_one() -> None:
    history = records(0.1, None, 0.3, 0.3, None, 0.2)
    assert not is_spent(history, "accuracy", None)
    assert not is_spent(history, "accuracy", 3)
    assert is_spent(history, "accuracy", 2)
    assert [is_spent(history[:n], "accuracy", 2) for n in range(7)] == [False] * 6 + [True]
    assert is_spent(records(math.nan, math.nan), "accuracy", 2)


def test_validation_rows_are_training_rows_that_nobody_trains_on(texts: Path, tmp_path: Path) -> None:
    rows = [{"text": f"number {i}", "label": "ab"[i % 2]} for i in range(60)]
    files = [str(tiny.write_jsonl(tmp_path / f"{k}.jsonl", rows[30 * k : 30 * (k + 1)])) for k in range(2)]

    def corpus(share: float) -> Any:
        return load(DataConfig(task="files", train=files, holdout=0.2, validation=share), 1)

    plain, split = corpus(0.0), corpus(0.25)
    assert plain.validation is None
    assert split.test.inputs[:] == plain.test.inputs[:]
    assert len(split.validation) == round(0.25 * len(plain.train))
    parts = [set(map(tuple, part.inputs)) for part in (split.train, split.validation, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    # Every client still has the rows of its own file.
    for k, own in enumerate(split.client_files):
        assert {int(split.train.inputs[i][0].split()[1]) // 30 for i in own} == {k}
    assert sum(map(len, split.client_files)) == len(split.train)


def settings(base: Path, data: Path, **changes: Any) -> fedspan.Config:
    """A federation whose rounds change nothing that a metric would show."""
    evaluation = {"base": False, "per_rank": False, "patience": 2, **changes.pop("evaluation", {})}
    return tiny.config(
        base,
        data,
        "flora",
        data={"validation": 0.25, "metrics": "accuracy"},
        local={"learning_rate": 1e-9, "steps": 1},
        federation={"rounds": 6, **changes},
        evaluation=evaluation,
    )


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_run_that_no_longer_improves_ends_and_keeps_its_best_round(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts)
    straight = fedspan.run(config, tmp_path / "straight")
    summary = straight.summary
    assert (summary["totals"]["rounds"], summary["stopped_early"]) == (3, True)
    best = summary["best"]
    assert best is not None
    assert (best["round_num"], best["rows"]) == (1, summary["data"]["rows"]["validation"])
    assert best["validation"] == straight.history[0]["validation"]

    def stop(event: Any) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedspan.run(config, tmp_path / "stopped", stop)
    resumed = fedspan.resume(tmp_path / "stopped")
    again = fedspan.resume(tmp_path / "stopped")
    for other in (resumed, again):
        assert other.summary["best"] == best
        assert other.summary["metrics"] == summary["metrics"]
        for name in ("adapter", "adapter-best"):
            assert weights(other.out / name) == weights(straight.out / name)
    first = fedspan.run(settings(bases["bert"], texts, rounds=1), tmp_path / "first")
    assert weights(first.out / "adapter") == weights(straight.out / "adapter-best") != weights(straight.out / "adapter")
    assert json.loads((straight.out / "summary.json").read_text())["best"] == best


def test_evaluation_by_time_leaves_rounds_out(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    evaluation = {"every_seconds": 1e6, "patience": None}
    run = fedspan.run(settings(bases["bert"], texts, rounds=3, evaluation=evaluation), tmp_path / "run")
    assert [record["eval"] is None for record in run.history] == [True, True, False]
    assert [record["eval_rows"] for record in run.history[:2]] == [0, 0]
    assert run.history[2]["eval_rows"] == run.summary["data"]["rows"]["test"]


def test_patience_without_what_it_needs_is_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    with pytest.raises(FedspanError, match=r"evaluation.patience = 3 needs data.validation"):
        chosen(from_mapping({"evaluation": {"patience": 3}}))
    with pytest.raises(FedspanError, match="a clock would decide"):
        chosen(from_mapping({"evaluation": {"patience": 3, "every_seconds": 5.0}, "data": {"validation": 0.1}}))
    config = tiny.config(bases["bert"], texts, "fedsa_lora", data={"validation": 0.2}, evaluation={"patience": 1})
    with pytest.raises(FedspanError, match=r"evaluation.patience = 1: the clients of fedsa_lora .* expected"):
        fedspan.run(config, tmp_path / "run")


def test_a_personalised_run_says_that_validation_rows_are_not_used(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """They are no training rows either, so the same rows train every method of a comparison."""
    config = tiny.config(
        bases["bert"], texts, "fedsa_lora", data={"validation": 0.25}, federation={"rounds": 1},
        evaluation={"base": False},
    )  # fmt: skip
    result = fedspan.run(config, tmp_path / "run")
    (line,) = [note for note in result.summary["notes"] if "data.validation" in note]
    rows = result.summary["data"]["rows"]["validation"]
    assert line.startswith(f"the {rows} rows of data.validation are not used: each client of fedsa_lora")
    assert result.summary["best"] is None
