"""CPU seconds of a client-step of MiniLM's shape: plain loop, batches whole and in parts, upper layers, kept states.

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
from fedspan.client.setup import find_prefix
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


def _arms(base: Path, data: Encoded, precision: str) -> dict[str, Arm]:
    whole, still = minilm.load(base, _CPU), _still(base)
    upper, kept = (_still(base, tuple(range(minilm.LAYERS // 2, minilm.LAYERS))) for _ in range(2))
    find_prefix(kept, data, EngineConfig())
    plain = minilm.PlainLoop(base, _CPU, list(whole.layers))
    (client,) = minilm.clients(whole, 1)
    batches = minilm.batches_of(data, client)
    dropping, everywhere, above, below_kept = (
        _arm(model, data, "sequential", 1, precision) for model in (whole, still, upper, kept)
    )
    return {
        "plain loop": lambda _: print(plain.train(client.broadcast.adapter, batches), file=sys.stderr),
        "sequential": dropping,
        "without dropout, whole batches": _whole(everywhere),
        "without dropout": everywhere,
        "upper half, whole batches": _whole(above),
        "upper half": above,
        "upper half, kept states": below_kept,
    }


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
