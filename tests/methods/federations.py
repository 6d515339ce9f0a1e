"""Random federations for the laws, and a dense float64 oracle that shares no code with the library.

Shapes: B (m, r), A (r, n). Everything is drawn by numpy from a seed; hypothesis chooses the seed and the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fedspan.lowrank import LowRank
from fedspan.methods import METHODS
from fedspan.methods.base import Method, MethodInfo, ServerState, aggregate
from fedspan.methods.messages import Diagnostics, Factors, Request, Template, Update

Array = np.ndarray[Any, np.dtype[np.float64]]
Dense = dict[str, Array]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
"""Relative Frobenius error; half-precision factors are accumulated in float32."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "energy": {"basis": "energy"},
    "both": {"sides": "both"},
    "both-energy": {"sides": "both", "basis": "energy"},
    "nested": {"readout": "nested"},
    "innovation": {"update": "innovation"},
    "innovation-energy": {"update": "innovation", "basis": "energy"},
    "state": {"start": "state"},
    "state-energy": {"start": "state", "basis": "energy"},
    "auto": {"server_rank": "auto", "tolerance": 1e-14},
    "randomized": {"algebra": "randomized"},
    "randomized-energy": {"algebra": "randomized", "basis": "energy"},
    "randomized-both": {"algebra": "randomized", "sides": "both"},
    "randomized-innovation": {"algebra": "randomized", "update": "innovation"},
    "randomized-state": {"algebra": "randomized", "start": "state"},
}


@dataclass(frozen=True)
class Case:
    """One row of the table that drives the laws: a method with its options."""

    id: str
    make: Callable[[], Method]

    @property
    def info(self) -> MethodInfo:
        return self.make().info

    @property
    def frozen_a(self) -> bool:
        """The clients train B alone, on an A that the server gave to all of them."""
        method = self.make()
        sent = method.broadcast(method.init(Template({"x": (2, 2)}, 1), {}), Request(None))
        return not sent.recipe.train_a


CASES = [Case(name, factory) for name, factory in METHODS.items()] + [
    Case(f"glora-{name}", lambda options=options: METHODS["glora"](**options)) for name, options in VARIANTS.items()
]
FEDERATED = [case for case in CASES if not case.info.pooled and not case.info.personalised]
ADAPTER = [case for case in FEDERATED if case.info.trains == "adapter"]


@dataclass(frozen=True)
class Federation:
    """One round's clients, as they come back from training."""

    method: Method
    template: Template
    state: ServerState
    updates: tuple[Update, ...]
    dtype: torch.dtype

    @property
    def ideal(self) -> Dense:
        """T = Σ p_k s_k B_k A_k, or Σ p_k (W_k − W) where weights are trained."""
        return {name: weighted_sum(self, lambda u, n=name: self.delta_of(u, n)) for name in self.template.modules}

    def delta_of(self, update: Update, name: str) -> Array:
        """One client's own ΔW, with α/r worked out here."""
        if self.method.info.trains != "adapter":
            return array(update.dense[name]) - array(self.state.dense[name])
        f = update.factors(name)
        scaling = self.template.alpha / (np.sqrt(f.rank) if self.template.rslora else f.rank)
        return scaling * array(f.b) @ array(f.a)


def array(x: torch.Tensor) -> Array:
    return x.double().numpy()


def weighted_sum(fed: Federation, value: Callable[[Update], Array]) -> Array:
    counts = np.array([u.num_examples for u in fed.updates], dtype=np.float64)
    return sum(p * value(u) for p, u in zip(counts / counts.sum(), fed.updates, strict=True))


def build(
    case: Case | Method,
    seed: int = 0,
    shapes: Sequence[tuple[int, int]] = ((7, 7), (9, 5)),
    ranks: Sequence[int] = (2, 3),
    counts: Sequence[float] = (30, 10),
    alpha: float = 16.0,
    rslora: bool = False,
    dtype: torch.dtype = torch.float64,
    silent: Sequence[int] = (),
    server_rank: int | None = None,
) -> Federation:
    """Clients with Gaussian factors (or weights) and a head; those in `silent` have B = 0."""
    method = case.make() if isinstance(case, Case) else case
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    modules = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    # "At sufficient rank": the server may keep as many directions as all clients together name.
    largest = max(ranks) if not method.info.hetero_rank else sum(ranks)
    template = Template(modules, server_rank or largest, alpha, rslora, seed)
    weights = modules if method.info.trains != "adapter" else {}
    base = {name: draw(*shape) for name, shape in weights.items()} | {"head": draw(3, 4)}
    state = method.init(template, base)
    updates = []
    for k, (rank, count) in enumerate(zip(ranks, counts, strict=True)):
        sent = method.start(method.broadcast(state, Request(rank)), None)
        factors = {}
        for name, f in sent.adapter.items():
            b, a = draw(f.b.shape[0], rank), draw(rank, f.a.shape[1])
            b = torch.zeros_like(b) if k in silent else b
            frozen = f.a.to(torch.promote_types(dtype, f.a.dtype))
            factors[name] = Factors(b, a if sent.recipe.train_a else frozen, f.scaling)
        dense = {name: draw(*value.shape) for name, value in base.items()}
        updates.append(Update(f"client{k}", count, factors, dense))
    return Federation(method, template, state, tuple(updates), dtype)


