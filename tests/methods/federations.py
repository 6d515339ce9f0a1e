"""Random federations for the laws, and a dense float64 oracle that shares no code with the library.

Shapes: B (m, r), A (r, n). Everything is drawn by numpy from a seed; hypothesis chooses the seed and the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import METHODS
from fedspan.methods.base import Method, MethodInfo, ServerState, aggregate
from fedspan.methods.messages import Broadcast, Diagnostics, Factors, Request, Subspace, Template, Update, Vector
from fedspan.methods.patches import patch_numel

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
    "split": {"start": "split"},
    "split-energy": {"start": "split", "basis": "energy"},
    "state-energy": {"start": "state", "basis": "energy"},
    "auto": {"server_rank": "auto", "tolerance": 1e-14},
    "randomized": {"algebra": "randomized"},
    "randomized-energy": {"algebra": "randomized", "basis": "energy"},
    "randomized-both": {"algebra": "randomized", "sides": "both"},
    "randomized-innovation": {"algebra": "randomized", "update": "innovation"},
    "randomized-state": {"algebra": "randomized", "start": "state"},
    "momentum": {"update": "innovation", "momentum": 0.5},
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


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fedgalore": {"galore_rank": 3},
    "shared_galore": {"rank": 3},
    "ravan": {"heads": 3},
    "florist": {"threshold": 1.0},
}
"""Ranks of gradient subspaces, that of the adapters where traffic is counted; heads that divide it; nothing cut off."""
CASES = [Case(name, partial(factory, **OPTIONS.get(name, {}))) for name, factory in METHODS.items()] + [
    Case(f"glora-{name}", lambda options=options: METHODS["glora"](**options)) for name, options in VARIANTS.items()
]
CASES.append(Case("raflora-rb", lambda: METHODS["raflora"](weighting="rb")))
CASES += [
    Case(f"fedprox-{name}", partial(METHODS["fedprox"], trains="adapter", adapter=name, **OPTIONS.get(name, {})))
    for name in ("ffa_lora", "rolora", "fed_sb")
]
CASES.append(Case("scaffold-adapter", partial(METHODS["scaffold"], trains="adapter")))
FEDERATED = [case for case in CASES if not case.info.pooled and not case.info.personalised]
ADAPTER = [case for case in FEDERATED if case.info.trains == "adapter"]


@dataclass(frozen=True)
class Federation:
    """One round's clients, as they come back from training."""

    method: Method
    template: Template
    state: ServerState
    """The state that training starts from."""
    updates: tuple[Update, ...]
    dtype: torch.dtype
    before: tuple[tuple[Broadcast, Update], ...] = ()
    """The first client's broadcasts and replies in the exchanges before training."""

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
    start: ServerState | None = None,
    seen: int = 0,
) -> Federation:
    """Clients with Gaussian factors (or weights) and a head; those in `silent` have learnt nothing.

    From the method's own beginning, or from the state `start` between two rounds, to clients that have seen so much.
    """
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
    state = start or method.init(template, base)
    state, before = _asked(method, state, [Request(rank, seen) for rank in ranks], counts, draw)
    updates = []
    for k, (rank, count) in enumerate(zip(ranks, counts, strict=True)):
        sent = method.start(method.broadcast(state, Request(rank)), None)
        factors = {name: _trained(f, rank, sent, name, draw, k in silent) for name, f in sent.adapter.items()}
        dense = {
            name: _confined(value, sent.subspaces[name], draw) if name in sent.subspaces else draw(*value.shape)
            for name, value in sent.dense.items()
        }
        updates.append(Update(f"client{k}", count, factors, dense, _second_moments(sent, modules, draw), rate_sum=0.5))
    return Federation(method, template, state, tuple(updates), dtype, before)


Draw = Callable[..., torch.Tensor]


def _asked(
    method: Method, state: ServerState, requests: Sequence[Request], counts: Sequence[float], draw: Draw
) -> tuple[ServerState, tuple[tuple[Broadcast, Update], ...]]:
    """The exchanges of this round before the one that trains, on gradients drawn at random."""
    grads = [{n: Vector({"gradient": draw(*shape)}) for n, shape in state.template.modules.items()} for _ in counts]
    first: list[tuple[Broadcast, Update]] = []
    for number, exchange in enumerate(method.exchanges):
        if not exchange.due(state.round_num):
            continue
        state = replace(state, exchange=number)
        if exchange.ask == "train":
            break
        answers = []
        for k, (request, count, grad) in enumerate(zip(requests, counts, grads, strict=True)):
            sent = method.start(method.broadcast(state, request), None)
            answers.append(method.encode(Update(f"client{k}", count, grad, {}), sent, None)[0])
            first += [(sent, answers[0])] if k == 0 else []
        state, _ = aggregate(method, state, answers)
    return state, tuple(first)


