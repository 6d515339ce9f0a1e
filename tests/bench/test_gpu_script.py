"""The GPU script measures all of its parts, and a server's step on a CPU too."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="installed without the repository")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("measure")


def test_all_parts_are_measured_unless_some_are_named(measure: ModuleType) -> None:
    default = re.search(r'"\$\{@:-([a-z ]+)\}"', (FOLDER / "run.sh").read_text(encoding="utf-8"))
    assert default is not None
    assert default[1].split() == [*measure.PARTS]


def test_server_steps_on_a_cpu(measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small layers: every line has a time, and layers together come to what each comes to alone."""
    layers = {"q": (96, 64), "v": (96, 64), "down": (64, 160)}
    monkeypatch.setattr(measure, "SEVEN_B", layers)
    lines = measure.Lines(tmp_path / "lines.jsonl")
    measure.servers(lines, torch.device("cpu"), tmp_path)
    found = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(found) == 3 * 3 + 2
    assert not [line for line in found if "error" in line]
    assert all(line["seconds"] > 0 and line["reading_seconds"] > 0 for line in found)
    apart = [line["largest_distance"] for line in found if "largest_distance" in line]
    assert len(apart) == 2
    assert max(apart) < 1e-3
