"""Tables as spreadsheets, shells and other libraries leave them: the right values, or one line that says what to do."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import fails, read, write, write_jsonl
from peaks import PEAK

from fedspan.data import Corpus
from fedspan.data.json_rows import read_json
from fedspan.support.errors import FedspanError

TEXTS = ["Übelkeit; seit\n3 Tagen", 'he said "no"', "plain, with a comma", "日本", ""]
LABELS = ["ja", "nein", "ja", "nein", "ja"]


def csv_text(delimiter: str, end: str = "\r\n", first: str = "", more: str = "") -> str:
    rows = [
        '"' + text.replace('"', '""') + f'"{delimiter}{label}{more}' for text, label in zip(TEXTS, LABELS, strict=True)
    ]
    return first + end.join([f"text{delimiter}label{more}", *rows, ""])


def check(corpus: Corpus) -> None:
    assert [row[0] for row in corpus.train.inputs] == TEXTS
    assert corpus.train.targets == [0, 1, 0, 1, 0]
    assert corpus.label_names == ("ja", "nein")


EXCEL: dict[str, tuple[str, str]] = {
    "utf-8 with a mark": (csv_text(","), "utf-8-sig"),
    "semicolons": (csv_text(";"), "utf-8-sig"),
    "sep=": (csv_text(";", first="sep=;\r\n"), "utf-8"),
    "quoted sep= of a bar": (csv_text("|", first='"sep=|"\r\n'), "utf-8"),
    "the type of PowerShell's objects": (csv_text(",", first="#TYPE Selected.System.Data.DataRow\r\n"), "utf-8"),
    "a type, saved again by Excel": (csv_text(";", first="#TYPE Selected.User;\r\n"), "utf-8-sig"),
    "a type, then a separator": (csv_text(";", first="#TYPE Row\r\nsep=;\r\n"), "utf-16"),
    "unicode text": (csv_text("\t"), "utf-16"),
    "big endian": ("\ufeff" + csv_text(","), "utf-16-be"),
    "utf-32": (csv_text(","), "utf-32"),
    "ends of old Macs": (csv_text(",", end="\r"), "utf-8"),
    "an empty line first": (csv_text(",", first="\r\n"), "utf-8"),
    "empty rows and columns": (csv_text(",", more=",,") + ",,,\r\n,,,\r\n", "utf-8"),
    "the index of pandas": ("".join(f",{line}\r\n" for line in csv_text(",").split("\r\n") if line), "utf-8"),
    "names with spaces": (csv_text(",").replace("text,label", " text , label"), "utf-8"),
}


@pytest.mark.parametrize("name", EXCEL)
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_a_csv_reads_as_it_was_meant(tmp_path: Path, name: str, suffix: str) -> None:
    text, encoding = EXCEL[name]
    content = text.encode(encoding)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    check(read(train=str(path), test=str(path)))


def test_a_tsv_with_commas_and_a_csv_with_tabs_are_told_by_their_header(tmp_path: Path) -> None:
    for name, delimiter in (("a.tsv", "\t"), ("b.tsv", ","), ("c.csv", "\t")):
        path = tmp_path / name
        path.write_text(csv_text(delimiter), encoding="utf-8", newline="")
        check(read(train=str(path), test=str(path)))


def test_an_encoding_that_a_file_does_not_say_is_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nÄrger € täglich,ja\nb,nein\n".encode("cp1252"))
    fails(r"a.csv is not UTF-8 text: byte 11 is invalid; .*cp1252, set data.encoding", train=str(path))
    corpus = read(train=str(path), test=str(path), encoding="cp1252")
    assert corpus.train.inputs[0] == ("Ärger € täglich",)
    late = b"text,label\n" + b"x,ja\n" * 40_000 + b"\xe4,nein\n"
    path.write_bytes(late)
    fails(f"byte {late.index(0xE4)} is invalid", train=str(path))
    path.write_bytes(csv_text(",").encode("utf-16-le"))
    fails('looks like UTF-16 without a byte order mark: set data.encoding = "utf-16-le"', train=str(path))
    check(read(train=str(path), test=str(path), encoding="utf-16-le"))
    path.write_bytes(csv_text(",").encode("utf-16-le")[:-1])
    fails("is not UTF-16-LE text: byte", train=str(path), encoding="utf-16-le")
    for wrong in ("utf-7-of-mine", "base64", "", "a\0b"):
        fails("data.encoding = .*expected the name of a text encoding", train=str(path), encoding=wrong)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_json_as_powershell_writes_it(tmp_path: Path, suffix: str, encoding: str) -> None:
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    text = json.dumps(rows) if suffix == "json" else "\r\n".join([*map(json.dumps, rows), ""])
    (tmp_path / f"a.{suffix}").write_bytes(text.encode(encoding))
    check(read(train=str(tmp_path / f"a.{suffix}"), test=str(tmp_path / f"a.{suffix}")))


def test_cells_may_be_long(tmp_path: Path) -> None:
    """Longer than the 131,072 characters that the csv module allows by itself, which stay its limit elsewhere."""
    import csv

    before = csv.field_size_limit()
    long = "word " * 60_000
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n"{long}",0\nb,1\n', encoding="utf-8")
    assert read(train=str(path), test=str(path)).train.inputs == [(long,), ("b",)]
    assert csv.field_size_limit() == before


def test_columns_of_pandas_parquet(tmp_path: Path) -> None:
    """Nullable whole numbers come back as numbers, missing ones as missing, categories as their names."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"text": ["a", "b", "c"], "label": pandas.array([1, 0, 1], dtype="Int64")}, index=[7, 8, 9]
    )
    path = str(tmp_path / "a.parquet")
    frame.to_parquet(path)
    assert read(train=path, test=path).train.targets == [1, 0, 1]
    frame.assign(label=pandas.array([1.0, 0.0, 1.0])).to_csv(tmp_path / "a.csv")
    assert read(train=str(tmp_path / "a.csv"), test=str(tmp_path / "a.csv")).train.targets == [1, 0, 1]
    frame.assign(label=pandas.Categorical(["x", "y", "x"])).to_parquet(path)
    assert read(train=path, test=path).label_names == ("x", "y")
    frame.assign(label=pandas.array([1, None, 0], dtype="Int64")).to_parquet(path)
    fails("row 2 of .* has no label", train=path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": float("nan"), "label": 1}])
    fails("row 2 of .*'text'.* is NaN: expected text", train=str(tmp_path / "a.jsonl"))


JSON: dict[str, tuple[str, str]] = {
    "a trailing comma": ('[{"a": 1},]', "not valid JSON: Expecting value"),
    "no comma": ('[{"a": 1} {"a": 2}]', "not valid JSON: Expecting ',' delimiter"),
    "text behind": ('[{"a": 1}] x', "not valid JSON: Extra data"),
    "no end": ('[{"a": 1}', "not valid JSON"),
    "nothing": ("", "not valid JSON"),
    "a number": ("[1]", "is not a list of objects"),
    "deep lists": ("[" * 50_000, "is not valid JSON|list of objects"),
    "deep objects": ('[{"a": ' + '{"a":' * 50_000, "is not valid JSON"),
    "a long number": ('[{"a": ' + "1" * 5_000 + "}]", "is not valid JSON: Exceeds the limit"),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_none(tmp_path: Path, name: str) -> None:
    text, message = JSON[name]
    path = tmp_path / "a.json"
    path.write_text(text)
    fails(message, train=str(path))
    if name.startswith(("deep", "a long")):
        (tmp_path / "a.jsonl").write_text(text + "\n")
        fails(r"a.jsonl, line 1, is", train=str(tmp_path / "a.jsonl"))


def test_json_reads_like_the_library(tmp_path: Path) -> None:
    rows = [{"a": [1, {"b": None}], "c": " ,]["}, {}, {"d": -0.5, "a": "é"}]
    path = tmp_path / "a.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=3), " \n[ ]\n"):
        path.write_text(text)
        columns = read_json(path, "utf-8")
        found = [
            {k: v[i] for k, v in columns.items() if type(v[i]) is not object} for i in range(len(columns.get("a", [])))
        ]
        assert found == json.loads(text)


@pytest.mark.parametrize("column", ["text", "output", "label"])
def test_half_a_surrogate_pair_is_no_character(tmp_path: Path, column: str) -> None:
    """JSON may spell one; a tokenizer fails on it. A whole pair is one character."""
    kind = {"instruction": "a", "input": "b"} if column == "output" else {"text": "x"}
    values = ("good", "\U0001f600", "bad \ud83d")
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({**kind, "label": f"l{i % 2}", column: value}) for i, value in enumerate(values)]
    path.write_text("\n".join(rows))
    fails("half a surrogate pair", train=str(path))
    path.write_text("\n".join([*rows[:2], rows[0]]))
    assert len(read(train=str(path), test=str(path)).train) == 3


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("form", SPECIAL)
def test_what_would_never_end_is_refused(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read at once or not at all: a thread that hangs would fail the test by its timeout."""
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    (tmp_path / "d" / "cat").mkdir(parents=True)
    found: list[str] = []

    def all_of_them() -> None:
        for name in ("a.csv", "a.jsonl", "a.json", "a.parquet", "a.npz", "a.csv.gz", "d/cat/a.png"):
            SPECIAL[form](Path(name))
            with pytest.raises(FedspanError, match=f"a {form}: expected a regular file") as caught:
                read(train="d" if name.startswith("d/") else name)
            found.append(str(caught.value))
        write(tmp_path / "b.csv", [{"image": "d/cat/a.png", "label": i} for i in range(2)])
        with pytest.raises(FedspanError, match=f"row 1 of .*a {form}"):
            read(train="b.csv")
        found.append("")

    thread = threading.Thread(target=all_of_them, daemon=True)
    thread.start()
    thread.join(20)
    assert len(found) == 8


def test_a_column_called_x_makes_no_images_of_a_text_file(tmp_path: Path) -> None:
    rows = [{"x": 0.5 * i, "img": "scan", "image": "none", "text": f"t{i}", "label": i % 2} for i in range(4)]
    for name in ("a.csv", "a.jsonl"):
        assert read(train=write(tmp_path / name, rows)).kind == "classification"
    for row in rows:
        del row["label"]
    fails("has the columns x, img, image, text: expected .*data.label_column", train=write(tmp_path / "b.csv", rows))


def test_a_file_that_is_missing_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fails(f"data.train: none.csv does not exist: looked in {tmp_path}$", train="none.csv")
    fails(r"data.train: /none.csv does not exist$", train="/none.csv")
    fails("data.train: a\\\\x00b does not exist|data.train: a", train="a\0b")


def test_reading_takes_memory_of_the_files_own_order(tmp_path: Path) -> None:
    """A CSV of 8 MB with rows of 40 bytes, for which a list of Python strings takes ten times the file."""
    path, row = tmp_path / "a.csv", "ein kurzer Text {0} mit Wörtern,{1}\n"
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for start in range(0, 200_000, 1000):
            file.write("".join(row.format(i, i % 3) for i in range(start, start + 1000)))
    code = (
        f"{PEAK}\nfrom fedspan.config import DataConfig\nfrom fedspan.data import load\nbefore = reset()\n"
        f"load(DataConfig(task='files', train=sys.argv[1]), 0)\n"
        "print((peak() - before) / Path(sys.argv[1]).stat().st_size)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 5
