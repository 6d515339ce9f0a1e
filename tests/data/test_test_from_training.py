"""`data.test_from_training` evaluates on training rows, and leaves the test rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedspan.config import load
from fedspan.data import load as load_data
from fedspan.data.rows import Corpus, Rows
from fedspan.data.splits import evaluated_on_training
from fedspan.support.errors import FedspanError


def write(path: Path, start: int, count: int) -> str:
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_share_is_of_the_training_rows_and_the_others_are_not_read(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", 100 * i, 30) for i, name in enumerate(("a", "b", "test", "unseen"))]
    words = ["data.task=files", f"data.train={json.dumps(files[:2])}", f"data.test={files[2]}"]
    config = load(None, [*words, f"data.unseen={files[3]}", "data.test_from_training=0.2"])
    plain = load(None, words)
    corpus, whole = load_data(config.data, 5), load_data(plain.data, 5)
    train, test = {*corpus.train.inputs}, {*corpus.test.inputs}
    assert (len(train), len(test)) == (48, 12)
    assert train | test == {*whole.train.inputs}
    assert not test & {*whole.test.inputs}
    assert corpus.unseen is None
    assert corpus.client_files is not None
    assert corpus.client_tests is not None
    for file, (own, tested) in enumerate(zip(corpus.client_files, corpus.client_tests, strict=True)):
        names = [corpus.train.inputs[i][0] for i in own] + [corpus.test.inputs[i][0] for i in tested]
        assert sorted(names) == sorted(f"row {100 * file + i}" for i in range(30))
    again = load_data(config.data, 5)
    assert {*again.test.inputs} == test
    assert {*load_data(config.data, 6).test.inputs} != test


@pytest.mark.parametrize("task", ["builtin:tasks", "builtin:digits"])
def test_embedded_tasks(task: str) -> None:
    config = load(None, [f"data.task={task}", "data.test_from_training=0.25"])
    corpus, whole = load_data(config.data, 1), load_data(load(None, [f"data.task={task}"]).data, 1)
    assert len(corpus.test) == round(0.25 * len(whole.train))
    assert len(corpus.train) + len(corpus.test) == len(whole.train)
    together = sorted([*map(repr, corpus.train.inputs), *map(repr, corpus.test.inputs)])
    assert together == sorted(map(repr, whole.train.inputs))
    assert np.array_equal(load_data(config.data, 1).test.targets, corpus.test.targets)


def test_one_row_is_too_few() -> None:
    row = Rows("instruction", [("say", "x")], ["x"], [""])
    corpus = Corpus("instruction", row, row, None, None, None, 0, ("exact_match",))
    with pytest.raises(FedspanError, match="the training data has 1 row; expected 2 or more"):
        evaluated_on_training(corpus, 0.5, 0)
