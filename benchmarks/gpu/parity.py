"""Every method for two rounds of the embedded text task on the CPU and on a GPU: how far their results lie apart."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspan.config import from_mapping
from fedspan.methods import METHODS
from fedspan.runs import checkpoint
from fedspan.runs.execution import run

CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS} | {
    "glora_sums, fixed point": ("glora_sums", {"privacy": {"fixed_point": True}}),
    "glora_sums, secure sums": ("glora_sums", {"privacy": {"secure_sums": True}}),
    "fedavg, secure sums": ("fedavg", {"privacy": {"secure_sums": True}}),
    "glora, nf4": ("glora", {"model": {"quantise": "nf4"}}),
    "glora, dropout": ("glora", {"adapter": {"dropout": 0.1}}),
}
PARTS: dict[str, int | str] = {
    **{"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 0},
    **{"model.norm": 0, "lm_head": 0},
}
"""A map over the only GPU and the CPU."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("cpu", {"name": "auto"}),
    "sequential": ("cuda", {"name": "sequential"}),
    "auto": ("cuda", {"name": "auto"}),
    "mapped": ("auto", {"device_map": "auto"}),
}
MAPPED = ("glora", "flora", "fedavg", "hetlora", "glora, nf4", "glora, dropout")
"""Cases whose base is also laid over several devices."""


def settings(method: str, changes: Mapping[str, Any], device: str, engine: Mapping[str, Any]) -> Any:
    """Return the run's settings."""
    tree: dict[str, Any] = {
        "device": device,
        "federation": {"num_clients": 6, "rounds": 2, "participation": 0.5, "ranks": 8},
        "local": {"steps": 4},
        "evaluation": {"every": 2, "base": False, "local": False, "max_examples": 40},
        "engine": {"workers": 1, "precision": "float32", **engine},
        "method": {"name": method},
    }
    if METHODS[method]().info.optimizer == "sgd":
        tree["local"]["optimizer"] = "sgd"
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    return from_mapping(tree)


def outcome(case: str, arm: str) -> tuple[dict[str, Tensor], list[float]]:
    """Return what a run ends with, where no basis was chosen freely, and its training losses."""
    method, changes = CASES[case]
    device, engine = ARMS[arm]
    if arm == "mapped" and torch.cuda.device_count() < 2:
        engine = {"device_map": PARTS}
    with tempfile.TemporaryDirectory() as folder:
        result = run(settings(method, changes, device, engine), Path(folder) / "run")
        saved = checkpoint.read(result.out / "checkpoint" / "federation.safetensors")
        losses = [float(record["train_loss"]) for record in result.history]
        kept = {f"dense/{name}": value for name, value in saved.state.dense.items()}
        if result.adapter is not None:
            kept |= _products(result.adapter)
        elif saved.client_states:
            kept |= {
                f"{client}/{name}": value
                for client, own in saved.client_states.items()
                for name, value in own.items()
                if isinstance(value, Tensor)
            }
    return kept, losses


def _products(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    held = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in held.items():
        if ".lora_A." in name:
            found[name] = held[name.replace(".lora_A.", ".lora_B.")].double() @ a.double()
    return found


@functools.cache
def _on_cpu(case: str) -> tuple[dict[str, Tensor], list[float]]:
    return outcome(case, "cpu")


@functools.cache
def _on_gpu(case: str) -> tuple[dict[str, Tensor], list[float]]:
    return outcome(case, "sequential")


def compare(case: str, arm: str) -> dict[str, Any]:
    """Return the largest relative distances between an arm's results and the CPU's."""
    wanted, losses = _on_cpu(case)
    found, own = _on_gpu(case) if arm == "sequential" else outcome(case, arm)
    assert found.keys() == wanted.keys()
    loss = max((abs(x - y) / abs(y) for x, y in zip(own, losses, strict=True)), default=0.0)
    distances = {"relative_distance": _distance(found, wanted), "loss_distance": loss, "tensors": len(wanted)}
    if arm != "sequential":
        distances["from_sequential_on_the_gpu"] = _distance(found, _on_gpu(case)[0])
    return distances


def _distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    total = sum(float(t.double().square().sum()) for t in wanted.values()) ** 0.5
    return sum(float((found[n].double() - t.double()).square().sum()) for n, t in wanted.items()) ** 0.5 / total


def both(case: str) -> dict[str, dict[str, Any]]:
    """Return the comparisons of one case; an error is a result too."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for arm in ("sequential", "auto", *(["mapped"] if case in MAPPED else [])):
        try:
            found[arm] = compare(case, arm)
        except Exception as error:
            found[arm] = {"error": f"{type(error).__name__}: {error}"[:400]}
    return found
