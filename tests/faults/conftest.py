"""The table of outcomes: one line for each fault, and the page that they are written to."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
FIRST, LAST = "<!-- outcomes -->", "<!-- end of outcomes -->"
COLUMNS = ("fault", "what the run did", "what the server said", "seconds")

Outcome = Callable[..., None]


def table(lines: list[dict[str, Any]]) -> str:
    """The outcomes as a table of Markdown."""

    def cell(value: object) -> str:
        return " ".join(str(value).split()).replace("|", "\\|")

    rows = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    rows += [f"| {' | '.join(cell(line[column]) for column in COLUMNS)} |" for line in lines]
    return "\n".join(rows)


def read_page() -> list[dict[str, Any]]:
    """The lines of the table that the page has."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
    rows = [line for line in rest.partition(LAST)[0].splitlines() if line.startswith("| ")][1:]
    cells = [[cell.replace("\\|", "|") for cell in re.split(r" (?<!\\)\| ?", row[2:].strip())] for row in rows]
    return [dict(zip(COLUMNS, row, strict=False)) for row in cells]


def write_page(lines: list[dict[str, Any]]) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(FIRST)
    _, _, after = rest.partition(LAST)
    PAGE.write_text(f"{before}{FIRST}\n\n{table(lines)}\n\n{LAST}{after}", encoding="utf-8")


def with_new(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old lines with the new ones in the places of those of the same fault, others at the end."""
    by_fault = {line[COLUMNS[0]]: line for line in old} | {line[COLUMNS[0]]: line for line in new}
    return list(by_fault.values())


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    """Records one outcome. At the end they replace their lines of the page, or all lines if every fault was tested."""
    path = tmp_path_factory.mktemp("outcomes") / "outcomes.jsonl"

    def record(fault: str, did: str, said: str, seconds: float) -> None:
        line = dict(zip(COLUMNS, (fault, did, said, f"{seconds:.0f}"), strict=True))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line))

    began = time.monotonic()
    yield record
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    print(f"{len(lines)} outcomes in {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}")
    tests = [item for item in request.session.items if "faults" in item.keywords]
    everything = not request.config.option.keyword and not any("::" in given for given in request.config.args)
    everything = everything and {item.path for item in tests} == set(Path(__file__).parent.glob("test_*.py"))
    if everything and tests and not request.session.testsfailed:
        write_page(lines)
    elif lines:
        write_page(with_new(read_page(), lines))