def _trained(f: Factors, rank: int, sent: Broadcast, name: str, draw: Draw, silent: bool) -> Factors:
    """An adapter after training: what the recipe freezes as it was sent, what is confined inside its subspace."""
    b, a = draw(f.b.shape[0], rank), draw(rank, f.a.shape[1])
    kind = torch.promote_types(b.dtype, f.a.dtype)
    b = b if sent.recipe.train_b else f.b.to(kind, copy=True)
    a = a if sent.recipe.train_a else f.a.to(kind, copy=True)
    if f"{name}/a" in sent.subspaces:
        a = _confined(f.a, sent.subspaces[f"{name}/a"], draw, sent.recipe.heads)
    idle = "b" if sent.recipe.train_b else "a"
    return replace(Factors(b, a, f.scaling), **({idle: torch.zeros_like(b if idle == "b" else a)} if silent else {}))


def _confined(x: torch.Tensor, space: Subspace, draw: Draw, heads: int = 0) -> torch.Tensor:
    """x after a random step inside the subspace, in float32 at least, as training leaves it."""
    z = draw(*space.coordinates(x.to(space.basis)).shape)
    if heads:
        z = torch.block_diag(*(z[run][:, run] for run in torch.arange(len(z)).tensor_split(min(heads, len(z)))))
    kind = torch.promote_types(z.dtype, torch.float32)
    return x.to(kind) + replace(space, basis=space.basis.to(kind)).expand(z.to(kind))


def _second_moments(sent: Broadcast, modules: Mapping[str, tuple[int, int]], draw: Draw) -> dict[str, torch.Tensor]:
    """The moments that the local optimizer ends with: GaLore's (r, the wider side), or one for every trained number."""
    galore = sent.recipe.galore
    if sent.recipe.carries_moments:
        return {name: draw(*value.shape).square() for name, value in sent.dense.items()}
    return {} if galore is None else {n: draw(min(galore.rank, *s), max(s)).square() for n, s in modules.items()}


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
    """All that leaves the sites."""
    method, sent = fed.method, []
    for update in fed.updates if updates is None else updates:
        rank = next((update.factors(name).rank for name in update.modules), None)
        start = method.start(method.broadcast(fed.state, Request(rank)), None)
        sent.append(method.encode(update, start, None)[0])
    return sent


def served(fed: Federation, updates: Sequence[Update] | None = None) -> tuple[ServerState, Diagnostics]:
    """The state after the round, and the diagnostics."""
    state, diagnostics = fed.state, {}
    for number, exchange in enumerate(fed.method.exchanges):
        if number >= fed.state.exchange and exchange.due(fed.state.round_num):
            state = replace(state, exchange=number)
            state, more = aggregate(fed.method, state, encoded(replace(fed, state=state), updates))
            diagnostics |= more
    return state, diagnostics


def traffic(case: Case | Method, rank: int, **options: Any) -> tuple[int, int]:
    """Numbers that leave and reach a client in the second round, of which it took part in the first.

    What the seed gives or the client holds does not travel; heads and scalars are not counted.
    """
    first = build(case, **options)
    version = first.state.patches.version if first.state.patches else 0
    fed = build(case, **options, start=served(first)[0], seen=version)
    request, state = Request(rank, version), fed.state
    up, down = sum(_numel_up(answer) for _, answer in fed.before), sum(_numel_down(sent) for sent, _ in fed.before)
    for number, exchange in enumerate(fed.method.exchanges):
        if number >= fed.state.exchange and exchange.due(fed.state.round_num):
            state = replace(state, exchange=number)
            answers = encoded(replace(fed, state=state))
            up, down = up + _numel_up(answers[0]), down + _numel_down(fed.method.broadcast(state, request))
            state, _ = aggregate(fed.method, state, answers)
    return up, down


def _numel_up(update: Update) -> int:
    tensors = [*update.moments.values(), *(t for name, t in update.dense.items() if name != "head")]
    for p in (p for name, p in update.modules.items() if name != "head"):
        tensors += list(p.values.values()) if isinstance(p, Vector) else [p.a, p.b]
    return sum(t.numel() for t in tensors if t.numel() > 1)


def _numel_down(sent: Broadcast) -> int:
    total = sum(patch_numel(patch) for patch in sent.news)
    total += sum(t.numel() for name, t in sent.moments.items() if name != "head")
    total += sum(t.numel() for name, t in sent.correction.items() if name != "head")
    if "dense" not in sent.seeded:
        total += sum(t.numel() for name, t in sent.dense.items() if name not in {"head", *sent.seeded})
    if "subspaces" not in sent.seeded:
        total += sum(space.basis.numel() for space in sent.subspaces.values())
    return total + sum(
        t.numel() for f in sent.adapter.values() for part, t in (("a", f.a), ("b", f.b)) if part not in sent.seeded
    )


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
