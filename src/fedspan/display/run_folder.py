"""The records of a run folder, for tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedspan.support.errors import FedspanError


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary (empty while the run is unfinished) and the round records of a run folder.

    Raises
    ------
    FedspanError
        When the folder holds no run, or a damaged one.
    """
    history = folder / "metrics.jsonl"
    if not history.exists():
        raise FedspanError(f"{folder} holds no metrics.jsonl: expected the folder of a `fedspan run`")
    summary = folder / "summary.json"
    try:
        rounds = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
        result = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FedspanError(f"{folder}: metrics.jsonl or summary.json is damaged ({error})") from None
    if not all(isinstance(entry, dict) for entry in (result, *rounds)):
        raise FedspanError(f"{folder}: metrics.jsonl or summary.json is damaged: expected JSON objects")
    return result, rounds
