"""`fedspan run --engine flower-simulation`: the deployment's server and sites through Flower's simulation engine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

import fedspan
from fedspan.flower import simulation
from fedspan.runs.events import Event


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes inherit this one's environment."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # which Flower sets for good


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs flwr[simulation]")
def test_a_simulated_federation_has_the_bits_of_the_in_process_one(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """A method of several exchanges, whose sites must still hold what they learnt when they are asked again."""
    config = tiny.config(
        bases["llama"],
        texts,
        "glora_sums",
        federation={"ranks": [2, 4, 3, 4], "participation": 1.0},
        engine={"name": "sequential", "workers": 1},
    )
    events: list[Event] = []
    simulated = simulation.run(config, tmp_path / "simulated", events.append)
    alone = fedspan.run(config, tmp_path / "alone")
    assert simulated.adapter is not None
    assert alone.adapter is not None
    name = "adapter_model.safetensors"
    tiny.same(load_file(simulated.adapter / name), load_file(alone.adapter / name))
    for there, here in zip(simulated.history, alone.history, strict=True):
        assert there["num_clients"] == here["num_clients"] == 4
        assert there["train_loss"] == here["train_loss"]
        assert there["eval"] == here["eval"]
        assert not there["rejected"]
    assert simulated.summary["federated"] == alone.summary["federated"]
    assert events[-1].kind == "end"
    assert not alone_processes()


def alone_processes() -> list[str]:
    """Processes that Ray left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parts = path.read_text().rsplit(")", 1)
            state, parent = parts[1].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z" and "ray" in parts[0]:
            found.append(parts[0])
    return found


def test_without_ray_it_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(ValueError, match=r"needs Ray: pip install 'flwr\[simulation\]") as refused:
        simulation.run(fedspan.Config(), tmp_path / "run", lambda event: None)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
