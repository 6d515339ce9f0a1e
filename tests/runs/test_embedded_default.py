"""The quick start on the data in the package: federation pays, on text and on images."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedspan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "rounds", "margin"), [("builtin:tasks", 7, 0.2), ("builtin:digits", 7, 0.1)], ids=["text", "images"]
)
def test_base_is_below_local_is_below_federation(task: str, rounds: int, margin: float, tmp_path: Path) -> None:
    """In little more than half of the default's rounds, by far more than the noise of 128 test examples."""
    overrides = [f"data.task={task}", f"federation.rounds={rounds}", "evaluation.every=100", "data.max_test=128"]
    summary = fedspan.run(fedspan.load_config(overrides=overrides), tmp_path / "run").summary
    assert summary["base"] + 0.05 < summary["local"]
    assert summary["local"] + margin < summary["federated"]
