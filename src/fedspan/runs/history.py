"""The records of a run's rounds, one line of JSON each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedspan.support import standard_json
from fedspan.support.files import write_bytes


def write_history(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace `metrics.jsonl` in the run folder.

    The checkpoint holds the same records. The file is rewritten after each round, so that a crash between the two
    writes leaves no record twice and none out.
    """
    lines = [standard_json.dumps(record) + "\n" for record in records]
    write_bytes(folder / "metrics.jsonl", "".join(lines).encode())
