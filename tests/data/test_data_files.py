"""Reading files: every format, what labels become, and every error line."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    ANSWERS,
    LABELS,
    REVIEWS,
    check_same_images,
    everything,
    fails,
    images,
    labelled,
    read,
    write,
    write_jsonl,
)
from PIL import Image

from fedspan.config import DataConfig
from fedspan.data import Corpus
from fedspan.data.new_rows import KnownLabels, read_new_rows
from fedspan.support.errors import FedspanError

# formats

FORMATS = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "tsv", "parquet", "parquet.gz"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_table_reads_back_from_every_format(tmp_path: Path, suffix: str) -> None:
    """The same rows in any format are the same corpus, quotes, commas, newlines and all."""
    path = write(tmp_path / f"reviews.{suffix}", REVIEWS)
    corpus = read(train=path, field_column="site")
    assert (corpus.kind, corpus.num_labels, corpus.metrics) == ("classification", 2, ("accuracy",))
    assert everything(corpus) == sorted(((row["text"],), row["label"], row["site"]) for row in REVIEWS)
    assert len(corpus.test) == 3


def test_instruction_data_is_told_by_its_answers(tmp_path: Path) -> None:
    corpus = read(train=write_jsonl(tmp_path / "a.jsonl", ANSWERS))
    assert (corpus.kind, corpus.num_labels, corpus.label_names) == ("instruction", 0, None)
    assert corpus.metrics == ("rouge_l", "exact_match")
    assert everything(corpus) == sorted(
        ((row["instruction"], row["input"]), row["output"], row["task"]) for row in ANSWERS
    )


def test_columns_go_by_other_names_and_may_be_absent(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "a": i, "context": None} for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    names = {"instruction_column": "q", "output_column": "a"}
    with_null = read(train=path, input_column="context", **names)
    without = read(train=path, input_column="", **names)
    assert everything(with_null) == everything(without) == [((f"q{i}", ""), str(i), "") for i in range(4)]


def test_line_separators_inside_json_strings_end_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028two\x85three", "label": i % 2} for i in range(4)]
    write_jsonl(path, rows)
    assert len(everything(read(train=str(path)))) == 4


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("image", "label")])
@pytest.mark.parametrize("channels", [3, 1, 0])
def test_an_npz_of_one_split(tmp_path: Path, names: tuple[str, str], channels: int) -> None:
    pictures = images(channels=channels)
    for split in ("a", "b"):
        np.savez(tmp_path / f"{split}.npz", **{names[0]: pictures, names[1]: LABELS})
    corpus = read(train=str(tmp_path / "a.npz"), test=str(tmp_path / "b.npz"))
    assert (corpus.kind, corpus.num_labels) == ("image", 4)
    check_same_images(corpus.train, pictures[..., 0] if channels == 1 else pictures, LABELS)
    check_same_images(corpus.test, pictures[..., 0] if channels == 1 else pictures, LABELS)


@pytest.mark.parametrize("mark", ["test_exclude", "test_dup_of_train"])
def test_an_npz_of_several_splits_serves_them_all(tmp_path: Path, mark: str) -> None:
    """Marked rows are left out of the split they are marked in, and of no other."""
    path = str(tmp_path / "all.npz")
    train, test, excluded = images(), images(12, seed=1), np.arange(12) % 3 == 0
    splits = {"train_x": train, "train_y": LABELS, "test_x": test, "test_y": LABELS[:12], mark: excluded}
    np.savez(path, class_names=np.array(["a", "b", "c", "d"]), train_site=LABELS // 2, **splits)
    for corpus in (read(train=path), read(train=path, test=path)):
        check_same_images(corpus.train, train, LABELS)
        check_same_images(corpus.test, test[~excluded], LABELS[:12][~excluded])
        assert corpus.label_names == ("a", "b", "c", "d")
    np.savez(path, train_x=train, train_y=LABELS, train_site=LABELS // 2)
    fields = everything_fields(read(train=path, field_column="site"))
    assert fields == ["0"] * 10 + ["1"] * 10


def everything_fields(corpus: Corpus) -> list[str]:
    return sorted([*corpus.train.fields, *corpus.test.fields])


def test_an_image_folder_has_one_class_per_sub_folder(tmp_path: Path) -> None:
    pictures = images(8)
    for i, picture in enumerate(pictures):
        folder = tmp_path / "data" / ("cat", "ant")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{i}.PNG")
        (folder / ".hidden").write_text("ignored")
    corpus = read(train=str(tmp_path / "data"), test=str(tmp_path / "data"))
    assert corpus.label_names == ("ant", "cat")
    order = [1, 3, 5, 7, 0, 2, 4, 6]
    check_same_images(corpus.train, pictures[order], np.array([0] * 4 + [1] * 4))


def test_images_by_file_name_and_as_bytes(tmp_path: Path) -> None:
    """A grey image stays (H, W); file names are relative to the table that holds them."""
    pictures = images(4, channels=0)
    rows, raw = [], []
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": i % 2})
        raw.append({"image": {"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None}, "label": i % 2})
    for path in (write(tmp_path / "a.csv", rows), write(tmp_path / "a.parquet", raw)):
        corpus = read(train=path, test=path)
        assert corpus.kind == "image"
        check_same_images(corpus.train, pictures, np.arange(4) % 2)


# labels


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        ([2, 0, 1], [2, 0, 1], None),
        (["2", "0", "1"], [2, 0, 1], None),
        ([1.0, 0.0, 1.0], [1, 0, 1], None),
        ([True, False, True], [1, 0, 1], None),
        (["pos", "neg", "pos"], [1, 0, 1], ("neg", "pos")),
        (["5", "1", "3"], [2, 0, 1], ("1", "3", "5")),
    ],
)
def test_labels_become_ids(tmp_path: Path, labels: list[Any], expected: list[int], names: Any) -> None:
    path = labelled(tmp_path, labels)
    corpus = read(train=path, test=path)
    assert corpus.train.targets == corpus.test.targets == expected
    assert all(type(target) is int for target in corpus.train.targets)
    assert (corpus.label_names, corpus.num_labels) == (names, len(set(expected)))


def test_fractions_are_a_regression_when_the_metric_says_so(tmp_path: Path) -> None:
    path = labelled(tmp_path, [0.5, "3", 4])
    corpus = read(train=path, test=path, metrics="spearman")
    assert corpus.train.targets == [0.5, 3.0, 4.0]
    assert (corpus.num_labels, corpus.metrics) == (1, ("spearman", "pearson"))
    fails("fractional labels such as 0.5, 1.5: .*pearson", train=labelled(tmp_path, [0.5, 1.5]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 2], r"labels 0, 2: expected 0..n-1"),
        ([1, 2, 3], r"labels 1, 2, 3: expected 0..n-1"),
        ([-1, 0, 1], r"labels -1, 0, 1"),
        ([0, "cat", 1], "expected all names or all whole numbers"),
        ([0, None, 1], "row 2 of .* has no label"),
        (["a", "", "b"], "row 2 of .* has no label"),
        ([[0], [1], [0]], "row 1 of .* has a list as label"),
        ([1, 1, 1], "single label 1"),
        ([0.5, 1, float("nan")], "labels .*nan"),
    ],
)
def test_unusable_labels_are_named(tmp_path: Path, labels: list[Any], message: str) -> None:
    fails(message, train=labelled(tmp_path, labels))


def test_labels_of_the_test_data_must_be_known(tmp_path: Path) -> None:
    ids, names = labelled(tmp_path, [0, 1], "ids.jsonl"), labelled(tmp_path, ["cat", "dog"], "names.jsonl")
    more = labelled(tmp_path, [0, 2], "more.jsonl"), labelled(tmp_path, ["cat", "dob"], "other.jsonl")
    fails(r"row 2 of .*more.jsonl has the label 2: expected 0..1", train=ids, test=more[0])
    fails(r"row 2 of .*other.jsonl has the label 'dob'; did you mean 'dog'", train=names, test=more[1])


# errors of files and columns


def test_broken_files_are_named(tmp_path: Path) -> None:
    def file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    whole = gzip.compress(b'{"text": "x", "label": 0}\n' * 50)
    array = io.BytesIO()
    np.save(array, np.arange(3))
    objects = io.BytesIO()
    np.savez(objects, x=np.array([{}, []], dtype=object), y=np.arange(2))
    plain = io.BytesIO()
    np.savez(plain, x=images(), y=LABELS)
    cases = {
        "gone.jsonl": (None, "does not exist"),
        "empty.jsonl": (b"", "no rows"),
        "blank.jsonl": (b"\n \n", "no rows"),
        "bad.jsonl": (b'{"text": "a", "label": 0}\n{"text": ', "line 2, is not valid JSON"),
        "list.jsonl": (b"[1, 2]", r"line 1, is \[1, 2\]: expected an object"),
        "bad.json": (b"[{]", "not valid JSON"),
        "lines.json": (b'{"a": 1}\n{"a": 2}', r"\.jsonl"),
        "object.json": (b'{"a": 1}', "is not a list of objects"),
        "nothing.json": (b"[]", "no rows"),
        "latin.csv": (b"text,label\n\xe9t\xe9,0\n", "not UTF-8"),
        "wide.csv": (b"text,label\na,0\nb,1,2\n", "line 3, has 3 values: expected 2"),
        "open.csv": (b'text,label\n"a,0\n', "not valid CSV"),
        "twice.csv": (b"text,text\na,0\n", "names a column twice"),
        "header.csv": (b"text,label\n", "no rows"),
        "cut.jsonl.gz": (whole[:-10], "not a complete gzip"),
        "false.jsonl.gz": (b"plain text", "not a complete gzip"),
        "bad.parquet": (b"PAR1 nothing", "not a readable Parquet"),
        "type.xlsx": (b"x", "unknown file type: expected .jsonl"),
        "text.npz": (b"hello", "not a readable npz"),
        "empty.npz": (b"", "not a readable npz"),
        "array.npz": (array.getvalue(), "not a readable npz"),
        "objects.npz": (objects.getvalue(), "allow_pickle=False"),
        "cut.npz": (plain.getvalue()[:-40], "not a readable npz"),
        "header.npz": (plain.getvalue().replace(b"{'descr'", b"('descr'"), "not a readable npz"),
    }
    for name, (content, message) in cases.items():
        path = str(tmp_path / name) if content is None else file(name, content)
        assert name in fails(message, train=path)


def test_missing_columns_are_named_with_the_nearest(tmp_path: Path) -> None:
    rows = [{"sentences": "a", "label": i % 2, "group": "g"} for i in range(4)]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    fails("r.jsonl has no column 'text' .data.text_columns.", train=path)
    fails("no column 'sentence' .*did you mean 'sentences'", train=path, text_columns="sentence")
    text = {"text_columns": "sentences"}
    fails(
        "no column 'groups' .data.field_column.*did you mean 'group'",
        train=path,
        field_column="groups",
        **text,
    )
    fails("expected 'output'.*'image'.*'labels' .data.label_column", train=path, label_column="labels")
    fails("no column 'labels' .*'label'", train=path, label_column="labels", kind="classification", **text)
    fails("no image or images or x", train=path, kind="image")
    fails("expected one text or a pair", train=path, text_columns=["a", "b", "c"])
    answers = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "inputs": "b", "output": "c"}] * 3)
    fails("no column 'input' .data.input_column; \"\" if there is none.*'inputs'", train=answers)
    fails("both empty", train=answers, input_column="", instruction_column="")


def test_rows_with_unusable_values_are_named(tmp_path: Path) -> None:
    def path(name: str, *rows: dict[str, Any]) -> str:
        return write_jsonl(tmp_path / name, list(rows))

    good = {"text": "a", "label": 0}
    fails("row 2 of .*has no 'text'", train=path("a.jsonl", good, {"label": 1}))
    fails("row 2 of .*'text'.* is null: expected text", train=path("b.jsonl", good, {"text": None, "label": 1}))
    fails("row 2 of .*'text'.* is list: expected text", train=path("c.jsonl", good, {"text": [], "label": 1}))
    answer = {"instruction": "a", "input": "", "output": None}
    fails("row 1 of .*'output'.* is null", train=path("d.jsonl", answer))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": images().astype(np.complex64), "y": LABELS}, r"complex64 \(20, 6, 6, 3\): expected uint8"),
        (
            {"x": np.where(images() == 7, np.nan, 1.0), "y": LABELS},
            r"row \d+ of .*a.npz has a pixel that is not finite",
        ),
        ({"x": np.moveaxis(images(), -1, 1), "y": LABELS}, r"\(20, 3, 6, 6\): expected uint8.*moveaxis"),
        ({"x": images(), "y": np.eye(4, dtype=int)[LABELS]}, r"labels of shape \(20, 4\): .*numpy.argmax"),
        ({"x": images(), "y": LABELS.reshape(10, 2).repeat(2, 0)}, r"labels of shape \(20, 2\): expected one for each"),
        ({"x": images(channels=2), "y": LABELS}, r"\(20, 6, 6, 2\): expected uint8"),
        ({"x": images(), "y": LABELS[:7]}, r"x 20, y 7: expected arrays with one row"),
        ({"x": images(), "y": LABELS, "exclude": LABELS}, "exclude is int64"),
        ({"x": images()}, "no label or labels or y"),
        ({"test_x": images(), "test_y": LABELS}, r"no arrays named train_"),
        ({"x": images(0), "y": LABELS[:0]}, "expected arrays with one row"),
    ],
)
def test_unusable_arrays_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    fails(message, train=str(tmp_path / "a.npz"))


def test_unusable_image_folders_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "cat").mkdir(parents=True)
    fails("holds no images", train=str(folder))
    (folder / "cat" / "a.png").write_bytes(b"no image")
    fails(r"a.png is not a readable image", train=str(folder))
    (folder / "cat" / "a.png").rename(folder / "cat" / "a.txt")
    fails(r"a.txt is not an image: expected .png", train=str(folder))
    (folder / "b.png").write_bytes(b"")
    fails("b.png lies beside the classes", train=str(folder))


def test_images_without_classes_are_rows_to_predict(tmp_path: Path) -> None:
    """A folder of them, one file, and classes as in training; a folder that mixes both is refused."""
    labels = KnownLabels(2, ("cat", "dog"))
    config = DataConfig(kind="image", task="files", train=("unused",))
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(3):
        Image.fromarray(np.full((6, 6, 3), 40 * k, np.uint8)).save(photos / f"{k}.png")
    for given, count in ((photos, 3), (photos / "1.png", 1)):
        found = read_new_rows([str(given)], config, "image", labels, unlabelled=True)
        assert (len(found.rows), found.labelled.tolist()) == (count, [False] * count)
        assert list(found.tables[0].columns["file"]) == [f"{k}.png" for k in ((0, 1, 2) if count == 3 else (1,))]
    with pytest.raises(FedspanError, match="lies beside the classes"):
        read_new_rows([str(photos)], config, "image", labels, unlabelled=False)
    (photos / "cat").mkdir()
    with pytest.raises(FedspanError, match="cat is not an image"):
        read_new_rows([str(photos)], config, "image", labels, unlabelled=True)
    classes = tmp_path / "classes"
    (classes / "dog").mkdir(parents=True)
    shutil.copy(photos / "0.png", classes / "dog")
    found = read_new_rows([str(classes)], config, "image", labels, unlabelled=True)
    assert (found.labelled.tolist(), list(found.rows.targets)) == ([True], [1])
