"""JSON and JSONL files as columns: every row an object, its keys the names of the columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspan.data.sources import text_of
from fedspan.data.strings import ColumnBuilder
from fedspan.support.activity import report
from fedspan.support.errors import FedspanError

ABSENT = object()
"""The value of a key that one row lacks although others have it."""
_SAY_EVERY = 8192
_BLANK = " \t\n\r"


def columns_of(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, Sequence[Any]]:
    """Return the columns of one mapping per row; a key that only some rows have is `ABSENT` in the others.

    Parameters
    ----------
    name
        Of the file, for the display.
    """
    builders: dict[str, ColumnBuilder] = {}
    for done, row in enumerate(rows):
        for key in row:
            if key not in builders:
                builders[key] = ColumnBuilder()
                for _ in range(done):
                    builders[key].append(ABSENT)
        for key, builder in builders.items():
            builder.append(row.get(key, ABSENT))
        if done and done % _SAY_EVERY == 0:
            report(f"reading {name}", done)
    return {key: builder.build() for key, builder in builders.items()}


def read_jsonl(path: Path, encoding: str) -> dict[str, Sequence[Any]]:
    """Return the columns of a file with one object a line; blank lines are left out.

    Raises
    ------
    FedspanError
        Naming the line that is no object.
    """
    # Only "\n" ends a row: other ends of lines may stand inside JSON strings.
    with text_of(path, encoding, newline="\n") as text:
        return columns_of(_lines(text, path), path.name)


def _lines(text: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number may have too many digits, brackets too many levels
            raise FedspanError(f"{path}, line {number}, is not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise FedspanError(f"{path}, line {number}, is {line.strip()[:40]}: expected an object with named columns")
        yield record


def read_json(path: Path, encoding: str) -> dict[str, Sequence[Any]]:
    """Return the columns of a list of objects.

    Raises
    ------
    FedspanError
        When the file holds anything else.
    """
    with text_of(path, encoding, newline="\n") as stream:
        text = stream.read()
    try:
        return columns_of(_items(text, path), path.name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FedspanError):
            raise
        hint = " (one object a line is .jsonl)" if "Extra data" in str(error) else ""
        raise FedspanError(f"{path} is not valid JSON: {error}{hint}") from None


def _items(text: str, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list one at a time, so that they are never all in memory beside the columns."""
    decoder, place = json.JSONDecoder(), _after_blanks(text, 0)
    expected = f"{path} is not a list of objects: expected [{{column: value, …}}, …]"
    if text[place : place + 1] != "[":
        json.loads(text)  # which says what is wrong with it, if it is no JSON at all
        raise FedspanError(expected)
    place = _after_blanks(text, place + 1)
    while text[place : place + 1] != "]":
        record, place = decoder.raw_decode(text, place)
        if not isinstance(record, dict):
            raise FedspanError(expected)
        yield record
        place = _after_blanks(text, place)
        if text[place : place + 1] == ",":
            place = _after_blanks(text, place + 1)
            if text[place : place + 1] == "]":
                raise json.JSONDecodeError("Expecting value", text, place)
        elif text[place : place + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    place = _after_blanks(text, place + 1)
    if place < len(text):
        raise json.JSONDecodeError("Extra data", text, place)


def _after_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BLANK:
        place += 1
    return place
