"""The clients suite: the time of local training, client by client and with many clients in one pass.

Every arm trains LoRA adapters on all linear layers of a Llama of 4 layers, on the same batches. An arm runs in one
process or, with `x2` in its name, splits the clients between two processes of one thread each, which is the fair
comparison on two cores. Figures are seconds per client-step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedspan.bench import tiny
from fedspan.bench.harness import Arm, Bench, CaseKey, Timed
from fedspan.bench.process_pool import ProcessPool, TrainingCase

SUITE = "clients"
LENGTH = 32
LAYERS = 4
RANKS = {"8": (8,), "2-16": (2, 4, 8, 16)}
"""The case's `ranks` by name; clients take them in turn."""
SEQUENTIAL = ("plain", "trainer", "sequential")
"""Arms whose time per client-step does not depend on the number of clients: timed on at most 8 of them."""


def run(bench: Bench) -> None:
    """Measure all cases, on models written to a temporary folder."""
    cases = [c for c in _grid(bench.options.quick) if bench.missing(SUITE, c, list(_arms(bench, c)))]
    if not cases:
        return
    with tempfile.TemporaryDirectory() as folder, ProcessPool(bench.options) as pool:
        for case in cases:
            _measure(bench, case, pool, Path(folder))


def _grid(quick: bool) -> Iterator[CaseKey]:
    hiddens, batches, counts = ((64,), (1, 4), (8,)) if quick else ((64, 128, 256, 512), (1, 4, 16), (1, 8, 32))
    for hidden in hiddens:
        for batch in batches:
            for k in counts:
                yield {"hidden": hidden, "batch": batch, "K": k, "ranks": "8", "steps": 4 if quick else 10}
            if batch == 1 or not quick:
                yield {"hidden": hidden, "batch": batch, "K": 8, "ranks": "2-16", "steps": 4 if quick else 10}


def _arms(bench: Bench, case: CaseKey) -> dict[str, tuple[str, int, int]]:
    """Return arm -> (engine, processes, clients)."""
    k, many = int(case["K"]), bench.options.processes
    arms = {name: (name, 1, min(k, 8)) for name in SEQUENTIAL} | {"cohort": ("cohort", 1, k)}
    if k >= many > 1:
        both = {"plain": 8, "sequential": 8, "cohort": k}
        arms |= {f"{name} x{many}": (name, many, min(k, most)) for name, most in both.items()}
    return arms


def _measure(bench: Bench, case: CaseKey, pool: ProcessPool, folder: Path) -> None:
    hidden, k = int(case["hidden"]), int(case["K"])
    base = folder / f"llama-{hidden}"
    if not base.exists():
        tiny.llama(base, hidden, LAYERS, 2 * LENGTH)
    training = TrainingCase(str(base), int(case["batch"]), int(case["steps"]), LENGTH, k, RANKS[str(case["ranks"])])
    arms = []
    for name, (engine, processes, clients) in _arms(bench, case).items():
        arms.append(
            Arm(
                name,
                partial(_train, pool, training, engine, processes, clients),
                per=clients * training.steps,
                prepare=partial(pool.prepare, training, engine, processes),
                details=_details,
            )
        )
    bench.measure(SUITE, case, arms, check=_agreement, calibrate=pool.calibrate)


def _train(pool: ProcessPool, training: TrainingCase, engine: str, processes: int, clients: int) -> Timed:
    seconds, losses = pool.train(training, engine, processes, clients)
    return Timed(seconds, losses)


def _details(losses: list[float]) -> Mapping[str, Any]:
    return {"train_loss": sum(losses) / len(losses), "clients": len(losses)}


def _agreement(outputs: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the largest relative difference of a client's mean training loss from the sequential engine's."""
    reference = outputs.get("sequential") or next(iter(outputs.values()))
    agreement: dict[str, Mapping[str, float]] = {}
    for name, losses in outputs.items():
        # Arms that train fewer clients train the first ones.
        pairs = list(zip(losses, reference, strict=False))
        distance = max(abs(x - y) / abs(y) for x, y in pairs)
        agreement[name] = {"distance": distance, "agrees": distance <= 1e-3}
    return agreement
