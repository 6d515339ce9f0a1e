"""Tables with named columns, read from JSONL, JSON, CSV, Parquet and npz files.

Every reader either returns the whole table or raises a `FedspanError` of one line that names the file.
Nothing is unpickled.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedspan.support.errors import FedspanError, first_line, one_line
from fedspan.support.suggest import nearest

_T = TypeVar("_T")
ABSENT = object()
"""The value of a key that one row lacks although others have it."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Named columns of equal length.

    `source` names the table in messages, `root` is the folder that relative file names in it start from, and
    `label_names` are the names behind whole-number labels where the source has them.
    """

    source: str
    columns: Mapping[str, Sequence[Any] | np.ndarray]
    root: Path | None = None
    label_names: tuple[str, ...] | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows; 0 without columns."""
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def column(self, name: str, key: str) -> Sequence[Any] | np.ndarray:
        """Return the column `name`, which the setting `key` asks for.

        Raises
        ------
        FedspanError
            If there is none, naming the nearest, or if a row lacks it.
        """
        if name not in self.columns:
            raise FedspanError(f"{self.source} has no column {name!r} ({key}){nearest(name, self.columns)}")
        values = self.columns[name]
        if not isinstance(values, np.ndarray):
            for row, value in enumerate(values, 1):
                if value is ABSENT:
                    raise FedspanError(f"row {row} of {self.source} has no {name!r} ({key}), unlike other rows")
        return values


def from_records(records: Iterable[Mapping[str, Any]], source: str, root: Path | None = None) -> Table:
    """Return a table of one mapping per row; a key that only some rows have is marked absent in the others."""
    rows = list(records)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(source, {name: [row.get(name, ABSENT) for row in rows] for name in names}, root)


def read_table(path: Path) -> Table:
    """Read one JSONL, JSON, CSV, TSV or Parquet file, gzip-compressed if its name ends in ``.gz``.

    JSON is a list of objects; CSV and TSV have a header line, and all their values are text.

    Raises
    ------
    FedspanError
        If the file is missing, corrupt, truncated, empty or of another type.
    """
    name = path.name.lower().removesuffix(".gz")
    reader = next((read for suffix, read in _READERS.items() if name.endswith(suffix)), None)
    if reader is None:
        raise FedspanError(
            f"{path} has an unknown file type: expected {', '.join(_READERS)} (also .gz), .npz or a folder"
        )
    table = reader(_content(path), path)
    if table.num_rows == 0:
        raise FedspanError(f"{path} holds no rows: expected at least one")
    return table


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FedspanError(f"cannot read {path}: {error.strerror or error}") from None
    if path.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise FedspanError(f"{path} is not a complete gzip file: {error}") from None
    return content


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FedspanError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from None


def _jsonl(content: bytes, path: Path) -> Table:
    records = []
    # Only "\n" ends a row: splitlines would also cut at separators that JSON strings may hold.
    for number, line in enumerate(_text(content, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FedspanError(f"{path}, line {number}, is not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise FedspanError(f"{path}, line {number}, is {line.strip()[:40]}: expected an object with named columns")
        records.append(record)
    return from_records(records, str(path), path.parent)


def _json(content: bytes, path: Path) -> Table:
    try:
        records = json.loads(_text(content, path))
    except (json.JSONDecodeError, RecursionError) as error:
        hint = " (one object a line is .jsonl)" if "Extra data" in str(error) else ""
        raise FedspanError(f"{path} is not valid JSON: {error}{hint}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise FedspanError(f"{path} is not a list of objects: expected [{{column: value, …}}, …]")
    return from_records(records, str(path), path.parent)


def _delimited(delimiter: str) -> Callable[[bytes, Path], Table]:
    def read(content: bytes, path: Path) -> Table:
        header, *rows = _records(content, path, delimiter) or [[]]
        if len(set(header)) != len(header):
            raise FedspanError(f"{path} names a column twice in its header: {', '.join(header)}")
        return Table(str(path), {name: [row[i] for row in rows] for i, name in enumerate(header)}, path.parent)

    return read


def _records(content: bytes, path: Path, delimiter: str) -> list[list[str]]:
    """Return the lines of a CSV that are not empty, all with as many values as the first."""
    records: list[list[str]] = []
    reader = csv.reader(io.StringIO(_text(content, path), newline=""), delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if record and records and len(record) != len(records[0]):
                raise FedspanError(
                    f"{path}, line {reader.line_num}, has {len(record)} values: "
                    f"expected {len(records[0])}, as in the header"
                )
            if record:
                records.append(record)
    except csv.Error as error:
        raise FedspanError(f"{path}, line {reader.line_num}, is not valid CSV: {error}") from None
    return records


def _parquet(content: bytes, path: Path) -> Table:
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:
        raise FedspanError(f"reading {path} needs pyarrow: pip install 'fedspan[hub]'") from None
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (arrow.ArrowException, OSError) as error:
        raise FedspanError(f"{path} is not a readable Parquet file: {first_line(error)}") from None
    return Table(str(path), {name: table.column(name).to_pylist() for name in table.column_names}, path.parent)


_READERS: Mapping[str, Callable[[bytes, Path], Table]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}


def npz_names(path: Path) -> list[str]:
    """Return the names of an npz file's arrays. Errors are those of :func:`read_npz`."""
    return _with_npz(path, lambda arrays: list(arrays.files))


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the arrays `names` of an npz file; arrays of Python objects (pickles) are refused.

    Raises
    ------
    FedspanError
        If the file is missing, corrupt or holds objects.
    """
    return _with_npz(path, lambda arrays: {name: arrays[name] for name in names})


def _with_npz(path: Path, read: Callable[[Any], _T]) -> _T:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return read(arrays)
    except OSError as error:
        raise FedspanError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        # The zip file, its compression and the headers, which numpy parses as Python literals, each fail in errors of
        # their own (BadZipFile, zlib.error, TokenError, MemoryError, …); a single .npy array is no context manager.
        raise FedspanError(f"{path} is not a readable npz of plain arrays: {one_line(error)}") from None
