"""The parts of a corpus: splits, limits, unseen values, and tasks by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    ANSWERS,
    REVIEWS,
    everything,
    fails,
    labelled,
    read,
    write,
    write_jsonl,
)

from fedspan.config import DataConfig
from fedspan.data import load
from fedspan.data.builtin.tasks import TASKS

# splits


def test_holdout_is_a_disjoint_draw_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    corpus = read(train=path, holdout=0.25)
    assert len(corpus.test) == 10
    assert len(everything(corpus)) == len(set(everything(corpus))) == 40
    assert everything(corpus) == everything(read(train=path, holdout=0.25))
    assert corpus.test.inputs == read(train=path, holdout=0.25).test.inputs
    assert corpus.test.inputs != read(seed=1, train=path, holdout=0.25).test.inputs
    for rows in (corpus.train, corpus.test):
        numbers = [int(target.split()[1]) for target in rows.targets]
        assert numbers == sorted(numbers), "the order of the file is kept"
    one = write_jsonl(tmp_path / "one.jsonl", ANSWERS[:1])
    fails("has 1 row: expected 2 or more to hold out", train=one)
    assert len(read(train=one, test=one).train) == 1


def test_limits_draw_a_subset_by_the_seed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    settings = {"train": path, "test": path, "unseen": path, "max_train": 7, "max_test": 5}
    corpus = read(**settings)
    assert corpus.unseen is not None
    assert (len(corpus.train), len(corpus.test), len(corpus.unseen)) == (7, 5, 5)
    assert set(corpus.train.targets) <= {row["output"] for row in ANSWERS}
    numbers = [int(target.split()[1]) for target in corpus.train.targets]
    assert numbers == sorted(set(numbers))
    assert corpus.train.targets == read(**settings).train.targets != read(seed=1, **settings).train.targets
    assert len(read(train=path, test=path, max_train=1000).train) == 40


def test_client_files_point_at_the_rows_of_each_file(tmp_path: Path) -> None:
    """Also after holding out, keeping values apart and limiting."""
    paths = [
        write_jsonl(tmp_path / f"{i}.jsonl", [{**row, "output": f"{i} {row['output']}"} for row in ANSWERS])
        for i in range(3)
    ]
    corpus = read(train=paths, unseen_values=["t2"], max_train=50)
    assert corpus.client_files is not None
    assert len(corpus.train) == 50
    assert np.array_equal(np.sort(np.concatenate(corpus.client_files)), np.arange(50))
    for number, rows in enumerate(corpus.client_files):
        assert {corpus.train.targets[i].split()[0] for i in rows} == {str(number)}


def test_unseen_values_are_never_trained_on(tmp_path: Path) -> None:
    """With test rows of the value those are the unseen data; otherwise all its rows are."""
    train = write_jsonl(tmp_path / "train.jsonl", ANSWERS)
    test = write_jsonl(tmp_path / "test.jsonl", [{**row, "output": "test"} for row in ANSWERS if row["task"] != "t3"])
    corpus = read(train=train, test=test, unseen_values=["t1", "t3"])
    assert set(corpus.train.fields) == {"t0", "t2"} == set(corpus.test.fields)
    assert corpus.unseen is not None
    found = list(zip(corpus.unseen.fields, corpus.unseen.targets, strict=True))
    assert found == [("t1", "test")] * 10 + [("t3", row["output"]) for row in ANSWERS if row["task"] == "t3"]
    held = read(train=train, unseen_values="t0")
    assert held.unseen is not None
    assert set(held.unseen.fields) == {"t0"}
    assert len(held.unseen) == 10
    assert "t0" not in {*held.train.fields, *held.test.fields}
    assert len(everything(held)) == 40


def test_unknown_unseen_values_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    fails("no row has the value 't9'; did you mean", train=path, unseen_values="t9")
    fails("leaves no training rows", train=path, unseen_values=["t0", "t1", "t2", "t3"])
    reviews = write_jsonl(tmp_path / "r.jsonl", REVIEWS)
    fails("expected data.field_column", train=reviews, unseen_values="s1")


def test_the_metric_asked_for_comes_first(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    assert read(train=path, metrics="exact_match").metrics == ("exact_match", "rouge_l")
    assert read(train=path, metrics="perplexity").metrics[0] == "perplexity"
    fitting = "exact_match, token_f1, rouge_l, bleu, chrf, perplexity$"
    fails(f"'accuracy' does not apply to instruction data; expected one of {fitting}", train=path, metrics="accuracy")
    fails("'rouge_1': no such metric for instruction data; did you mean 'rouge_l'", train=path, metrics="rouge_1")
    three = labelled(tmp_path, [0, 1, 2])
    fitting = (
        "accuracy, macro_f1, matthews, balanced_accuracy, macro_precision, macro_recall, auroc, average_precision, "
    )
    fitting += "calibration_error$"
    fails(f"'f1' does not apply to classification data with 3 labels; .* {fitting}", train=three, metrics="f1")
    fails(f"'rouge_l' does not apply to classification data; expected one of {fitting}", train=three, metrics="rouge_l")
    anyhow = ", ".join(sorted(fitting.removesuffix("$").split(", ")))
    fails(f"'mse': no such metric for image data; expected one of {anyhow}$", task="builtin:digits", metrics="mse")
    fails(f"'pearson' does not apply to image data; .* {fitting}", task="builtin:digits", metrics="pearson")


# tasks by name


def test_the_builtin_tasks_keep_seen_and_unseen_apart() -> None:
    corpus = load(DataConfig(), 0)
    seen = {name for name, task in TASKS.items() if task.seen}
    assert set(corpus.train.fields) == set(corpus.test.fields) == seen
    assert corpus.unseen is not None
    assert set(corpus.unseen.fields) == set(TASKS) - seen
    trained = set(zip(corpus.train.inputs, corpus.train.fields, strict=True))
    assert not trained & set(zip(corpus.test.inputs, corpus.test.fields, strict=True))
    assert corpus.metrics == ("exact_match", "rouge_l")
    moved = load(DataConfig(unseen_values=("parity",)), 0)
    assert moved.unseen is not None
    assert "parity" in moved.unseen.fields
    assert "parity" not in {*moved.train.fields, *moved.test.fields}


def test_the_builtin_digits() -> None:
    corpus = load(DataConfig(task="builtin:digits"), 0)
    assert (corpus.kind, corpus.num_labels, corpus.metrics) == ("image", 10, ("accuracy",))
    assert set(corpus.train.targets) == set(range(10))
    assert np.asarray(corpus.train.inputs).dtype == np.uint8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "tasks"}, "expected builtin:tasks, builtin:digits, glue/NAME, hub:NAME or files"),
        ({"task": "builtin:task"}, "expected builtin:tasks"),
        ({"task": "glue/sst3"}, "not a GLUE task; did you mean 'sst2'"),
        ({"task": "files"}, "no data.train: expected at least one file"),
        ({"task": "builtin:tasks", "train": "a.jsonl"}, "expected data.task = 'files'"),
        ({"task": "builtin:tasks", "field_column": "category"}, "only the field 'task'"),
        ({"task": "builtin:digits", "field_column": "site"}, "no field"),
        ({"task": "builtin:digits", "kind": "instruction"}, "builtin:digits is image data"),
        ({"task": "builtin:tasks", "unseen_values": "adding"}, "no row has the value 'adding'"),
        ({"task": "hub:x", "unseen": "a.jsonl"}, "needs data.task = 'files'"),
        ({"task": "hub:x", "train": ["a", "b"]}, "the name of one split"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], message: str) -> None:
    fails(message, **settings)


def test_a_negative_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="seed = -1"):
        load(DataConfig(), -1)


def test_glue_reads_local_copies_with_its_own_columns_and_metrics(tmp_path: Path) -> None:
    rows = [{"question1": f"a{i}", "question2": f"b{i}", "label": i % 2} for i in range(10)]
    path = write_jsonl(tmp_path / "qqp.jsonl", rows)
    corpus = read(task="glue/qqp", train=path, test=path)
    assert corpus.train.inputs[3] == ("a3", "b3")
    assert (corpus.metrics, corpus.num_labels) == (("accuracy", "f1"), 2)
    assert read(task="glue/qqp", train=path, metrics="f1").metrics == ("f1", "accuracy")
    scores = [{"sentence1": "a", "sentence2": "b", "label": i / 2} for i in range(10)]
    similar = read(task="glue/stsb", train=write_jsonl(tmp_path / "stsb.jsonl", scores))
    assert (similar.metrics, similar.num_labels) == (("pearson", "spearman"), 1)
    fails(
        "glue/mnli has 2 labels: expected 3",
        task="glue/mnli",
        train=path,
        text_columns=["question1", "question2"],
    )


# the hub: real runs of the library, on folders and offline


def hub_folder(tmp_path: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    folder = tmp_path / "repository"
    folder.mkdir()
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl", rows)
    return f"hub:{folder}"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_dataset_reads_like_files(tmp_path: Path) -> None:
    task = hub_folder(tmp_path, {"train": REVIEWS[:20], "test": REVIEWS[20:25], "validation": REVIEWS[25:]})
    corpus = read(task=task, field_column="site")
    assert [row[0] for row in corpus.train.inputs] == [row["text"] for row in REVIEWS[:20]]
    assert corpus.test.targets == [row["label"] for row in REVIEWS[20:25]]
    assert corpus.client_files is not None
    other = read(task=task, train="validation", test="train")
    assert (len(other.train), len(other.test)) == (5, 20)
    fails("no split 'dev' .data.test.: expected one of", task=task, test="dev")


def test_class_names_of_a_hub_dataset_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"])
    )
    asked: list[Any] = []

    def load_dataset(*arguments: Any) -> Any:
        asked.append(arguments)
        split = datasets.Dataset.from_dict({"sentence": ["a", "b"] * 4, "label": [1, 0] * 4}, features=features)
        return datasets.DatasetDict(train=split, validation=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = read(task="glue/sst2")
    assert asked == [("nyu-mll/glue", "sst2")]
    assert corpus.label_names == ("negative", "positive")
    assert (corpus.train.targets, len(corpus.test)) == ([1, 0] * 4, 8)


def test_offline_names_are_one_line_that_says_what_to_do() -> None:
    code = (
        "from fedspan.config import DataConfig\nfrom fedspan.data import load\n"
        "for task in ('glue/sst2', 'hub:no/such'):\n"
        "    try: load(DataConfig(task=task), 0)\n    except ValueError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for name, line in zip((r"nyu-mll/glue \(sst2\)", "no/such"), done.stdout.splitlines(), strict=True):
        expected = f"dataset {name} could not be read: .*local files: data.train and data.test"
        assert re.fullmatch(expected, line)


def test_without_the_extra_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", REVIEWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(r"pip install 'fedspan\[hub\]'", task="glue/sst2")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(r"pip install 'fedspan\[hub\]'", train=path)


def test_reading_data_imports_no_heavy_library() -> None:
    code = (
        "import sys; from fedspan.config import DataConfig; from fedspan.data import load;"
        "load(DataConfig(), 0);"
        "print([m for m in ('datasets', 'pandas', 'pyarrow', 'transformers', 'PIL', 'sklearn')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
