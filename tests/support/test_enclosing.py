"""A folder inside a run folder, given in the run's place, is answered with the run's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedspan import inspection, reporting
from fedspan.api import resume
from fedspan.runs.trained import find_trained
from fedspan.support.enclosing import enclosing_run
from fedspan.support.errors import FedspanError


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine/adapters/client-0").mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl"):
        (tmp_path / "runs/mine" / name).touch()
    return Path("runs/mine")


@pytest.mark.parametrize(
    "command",
    [lambda folder: reporting.read([folder]), resume, inspection.read, find_trained],
    ids=["report", "resume", "inspect", "evaluate"],
)
def test_commands_name_the_run(run: Path, command: Callable[[Path], Any]) -> None:
    with pytest.raises(FedspanError, match=r"; the run is runs/mine$"):
        command(run / "adapters/client-0")


def test_only_a_run_is_named(run: Path) -> None:
    assert enclosing_run(run / "adapter") == enclosing_run(run / "adapters/client-0") == "; the run is runs/mine"
    assert enclosing_run(run.absolute() / "adapter") == f"; the run is {run.absolute()}"
    Path("config.toml").touch()  # of a server, above its runs
    assert enclosing_run(run) == enclosing_run(Path("elsewhere")) == ""
