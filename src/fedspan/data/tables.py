"""Tables with named columns, read from JSONL, JSON, CSV, Parquet and npz files.

Every reader either returns the whole table or raises a `FedspanError` of one line that names the file.
Nothing is unpickled.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedspan.data.delimited import read_delimited
from fedspan.data.json_rows import ABSENT, read_json, read_jsonl
from fedspan.data.sources import UTF8, bytes_of, check_regular, size_of
from fedspan.data.strings import ColumnBuilder, Strings
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError, first_line, one_line
from fedspan.support.suggest import nearest

_T = TypeVar("_T")
Columns = Mapping[str, Sequence[Any] | np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Named columns of equal length.

    `source` names the table in messages, `root` is the folder that relative file names in it start from, and
    `label_names` are the names behind whole-number labels where the source has them.
    """

    source: str
    columns: Columns
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
        if not isinstance(values, np.ndarray | Strings):
            for row, value in enumerate(values, 1):
                if value is ABSENT:
                    raise FedspanError(f"row {row} of {self.source} has no {name!r} ({key}), unlike other rows")
        return values


def read_table(path: Path, encoding: str = UTF8) -> Table:
    """Read one JSONL, JSON, CSV, TSV or Parquet file, gzip-compressed if its name ends in ``.gz``.

    JSON is a list of objects; CSV and TSV have a header line, and all their values are text.

    Parameters
    ----------
    encoding
        That of a text file that does not say so itself, by a mark at its beginning.

    Raises
    ------
    FedspanError
        If the file is missing, corrupt, truncated, empty or of another type.
    """
    name = path.name.lower().removesuffix(".gz")
    reader = next((read for suffix, read in READERS.items() if name.endswith(suffix)), None)
    if reader is None:
        raise FedspanError(
            f"{path} has an unknown file type: expected {', '.join(READERS)} (also .gz), .npz or a folder"
        )
    check_regular(path)
    report(f"reading {path.name} ({size_of(path)})")
    table = Table(str(path), reader(path, encoding), path.parent)
    if table.num_rows == 0:
        raise FedspanError(f"{path} holds no rows: expected at least one")
    return table


def _parquet(path: Path, encoding: str) -> Columns:
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:
        raise FedspanError(f"reading {path} needs pyarrow: pip install 'fedspan[hub]'") from None
    with bytes_of(path) as stream:
        try:
            packed = path.name.lower().endswith(".gz")
            file = parquet.ParquetFile(io.BytesIO(stream.read()) if packed else stream)
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise FedspanError(f"{path} names a column twice: {', '.join(names)}")
            builders = {name: ColumnBuilder() for name in names}
            for batch in file.iter_batches(batch_size=8192):
                for builder, column in zip(builders.values(), batch.columns, strict=True):
                    for value in column.to_pylist():
                        builder.append(value)
        except (arrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, FedspanError):
                raise
            raise FedspanError(f"{path} is not a readable Parquet file: {first_line(error)}") from None
    return {name: builder.build() for name, builder in builders.items()}


def _delimited(path: Path, encoding: str, *, delimiter: str) -> Columns:
    return read_delimited(path, delimiter, encoding)


READERS: Mapping[str, Callable[[Path, str], Columns]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": partial(_delimited, delimiter=","),
    ".tsv": partial(_delimited, delimiter="\t"),
    ".parquet": _parquet,
}
"""Reader of each type of file, by the end of its name."""


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
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return read(arrays)
    except OSError as error:
        raise FedspanError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        # The zip file, its compression and the headers, which numpy parses as Python literals, each fail in errors of
        # their own (BadZipFile, zlib.error, TokenError, MemoryError, …); a single .npy array is no context manager.
        raise FedspanError(f"{path} is not a readable npz of plain arrays: {one_line(error)}") from None
