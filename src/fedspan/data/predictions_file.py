"""Files of predictions: the rows as they were read, with what the model says of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedspan.data.json_rows import ABSENT
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError
from fedspan.support.files import make_folder
from fedspan.support.standard_json import standard

SUFFIXES = (".jsonl", ".csv")
COLUMNS = ("prediction", "probability", "probabilities")


def check_out(out: Path, inputs: Sequence[str], force: bool) -> None:
    """Refuse a file of another type, one that is there already, and one that is read.

    Raises
    ------
    FedspanError
        Naming it.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise FedspanError(f"--out {out}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if any(Path(name).expanduser().resolve() == out.resolve() for name in inputs):
        raise FedspanError(f"--out {out} is one of the files of --data: expected another one")
    around = [name for name in inputs if Path(name).expanduser().resolve() in out.resolve().parents]
    if around:  # with --force it would replace a file of the data, and a second command would read it as rows
        raise FedspanError(f"--out {out} is in {around[0]}, a folder of --data: expected a file outside it")
    if out.is_dir() or (out.exists() and not force):
        raise FedspanError(f"--out {out} exists: expected a new file, or --force to replace it")


def kept_columns(tables: Iterable[Table]) -> list[str]:
    """Return the names of the columns that a file of predictions keeps: all but arrays and pictures.

    Raises
    ------
    FedspanError
        When one has the name of a column of predictions.
    """
    names: dict[str, None] = {}
    for table in tables:
        for name, values in table.columns.items():
            if not (isinstance(values, np.ndarray) and values.ndim > 1):
                names[name] = None
    taken = [name for name in COLUMNS if name in names]
    if taken:
        raise FedspanError(f"--data has a column {taken[0]!r} already: expected none of {', '.join(COLUMNS)}")
    return list(names)


def original_rows(tables: Iterable[Table], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield every row's values of these columns, without those that it lacks."""
    for table in tables:
        columns = {name: table.columns[name] for name in names if name in table.columns}
        for row in range(table.num_rows):
            values = {name: _plain(column[row]) for name, column in columns.items()}
            yield {name: value for name, value in values.items() if value is not ABSENT}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    known = value is None or value is ABSENT or isinstance(value, str | int | float | list | dict)
    return value if known else None


def write_predictions(out: Path, names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows one by one, and return how many; the file appears when it is whole.

    Parameters
    ----------
    names
        The columns of the input. JSONL has `probabilities`, by class; CSV has `probability`, of the predicted one.
    """
    make_folder(out.absolute().parent)
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            count = (_write_csv if out.suffix.lower() == ".csv" else _write_jsonl)(file, names, rows)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return count


def _write_jsonl(file: IO[str], names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for row in rows:
        kept = {name: value for name, value in row.items() if name != "probability"}
        file.write(_json(kept) + "\n")
        count += 1
    return count


def _cell(value: Any) -> Any:
    return _json(value) if isinstance(value, list | dict) else value


def _json(value: Any) -> str:
    # A Parquet file has NaN for a number that is missing, which no reader of standard JSON takes.
    return json.dumps(standard(value), ensure_ascii=False)


def _write_csv(file: IO[str], names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> int:
    writer: Any = None
    count = 0
    for row in rows:
        if writer is None:
            header = [*names, "prediction", *(["probability"] if "probability" in row else [])]
            writer = csv.DictWriter(file, header, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in row.items()})
        count += 1
    return count
