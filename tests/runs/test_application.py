"""Trained models on new data: `fedspan evaluate` and `fedspan predict`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

import fedspan
from fedspan.cli.main import main
from fedspan.models.loading import seeded
from fedspan.support.errors import FedspanError

NAMED = {"x": "benign", "y": "malign", "z": "unclear"}


def run(base: Path, train: Path, test: Path, out: Path, method: str = "flora", **sections: Any) -> fedspan.Result:
    """A short federation whose test rows are a file."""
    return fedspan.run(
        tiny.config(
            base,
            train,
            method,
            data={"test": [str(test)], **sections.pop("data", {})},
            federation={"rounds": 1, "ranks": [2, 4, 4, 8]},
            evaluation={"base": False, "per_rank": False, "local": False, "max_new_tokens": 3},
            **sections,
        ),
        out,
    )


@pytest.fixture(scope="module")
def classified(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> fedspan.Result:
    folder = tmp_path_factory.mktemp("classified")
    rows = [row | {"label": NAMED[row["label"]], "case": i} for i, row in enumerate(tiny.words(48))]
    train, test = (
        tiny.write_jsonl(folder / f"{name}.jsonl", part) for name, part in (("a", rows[:32]), ("b", rows[32:]))
    )
    return run(bases["bert"], train, test, folder / "run", data={"metrics": ["auroc", "calibration_error", "macro_f1"]})


@pytest.fixture(scope="module")
def answered(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> fedspan.Result:
    folder = tmp_path_factory.mktemp("answered")
    rows = tiny.questions(24)
    train, test = (
        tiny.write_jsonl(folder / f"{name}.jsonl", part) for name, part in (("a", rows[:16]), ("b", rows[16:]))
    )
    return run(bases["llama"], train, test, folder / "run")


def test_figures_on_its_test_rows_are_those_of_its_summary(
    classified: fedspan.Result, answered: fedspan.Result
) -> None:
    """To the bit, whatever the method's readout; with the rows and the classes too."""
    for result in (classified, answered):
        found = fedspan.evaluate(result.out, [result.out.parent / "b.jsonl"])
        summary = result.summary
        assert found.metrics == summary["metrics"]["server"]
        assert (found.rows, found.classes) == (summary["rows"]["server"], summary["classes"])
    assert set(found.metrics) == {"loss", "rouge_l", "exact_match"}


def test_an_adapter_has_the_figures_of_its_run_to_rounding(
    classified: fedspan.Result, answered: fedspan.Result
) -> None:
    for result in (classified, answered):
        assert result.adapter is not None
        settings = ["data.max_length=48", "evaluation.max_new_tokens=3"]
        found = fedspan.evaluate(result.adapter, [result.out.parent / "b.jsonl"], settings=settings)
        assert found.metrics["loss"] == pytest.approx(result.summary["metrics"]["server"]["loss"], rel=1e-4)


def test_predictions_keep_the_rows_and_need_no_labels(classified: fedspan.Result, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (classified.out.parent / "b.jsonl").read_text().splitlines()]
    for row in lines[::2]:
        del row["label"]
    for row in lines[1::4]:
        row["label"] = None
    data = tiny.write_jsonl(tmp_path / "new.jsonl", lines)
    done = fedspan.predict(classified.out, [data], tmp_path / "out" / "p.jsonl")
    found = [json.loads(line) for line in done.out.read_text().splitlines()]
    assert done.rows == len(found) == len(lines)
    for row, own in zip(found, lines, strict=True):
        assert {name: row[name] for name in own} == own
        assert sum(row["probabilities"].values()) == pytest.approx(1.0)
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
    # As many of each class as the matrix of the run counts.
    classes = classified.summary["classes"]
    assert classes is not None
    columns = [sum(row[k] for row in classes["confusion"]) for k in range(3)]
    assert [sum(row["prediction"] == name for row in found) for name in classes["classes"]] == columns


