"""The scaling suite: time and peak memory of a server step as clients and layers grow, updates held or streamed.

Both arms take the same updates from the same source, which makes each of them on demand; making them is part of both
times, and is timed alone as `source`. The floor in bytes is the size of all updates of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fedspan.bench import machine
from fedspan.bench.harness import Arm, Bench, CaseKey, Floor
from fedspan.bench.server_suite import OVERSAMPLING, draw_factors
from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Factors, Template, Update
from fedspan.streaming import aggregate_stream
from fedspan.support.seeding import generator

SUITE = "scaling"
METHOD_NAMES = ("glora", "flexlora", "fedit")
ARMS = ("source", *(f"{name} {how}" for name in METHOD_NAMES for how in ("held", "streamed")))
_POOL = 32
"""Number of different factor pairs from which the clients' updates are made."""


def run(bench: Bench) -> None:
    """Measure growing numbers of clients at one layer, then of layers at a fixed number of clients."""
    for case in _grid(bench.options.quick):
        _measure(bench, case)


def _grid(quick: bool) -> Iterator[CaseKey]:
    d, rank = (256, 8) if quick else (1024, 16)
    for k in (10, 100, 1000) if quick else (10, 100, 1000, 10_000):
        yield {"d": d, "r": rank, "layers": 1, "K": k}
    for layers in (4,) if quick else (4, 16, 64):
        yield {"d": d, "r": rank, "layers": layers, "K": 100}


@dataclass(frozen=True, slots=True)
class SyntheticUpdates:
    """The updates of K clients, made on demand and equal at every iteration."""

    pool: list[Factors]
    num_clients: int
    num_layers: int

    def __iter__(self) -> Iterator[Update]:
        for k in range(self.num_clients):
            modules = {}
            for layer in range(self.num_layers):
                f = self.pool[(k + 7 * layer) % len(self.pool)]
                # A cheap change that makes the factors differ between clients, in memory of their own.
                modules[f"layer{layer:03d}"] = Factors(f.b * (1 + (k % 97) / 97), f.a.clone(), f.scaling)
            yield Update(f"client-{k:06d}", 1.0, modules, {})


def _measure(bench: Bench, case: CaseKey) -> None:
    if not bench.missing(SUITE, case, ARMS):
        return
    d, rank, layers, k = (int(case[name]) for name in ("d", "r", "layers", "K"))
    device = bench.options.device
    source = SyntheticUpdates(draw_factors(d, rank, _POOL, device), k, layers)
    template = Template({f"layer{i:03d}": (d, d) for i in range(layers)}, rank, alpha=16.0)
    num_bytes = 4.0 * k * layers * 2 * d * rank
    arms = [Arm("source", partial(_drain, source))]
    for name in METHOD_NAMES:
        method = METHODS[name]()
        state = method.init(template, {})
        if bench.fits(4 * num_bytes):
            arms.append(_arm(f"{name} held", partial(_held, method, state, source), device))
        else:
            bench.skip(SUITE, case, f"{name} held", f"the updates alone take {num_bytes / 2**30:.1f} GiB")
        arms.append(_arm(f"{name} streamed", partial(_streamed, method, state, source), device))
    floor = Floor(num_bytes, 4 * 2.0 * 2 * d * k * layers * rank * (rank + OVERSAMPLING))  # as in the server suite
    bench.measure(SUITE, case, arms, floor=floor, check=_agreement)


def _arm(name: str, work: Callable[[], ServerState], device: torch.device) -> Arm:
    def run() -> tuple[ServerState, int]:
        before = machine.start_peak(device)
        state = work()
        return state, machine.peak(device) - before

    return Arm(name, run, details=_memory)


def _memory(output: tuple[ServerState, int]) -> Mapping[str, int]:
    return {"peak_bytes": output[1]}


def _drain(source: SyntheticUpdates) -> None:
    for _ in source:
        pass


def _held(method: Method, state: ServerState, source: SyntheticUpdates) -> ServerState:
    return aggregate(method, state, list(source))[0]


def _streamed(method: Method, state: ServerState, source: SyntheticUpdates) -> ServerState:
    return aggregate_stream(method, state, source)[0]


def _agreement(outputs: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the relative distance of each streamed result from the held one, as products with 8 random vectors."""
    agreement: dict[str, Mapping[str, float]] = {}
    for name in METHOD_NAMES:
        if f"{name} held" not in outputs or f"{name} streamed" not in outputs:
            continue
        products = [_products(outputs[f"{name} {how}"][0]) for how in ("held", "streamed")]
        pairs = zip(*products, strict=True)
        distance = max(float((x - y).norm() / x.norm()) for x, y in pairs)
        agreement[f"{name} streamed"] = {"distance": distance, "agrees": distance <= 0.05}
    return agreement


def _products(state: ServerState) -> list[torch.Tensor]:
    products = []
    for module in state.modules.values():
        left, right = (module["u"], module["c"]) if "u" in module else (module["b"], module["a"])
        x = torch.randn((right.shape[1], 8), generator=generator("bench", "probe")).to(right.device)
        products.append(left @ (right @ x))
    return products
