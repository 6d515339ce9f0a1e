"""The summary has the same keys and values in Python as in `summary.json`, and those that its type says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tiny

from fedspan.runs.execution import Result, resume, run
from fedspan.runs.summary import ClientEntry, Metrics, Summary, Totals

MIXED = {"federation": {"ranks": [1, 8, 2, 4]}, "data": {"client_holdout": 0.2}}
EQUAL = {"federation": {"ranks": 4}, "data": {"client_holdout": 0.2}}
RUNS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("glora", MIXED | {"evaluation": {"local": True}}, {"server", "clients", "per_rank", "own_data"}),
    ("fedsa_lora", EQUAL, {"clients", "own_data"}),
    ("fedavg", EQUAL, {"server", "clients", "own_data"}),
    ("centralised", EQUAL, {"server", "clients", "own_data"}),
    ("local", {"local": {"learning_rate": 1e30, "steps": 1}}, {"clients"}),
]


def on_disk(result: Result) -> Any:
    return json.loads((result.out / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "sections", "final"), RUNS, ids=[name for name, _, _ in RUNS])
def test_the_summary_is_the_file(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str, sections: dict[str, Any], final: set[str]
) -> None:
    """Also where figures diverge, which are null in both."""
    result = run(tiny.config(bases["bert"], texts, name, **sections), tmp_path / "run")
    assert on_disk(result) == result.summary
    assert result.summary.keys() == get_type_hints(Summary).keys()
    assert result.summary["totals"].keys() == get_type_hints(Totals).keys()
    assert all(client.keys() == get_type_hints(ClientEntry).keys() for client in result.summary["clients"])
    metrics = result.summary["metrics"]
    assert metrics.keys() == {"base", "local"} | final <= get_type_hints(Metrics).keys()
    again = resume(tmp_path / "run")
    assert on_disk(again) == again.summary
    for summary in (result.summary, again.summary):
        summary["totals"]["wall_seconds"] = 0.0
    assert again.summary == result.summary


def test_ranks_are_strings_in_both(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    summary = run(tiny.config(bases["bert"], texts, "glora", **MIXED), tmp_path / "run").summary
    assert list(summary["per_rank"]) == list(summary["metrics"]["per_rank"]) == ["1", "2", "4", "8"]
    for rank, figures in summary["metrics"]["per_rank"].items():
        assert summary["per_rank"][rank] == figures["accuracy"]