def test_predictions_of_csv_are_csv(classified: fedspan.Result, tmp_path: Path) -> None:
    data = tmp_path / "new.csv"
    data.write_text('text,note\n"xx, x","a ""quoted"" note"\nyy,\n')
    done = fedspan.predict(classified.out, [data], tmp_path / "p.csv")
    rows = list(csv.DictReader(done.out.open(newline="")))
    assert list(rows[0]) == ["text", "note", "prediction", "probability"]
    assert [(row["text"], row["note"]) for row in rows] == [("xx, x", 'a "quoted" note'), ("yy", "")]
    assert all(row["prediction"] in NAMED.values() and 1 / 3 <= float(row["probability"]) <= 1 for row in rows)


@pytest.mark.parametrize("damage", ["{}", '{"metric": "accuracy", "data": []}', '{"metrics": {"server": null}}'])
def test_a_damaged_summary_is_named(classified: fedspan.Result, tmp_path: Path, damage: str) -> None:
    shutil.copytree(classified.out, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(damage)
    with pytest.raises(FedspanError, match=r"summary\.json is damaged, or of another version"):
        fedspan.evaluate(tmp_path / "run", [classified.out.parent / "b.jsonl"])


def test_a_number_that_is_missing_is_null_in_jsonl(classified: fedspan.Result, tmp_path: Path) -> None:
    """Parquet has NaN there, which standard JSON has not."""
    data = tmp_path / "new.parquet"
    pq.write_table(pa.table({"text": ["xx", "yy"], "age": [61.0, float("nan")], "at": [{"x": float("inf")}] * 2}), data)
    done = fedspan.predict(classified.out, [data], tmp_path / "p.jsonl")
    assert "NaN" not in done.out.read_text()
    rows = [json.loads(line) for line in done.out.read_text().splitlines()]
    assert [(row["age"], row["at"]) for row in rows] == [(61.0, {"x": None}), (None, {"x": None})]


def test_answers_are_those_that_the_run_was_scored_on(answered: fedspan.Result, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (answered.out.parent / "b.jsonl").read_text().splitlines()]
    data = tiny.write_jsonl(tmp_path / "q.jsonl", [{k: v for k, v in row.items() if k != "output"} for row in lines])
    done = fedspan.predict(answered.out, [data], tmp_path / "a.jsonl")
    found = [json.loads(line)["prediction"] for line in done.out.read_text().splitlines()]
    right = sum(fedspan_match(a, row["output"]) for a, row in zip(found, lines, strict=True)) / len(lines)
    assert right == answered.summary["metrics"]["server"]["exact_match"]


def fedspan_match(answer: str, wanted: str) -> bool:
    from fedspan.data.metrics import normalise

    return normalise(answer) == normalise(wanted)


def test_a_regression_and_full_weights(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": len(row["text"]) / 3} for row in tiny.words(32)]
    train, test = (
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:24]), ("b", rows[24:]))
    )
    result = run(bases["bert"], train, test, tmp_path / "run", "fedavg", data={"metrics": "pearson"})
    found = fedspan.evaluate(result.out, [test])
    assert found.metrics == result.summary["metrics"]["server"]
    assert found.classes is None
    done = fedspan.predict(result.out, [test], tmp_path / "p.jsonl")
    assert all(isinstance(json.loads(line)["prediction"], float) for line in done.out.read_text().splitlines())


