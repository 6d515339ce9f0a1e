"""CPU seconds of a client-step of MiniLM's shape: plain loop, batches whole, in parts, packed; half of the layers.

    python benchmarks/speed/minilm.py [--repeats 3] [--precision bfloat16] >> minilm.jsonl

Base and rows are those of benchmarks/gpu/minilm.py. The arms take turns; the figures are CPU seconds of this process,
which has one thread, so that other work on the machine disturbs them less than wall time, which is recorded too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import minilm

from fedspan.client import cohort, length_parts
from fedspan.client.setup import find_packed, find_prefix
from fedspan.config import EngineConfig
from fedspan.data import Encoded
from fedspan.models import FederatedModel, build
from fedspan.models.selection import Selection

_CPU = torch.device("cpu")
Arm = Callable[[int], None]


def _still(base: Path, layers: tuple[int, ...] = ()) -> FederatedModel:
    """Return the base without its dropout, with adapters in these layers; none: in all."""
    return build(
        str(base),
        "classification",
        trains="adapter",
        num_labels=2,
        selection=Selection(layers=layers) if layers else Selection(),
        max_rank=minilm.RANK,
        rslora=False,
        dropout=0.0,
        dtype="float32",
        device=_CPU,
        seed=0,
        base_dropout=False,
    )


def _whole(train: Arm) -> Arm:
    """Return the same work with batches that are not cut by length."""

    def work(round_num: int) -> None:
        bound, length_parts.WIDEST = length_parts.WIDEST, 2**62
        try:
            train(round_num)
        finally:
            length_parts.WIDEST = bound

    return work


def _arm(model: FederatedModel, data: Encoded, engine: str, count: int, precision: str) -> Arm:
    chosen, group = minilm.settings(engine, precision=precision), minilm.clients(model, count)

    def train(round_num: int) -> None:
        if engine == "cohort":
            cohort.work(model, data, group, chosen, round_num)
        else:
            for one in group:
                cohort.work(model, data, [one], chosen, round_num)

    return train


def _packed(model: FederatedModel, data: Encoded) -> FederatedModel:
    """Return the model, which from now on computes the rows of a batch end to end."""
    find_packed(model, data, EngineConfig(), minilm.BATCH)
    assert model.packed is not None
    return model


def _arms(base: Path, data: Encoded, precision: str) -> dict[str, Arm]:
    half = tuple(range(minilm.LAYERS // 2, minilm.LAYERS))
    dropping = minilm.load(base, _CPU)
    plain = minilm.PlainLoop(base, _CPU, list(dropping.layers))
    (client,) = minilm.clients(dropping, 1)
    batches = minilm.batches_of(data, client)
    models = {
        "sequential": dropping,
        "without dropout, in parts": _still(base),
        "upper half, in parts": _still(base, half),
    }
    models["upper half, kept states, in parts"] = _still(base, half)
    models["without dropout, packed"] = _packed(_still(base), data)
    models["upper half, packed"] = _packed(_still(base, half), data)
    models["upper half, kept states, packed"] = _packed(_still(base, half), data)
    for name, model in models.items():
        if "kept states" in name:
            find_prefix(model, data, EngineConfig())
    arms = {name: _arm(model, data, "sequential", 1, precision) for name, model in models.items()}
    arms |= {f"{name}, whole batches": _whole(arms[f"{name}, in parts"]) for name in ("without dropout", "upper half")}
    return {"plain loop": lambda _: print(plain.train(client.broadcast.adapter, batches), file=sys.stderr), **arms}


def main() -> None:
    """Time the arms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of all but the plain loop"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = minilm.write_base(Path(folder))
        arms = _arms(base, minilm.sentences(base, minilm.ROWS_EACH), given.precision)
        for repeat in range(given.repeats):
            for name, train in arms.items():
                began, used = time.perf_counter(), time.process_time()
                train(repeat)
                figures = {"cpu": time.process_time() - used, "wall": time.perf_counter() - began}
                line = {"arm": name, "precision": given.precision, "repeat": repeat, "load": os.getloadavg()[0]}
                print(json.dumps(line | {k: v / minilm.STEPS for k, v in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
