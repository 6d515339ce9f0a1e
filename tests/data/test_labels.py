"""Labels that cannot be classes are refused in one line; those that can be one are read as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import LABELS, check_same_images, fails, images, labelled, read

from fedspan.data.labels import learn_labels
from fedspan.support.errors import FedspanError


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1.0", "0.0", "1"], None),
        (["3", "3a", "4"], ("3", "3a", "4")),
        (["New York", "NY"], ("NY", "New York")),
        ([" a", "b"], (" a", "b")),
        (["nano", "nullable"], ("nano", "nullable")),
    ],
)
def test_labels_that_look_odd_are_classes(labels: list[Any], names: Any) -> None:
    learnt = learn_labels(labels, "x.csv", False, None)
    assert learnt.names == names
    assert learnt.num_labels == len(names or (0, 1))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0.37", "0.5"], "fractional labels such as '0.37', '0.5': for regression set data.metrics to .*pearson"),
        (["0.37", "high"], "the labels '0.37', 'high': expected all names or all whole numbers"),
        (["0,37", "0,5"], "labels with a decimal comma such as '0,37', '0,5': expected a decimal point"),
        (["inf", "a"], "expected all names"),
        (["a", "nan", "b"], "row 2 of x.csv has the label 'nan', which stands for a missing value: expected a class"),
        *[
            (["a", "b", text], f"row 3 .*{text}.*missing value")
            for text in ("NA", "N/A", "NULL", "None", "<NA>", "NaT", "#N/A")
        ],
        (["a", " "], "row 2 of x.csv has no label"),
        (["a", None], "row 2 of x.csv has no label"),
        ([0, 1, float("nan")], "row 3 .*nan, a missing value: expected a class"),
        (["a", "A"], "the labels 'A' and 'a', which differ only in spaces or in upper and lower case: expected one"),
        (["a", "a "], "the labels 'a' and 'a ', which differ only in spaces"),
        (["cafe\u0301", "caf\u00e9"], "which differ only"),
        (["new  york", "New York"], "which differ only"),
        (["1", "2", "1.0", "2.0"], "the labels '1' and '1.0', which are one number: expected one spelling"),
        (["A01", "01", "1"], "the labels '01' and '1', which are one number"),
    ],
)
def test_what_cannot_be_a_class_is_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(FedspanError, match=message) as caught:
        learn_labels(labels, "x.csv", False, None)
    assert "\n" not in str(caught.value)


def test_a_regression_takes_points_and_no_commas(tmp_path: Path) -> None:
    path = labelled(tmp_path, ["0.37", "1e-2", 3])
    corpus = read(train=path, test=path, metrics="pearson")
    assert corpus.train.targets == [0.37, 0.01, 3.0]
    fails(
        "row 2 .* '0,5': expected a finite number with a decimal point",
        train=labelled(tmp_path, [1, "0,5"]),
        metrics="pearson",
    )
    fails("row 2 .* 'nan', which stands for a missing value", train=labelled(tmp_path, [1, "nan"]), metrics="pearson")


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[:, None],
        LABELS.astype(float)[:, None],
        np.array(["b", "a"])[LABELS % 2],
        np.array([b"b", b"a"])[LABELS % 2],
    ],
)
def test_labels_of_an_npz_may_be_a_column(tmp_path: Path, labels: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=images(), y=labels)
    corpus = read(train=str(tmp_path / "a.npz"), test=str(tmp_path / "a.npz"))
    named = labels.dtype.kind in "US"
    check_same_images(corpus.train, images(), 1 - LABELS % 2 if named else LABELS)
    assert corpus.label_names == (("a", "b") if named else None)


def test_labels_of_the_test_data_that_are_no_labels_are_named(tmp_path: Path) -> None:
    train = labelled(tmp_path, ["a", "b"])
    fails("row 1 of .*t.jsonl has a list as label", train=train, test=labelled(tmp_path, [[1]], "t.jsonl"))
    fails("row 1 of .*t.jsonl has the label None", train=train, test=labelled(tmp_path, [None], "t.jsonl"))
