"""CSV and TSV files as Excel, pandas and other programs write them (RFC 4180, and their habits)."""

from __future__ import annotations

import csv
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO

from fedspan.data.sources import text_of
from fedspan.data.strings import Strings, StringsBuilder
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError

_DELIMITERS = (",", ";", "\t")
_TYPE_LINE = re.compile(r'"?#TYPE [^\s,;"]+"?[,;\t]*')
"""The first line that Export-Csv of Windows PowerShell writes, with the type of the objects, and Import-Csv skips.

Delimiters follow where a spreadsheet has saved it again.
"""
_SEPARATOR_LINE = re.compile(r'"?sep=(?P<delimiter>[^"\r\n])"?', re.IGNORECASE)
_ROWS_AT_ONCE = 2048
_NO_LIMIT = 2**31 - 1
_limit = threading.Lock()


def read_delimited(path: Path, delimiter: str, encoding: str) -> dict[str, Strings]:
    """Return the columns of a CSV or TSV file by the names in its header, all values as text.

    * The delimiter is the one that a first line ``sep=;`` names, as Excel writes it; otherwise `delimiter`, unless the
      header has a single name under it and several under another one of comma, semicolon and tab.
    * A first line ``#TYPE …``, as Windows PowerShell writes it, is left out.
    * Lines without any value are left out, as they follow a table of a spreadsheet, and so are columns without a name,
      such as the index that pandas writes.
    * Names lose the spaces around them; values keep theirs.

    Raises
    ------
    FedspanError
        For another number of values than names, a name that is there twice, or invalid quotes, naming the line.
    """
    with text_of(path, encoding, newline="") as text, _cells_of_any_length():
        lines, skipped, delimiter = _beginning(text, delimiter)
        records = _records(lines, path, delimiter, skipped)
        header = [name.strip() for name in next(records, [])]
        kept = [place for place, name in enumerate(header) if name]
        names = [header[place] for place in kept]
        if len(set(names)) != len(names):
            raise FedspanError(f"{path} names a column twice in its header: {', '.join(header)}")
        return dict(zip(names, _columns(records, kept, path), strict=True))


@contextmanager
def _cells_of_any_length() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters a cell, which is one of the whole process."""
    with _limit:
        before = csv.field_size_limit(_NO_LIMIT)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _beginning(text: IO[str], delimiter: str) -> tuple[Iterable[str], int, str]:
    """Return the lines from the header on, the number of lines before it, and the delimiter."""
    skipped, first = 0, text.readline()
    while first and (not first.strip() or _TYPE_LINE.fullmatch(first.strip("\r\n"))):
        skipped, first = skipped + 1, text.readline()
    named = _SEPARATOR_LINE.fullmatch(first.strip("\r\n"))
    if named:
        return text, skipped + 1, named["delimiter"]
    counts = {each: len(next(csv.reader([first], delimiter=each), [])) for each in (delimiter, *_DELIMITERS)}
    if counts[delimiter] == 1:
        delimiter = max(counts, key=lambda each: counts[each])
    return chain([first], text), skipped, delimiter


def _records(lines: Iterable[str], path: Path, delimiter: str, skipped: int) -> Iterator[list[str]]:
    """Yield the records that hold anything, all with as many values as the first."""
    reader, width = csv.reader(lines, delimiter=delimiter, strict=True), 0
    try:
        for record in reader:
            if not any(record):
                continue
            width = width or len(record)
            if len(record) != width:
                raise FedspanError(
                    f"{path}, line {skipped + reader.line_num}, has {len(record)} values: "
                    f"expected {width}, as in the header"
                )
            yield record
    except csv.Error as error:
        raise FedspanError(f"{path}, line {skipped + reader.line_num}, is not valid CSV: {error}") from None


def _columns(records: Iterator[list[str]], kept: Sequence[int], path: Path) -> list[Strings]:
    builders, done = [StringsBuilder() for _ in kept], 0
    batch: list[list[str]] = []

    def add() -> None:
        for place, builder in zip(kept, builders, strict=True):
            builder.extend([record[place] for record in batch])
        batch.clear()

    for record in records:
        batch.append(record)
        if len(batch) == _ROWS_AT_ONCE:
            done += len(batch)
            add()
            report(f"reading {path.name}", done)
    if batch:
        add()
    return [builder.build() for builder in builders]