def test_what_cannot_be_applied_is_refused_in_one_line(
    classified: fedspan.Result, bases: dict[str, Path], tmp_path: Path
) -> None:
    data = classified.out.parent / "b.jsonl"
    odd, taken = tmp_path / "odd.jsonl", tmp_path / "taken.jsonl"
    tiny.write_jsonl(odd, [{"text": "x", "label": "benigm"}])
    tiny.write_jsonl(taken, [{"text": "x", "prediction": "y"}])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(classified.out, unfinished)
    (unfinished / "summary.json").unlink()
    (tmp_path / "there.csv").write_text("a\n1\n")
    for call, message in (
        (lambda: fedspan.evaluate(tmp_path, [data]), "holds no run .* and no PEFT adapter"),
        (lambda: fedspan.evaluate(tmp_path / "no", [data]), "does not exist: expected the folder of a finished run or"),
        (lambda: fedspan.evaluate(unfinished, [data]), "is not finished"),
        (lambda: fedspan.evaluate(classified.out, [odd]), "'benigm'; did you mean 'benign'"),
        (lambda: fedspan.evaluate(classified.out, [taken]), "no column 'label'"),
        (lambda: fedspan.evaluate(classified.out, [tmp_path / "none.csv"]), "none.csv does not exist"),
        (lambda: fedspan.evaluate(classified.out, [data], settings=["seed=3"]), "expected a setting of data"),
        (lambda: fedspan.evaluate(classified.out, [data], settings=["data.metrics=f1"]), "does not apply"),
        (lambda: fedspan.predict(classified.out, [taken], tmp_path / "p.csv"), "a column 'prediction' already"),
        (lambda: fedspan.predict(classified.out, [data], tmp_path / "there.csv"), "exists: expected a new file"),
        (lambda: fedspan.predict(classified.out, [data], tmp_path / "p.xlsx"), r"ends in .jsonl or .csv"),
        (lambda: fedspan.predict(classified.out, [data], data, force=True), "one of the files of --data"),
    ):
        with pytest.raises(FedspanError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert (tmp_path / "there.csv").read_text() == "a\n1\n"


def test_a_folder_from_elsewhere_has_no_module_imported(classified: fedspan.Result, tmp_path: Path) -> None:
    """A metric that a run's settings name by its module is left out unless the user names it too."""
    folder = tmp_path / "run"
    shutil.copytree(classified.out, folder)
    config = (folder / "config.toml").read_text()
    assert '"auroc"' in config
    (folder / "config.toml").write_text(config.replace('"auroc"', '"evil_module:run"'))
    summary = json.loads((folder / "summary.json").read_text())
    summary["metric"] = "evil_module:run"
    (folder / "summary.json").write_text(json.dumps(summary))
    data = classified.out.parent / "b.jsonl"
    found = fedspan.evaluate(folder, [data])
    assert any("evil_module:run is left out" in note for note in found.notes)
    with pytest.raises(FedspanError, match="evil_module cannot be imported"):
        fedspan.evaluate(folder, [data], settings=["data.metrics=evil_module:run"])


def test_no_note_is_about_training_rows_which_there_are_none_of(classified: fedspan.Result) -> None:
    data = classified.out.parent / "b.jsonl"
    found = fedspan.evaluate(classified.out, [data], settings=["data.max_length=3"])
    assert [note for note in found.notes if "lost their end" in note] == [
        "of 16 rows, 16 texts lost their end (data.max_length = 3)"
    ]


def test_the_commands(classified: fedspan.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = classified.out.parent / "b.jsonl", tmp_path / "p.csv"
    assert main(["evaluate", str(classified.out), "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "auroc" in shown
    assert "16" in shown
    assert "as malign" in shown
    assert main(["evaluate", str(classified.out), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == classified.summary["metrics"]["server"]
    chosen = ["--json", "--set", "data.metrics=macro_f1"]
    assert main(["evaluate", str(classified.out), "--data", str(data), *chosen]) == 0
    own = {name: classified.summary["metrics"]["server"][name] for name in ("loss", "macro_f1")}
    assert json.loads(capsys.readouterr().out)["metrics"] == own
    command = ["predict", str(classified.out), "--data", str(data), "--out", str(out)]
    assert main(command) == 0
    assert "16 rows" in capsys.readouterr().out
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


@pytest.mark.parametrize("named", [True, False])
def test_a_base_whose_head_has_no_names_is_known_again(bases: dict[str, Path], tmp_path: Path, named: bool) -> None:
    """A run draws a new head for labels with names, and keeps the base's for label ids."""
    from transformers import AutoModelForSequenceClassification

    base = tmp_path / "base"
    shutil.copytree(bases["bert"], base)
    with seeded("head", 0):
        AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=3).save_pretrained(base)
    label = NAMED.get if named else list(NAMED).index
    rows = [row | {"label": label(row["label"])} for row in tiny.words(48)]
    train, test = (
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:32]), ("b", rows[32:]))
    )
    result = run(base, train, test, tmp_path / "run")
    assert any("a new head is drawn" in note for note in result.summary["notes"]) == named
    found = fedspan.evaluate(result.out, [test])
    assert found.metrics == result.summary["metrics"]["server"]