@st.composite
def federations(draw: st.DrawFn, case: Case, min_clients: int = 1, max_clients: int = 5, **fixed: Any) -> Federation:
    """Square, tall and wide layers, mixed ranks where the method takes them, any α, unequal counts."""
    num = draw(st.integers(min_clients, max_clients))
    size = st.integers(2, 12)
    square = draw(size)
    rank = st.integers(1, 6)
    ranks = draw(st.lists(rank, min_size=num, max_size=num)) if case.info.hetero_rank else [draw(rank)] * num
    drawn: dict[str, Any] = {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "shapes": [(square, square), (draw(size), draw(size))],
        "ranks": ranks,
        "counts": draw(st.lists(st.integers(1, 5000), min_size=num, max_size=num)),
        "alpha": draw(st.sampled_from([0.5, 8.0, 16.0, 64.0])),
        "rslora": draw(st.booleans()),
        "silent": draw(st.sets(st.integers(0, num - 1), max_size=num - 1)),
    }
    return build(case, **{**drawn, **fixed})


def encoded(fed: Federation, updates: Sequence[Update] | None = None) -> list[Update]:
    """What leaves the sites."""
    method, sent = fed.method, []
    for update in fed.updates if updates is None else updates:
        rank = next((update.factors(name).rank for name in update.modules), None)
        start = method.start(method.broadcast(fed.state, Request(rank)), None)
        sent.append(method.encode(update, start, None)[0])
    return sent


def served(fed: Federation, updates: Sequence[Update] | None = None) -> tuple[ServerState, Diagnostics]:
    """The state after the round, and the diagnostics."""
    return aggregate(fed.method, fed.state, encoded(fed, updates))


def received(fed: Federation, state: ServerState, rank: int | None = None) -> Dense:
    """What a client of that rank adds to its original base: adapter and patch, or the new weights minus the old."""
    sent = fed.method.broadcast(state, Request(rank))
    total: Dense = {}
    for name, shape in fed.template.modules.items():
        total[name] = np.zeros(shape)
        if name in sent.adapter:
            f = sent.adapter[name]
            total[name] = total[name] + f.scaling * array(f.b) @ array(f.a)
        if name in sent.patch:
            patch = sent.patch[name]
            total[name] = total[name] + (
                array(patch.b) @ array(patch.a) if isinstance(patch, LowRank) else array(patch)
            )
        if name in sent.dense:
            total[name] = total[name] + array(sent.dense[name]) - array(fed.state.dense[name])
    return total


def assert_same(actual: Dense, expected: Dense, tolerance: float, size: float = 0.0) -> None:
    """Relative Frobenius error of every module at most `tolerance`; `size` where rounding follows larger terms."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(actual[name] - value)
        allowed = tolerance * max(float(np.linalg.norm(value)), size)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def distance(x: Dense, y: Dense) -> float:
    """Relative to y, over all modules."""
    top = sum(np.linalg.norm(x[name] - y[name]) ** 2 for name in y) ** 0.5
    return float(top / sum(np.linalg.norm(value) ** 2 for value in y.values()) ** 0.5)


def gauge(rng: np.random.Generator, rank: int, condition: float) -> Array:
    """A random invertible matrix of that condition number."""
    left, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    # Two singular values at least, or a rank-1 gauge would be a sign.
    spread = np.logspace(0, -np.log10(condition), rank) if rank > 1 else np.array([condition**-0.5])
    return left * spread @ right


def regauged(fed: Federation, make: Callable[[int, int], Array]) -> Federation:
    """Every client's pairs re-factored as (B G, G⁻¹ A) with G = make(client, rank)."""
    updates = []
    for k, update in enumerate(fed.updates):
        modules = {}
        for name in update.modules:
            f = update.factors(name)
            g = make(k, f.rank)
            b = torch.from_numpy(array(f.b) @ g).to(fed.dtype)
            a = torch.from_numpy(np.linalg.solve(g, array(f.a))).to(fed.dtype)
            modules[name] = Factors(b, a, f.scaling)
        updates.append(replace(update, modules=modules))
    return replace(fed, updates=tuple(updates))


def numel(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())
