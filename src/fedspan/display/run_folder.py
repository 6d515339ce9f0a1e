"""The records of a run folder, for tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from fedspan.support.enclosing import enclosing_run
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.paths import lacks

_OBJECT, _NUMBER = dict | None, int | float
_ROUND: Mapping[str, type | UnionType] = {
    "round_num": int,
    "method": str,
    "bytes_up": _NUMBER,
    "bytes_down": _NUMBER,
    "eval": _OBJECT,
    "diagnostics": _OBJECT,
}
_SUMMARY: Mapping[str, type | UnionType] = {"metric": str, "metrics": dict}
_NAMES: Mapping[type | UnionType, str] = {
    int: "a number",
    _NUMBER: "a number",
    str: "a text",
    dict: "an object",
    _OBJECT: "an object, or null",
}

_OPTIONAL = {"bytes_up", "bytes_down"}  # which pictures need, and they say so


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary (empty while the run is unfinished) and the round records of a run folder.

    Raises
    ------
    FedspanError
        When the folder holds no run, or a damaged one.
    """
    history = folder / "metrics.jsonl"
    if not history.exists():
        raise FedspanError(
            f"{lacks(folder, 'metrics.jsonl')}: expected the folder of a `fedspan run`{enclosing_run(folder)}"
        )
    summary = folder / "summary.json"
    try:
        rounds = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
        result = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise FedspanError(f"{folder}: metrics.jsonl or summary.json is damaged ({one_line(error, 200)})") from None
    if not all(isinstance(entry, dict) for entry in (result, *rounds)):
        raise FedspanError(f"{folder}: metrics.jsonl or summary.json is damaged: expected JSON objects")
    for record in rounds:
        _check(folder / "metrics.jsonl", record, _ROUND)
    if summary.exists():
        _check(summary, result, _SUMMARY)
    return result, rounds


def _check(file: Path, record: dict[str, Any], expected: Mapping[str, type | UnionType]) -> None:
    """Refuse a record that lacks what tables and pictures show, or holds something of another kind."""
    for key, kind in expected.items():
        if key not in record and key in _OPTIONAL:
            continue
        if not isinstance(record.get(key), kind):
            given = one_line(repr(record.get(key)), 60)
            raise FedspanError(f"{file} is damaged: {key} is {given}: expected {_NAMES[kind]}")
