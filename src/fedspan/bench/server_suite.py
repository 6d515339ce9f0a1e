"""The server suite: one server step over K clients' factors of one d×d layer, compared with other ways to do it.

Two phases are timed separately: `step` folds the updates and makes the next state, `broadcast` derives one client's
adapter from it. The peers have no second phase.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedspan.algebra.lowrank import LowRank
from fedspan.bench.harness import Arm, Bench, CaseKey, Floor
from fedspan.bench.peers import PeftServer
from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Broadcast, Factors, Request, Template, Update
from fedspan.support.seeding import generator

SUITE = "server"
MODULE = "layer"
PEERS = ("dense_svd", "dense_lowrank", "dense_mean", "peft_svd", "peft_cat")
OVERSAMPLING = 8
"""Columns beyond the rank of the range finders: the one that the floor assumes and the dense one that is timed."""
_SVD = 27.0
"""A full dense SVD of d×d takes as long as a product with about 27 d³ operations (measured at d = 768 to 4096)."""
_ALPHA = 16.0


def methods() -> list[str]:
    """Return every method whose server aggregates adapters in one step."""
    created = {name: factory() for name, factory in METHODS.items()}
    infos = {name: method.info for name, method in created.items() if len(method.exchanges) == 1}
    return [n for n, i in infos.items() if i.trains == "adapter" and not i.pooled and not i.personalised]


def run(bench: Bench) -> None:
    """Measure all cases, few clients first: their times predict which larger cases would take too long."""
    for d, rank, k in _grid(bench.options.quick):
        _measure(bench, d, k, rank)


def _grid(quick: bool) -> Iterator[tuple[int, int, int]]:
    full = ((768, 2048, 4096), (4, 16, 64), (10, 100, 1000))
    sizes, ranks, counts = ((256, 768), (16,), (10, 100)) if quick else full
    return ((d, rank, k) for d in sizes for rank in ranks for k in counts)


def _measure(bench: Bench, d: int, k: int, rank: int) -> None:
    step: CaseKey = {"phase": "step", "d": d, "K": k, "r": rank}
    broadcast: CaseKey = {**step, "phase": "broadcast"}
    names = methods()
    if not bench.missing(SUITE, step, [*names, *PEERS]) and not bench.missing(SUITE, broadcast, names):
        return
    # The factors, the copies of some methods and of PEFT, and stacked copies while a step runs.
    needed = 4 * (6 * k * 2 * d * rank + 6 * d * d)
    if not bench.fits(needed):
        for name in (*names, *PEERS):
            bench.skip(SUITE, step, name, f"it would need about {needed / 2**30:.1f} GiB")
        return
    case = Case.draw(d, k, rank, bench.options.device)
    states: dict[str, ServerState] = {}
    arms = [
        Arm(n, partial(case.step, n), prepare=partial(case.encode, n), expected=_expected(bench, step, n))
        for n in names
    ]
    # The factors are read once; a range finder with one power iteration goes through them four times.
    floor = Floor(4.0 * k * 2 * d * rank, 4 * 2.0 * 2 * d * k * rank * (rank + OVERSAMPLING))
    bench.measure(SUITE, step, arms + _peers(bench, step, case), floor=floor, check=partial(_agreement, case, states))
    measured = [n for n in names if bench.known(SUITE, step, n) is not None]
    for name in set(bench.missing(SUITE, broadcast, measured)) - states.keys():
        states[name] = case.step(name)
    arms = [Arm(n, partial(case.broadcast, n, states.get(n))) for n in measured]
    bench.measure(SUITE, broadcast, arms, floor=Floor(4.0 * 2 * 2 * d * rank))


def _expected(bench: Bench, case: CaseKey, arm: str) -> float:
    """Return a lower bound of the seconds: half of the time for fewer clients, scaled to this number."""
    k = int(case["K"])
    known = {fewer: bench.known(SUITE, {**case, "K": fewer}, arm) or 0.0 for fewer in (10, 100) if fewer < k}
    return max((seconds * k / fewer / 2 for fewer, seconds in known.items() if seconds > 1), default=0.0)


def _peers(bench: Bench, step: CaseKey, case: Case) -> list[Arm]:
    d, gemm = case.d, bench.machine.gemm
    form, decompose = 2.0 * d * d * case.k * case.rank / gemm, _SVD * d**3 / gemm
    mean = case.k * 12.0 * d * d / bench.machine.bandwidth
    peft = max(form + decompose, _expected(bench, step, "peft_svd"))
    return [
        Arm("dense_svd", case.dense_svd, expected=form + decompose),
        Arm("dense_lowrank", case.dense_lowrank, expected=form),
        Arm("dense_mean", case.dense_mean, prepare=case.weights, expected=mean),
        Arm("peft_svd", partial(case.peft, "svd"), 1.0, case.peft_model, case.undo, peft),
        Arm("peft_cat", partial(case.peft, "cat"), 1.0, case.peft_model, case.undo),
    ]


def draw_factors(d: int, rank: int, count: int, device: torch.device) -> list[Factors]:
    """Draw clients' factors of one layer: a common part with decaying singular values, and noise of each client."""
    rng = generator("bench", SUITE, d, count, rank)
    decay = 0.7 ** torch.arange(2 * rank)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).div_(d**0.5)

    left, right = draw(d, 2 * rank) * decay * d**0.5, draw(2 * rank, d) * d**0.5
    factors = []
    for _ in range(count):
        b = left @ draw(2 * rank, rank) + 0.02 * draw(d, rank)
        a = draw(rank, 2 * rank) @ right + 0.02 * draw(rank, d)
        factors.append(Factors(b.to(device), a.to(device), _ALPHA / rank))
    return factors


@dataclass(slots=True)
class Case:
    """K clients' factors of one layer, and the work of the arms on them."""

    d: int
    k: int
    rank: int
    factors: list[Factors]
    _ready: dict[str, tuple[Method, ServerState, list[Update]]] = field(default_factory=dict)
    _weights: list[Tensor] = field(default_factory=list)
    _peft: list[PeftServer] = field(default_factory=list)

    @classmethod
    def draw(cls, d: int, k: int, rank: int, device: torch.device) -> Case:
        """Draw the factors from a seed."""
        factors = draw_factors(d, rank, k, device)
        return cls(d, k, rank, factors)

    def step(self, name: str) -> ServerState:
        """Return the state after the round: fold and finish."""
        return aggregate(*self.encode(name))[0]

    def encode(self, name: str) -> tuple[Method, ServerState, list[Update]]:
        """Return the method, the server's state and the clients' encoded updates; cached by name."""
        if name in self._ready:
            return self._ready[name]
        method = METHODS[name]()
        state = method.init(Template({MODULE: (self.d, self.d)}, self.rank, alpha=_ALPHA), {})
        sent = method.start(method.broadcast(state, Request(self.rank)), None)
        updates = []
        for i, f in enumerate(self.factors):
            # Where A is not trained, all clients keep the one that was sent.
            a = f.a if sent.recipe.train_a else sent.adapter[MODULE].a.to(f.a.device)
            update = Update(f"client-{i:04d}", 1.0, {MODULE: Factors(f.b, a, f.scaling)}, {})
            updates.append(method.encode(update, sent, None)[0])
        self._ready[name] = method, state, updates
        return self._ready[name]

    def broadcast(self, name: str, state: ServerState | None) -> Broadcast:
        """Return the broadcast to one client."""
        assert state is not None
        return METHODS[name]().broadcast(state, Request(self.rank))

    def _product(self) -> Tensor:
        """Return T = Σ p_k s_k B_k A_k as a d×d matrix, summed in products of up to 512 columns."""
        total = torch.zeros((self.d, self.d), device=self.factors[0].b.device)
        at_once = max(1, 512 // self.rank)
        for i in range(0, self.k, at_once):
            some = self.factors[i : i + at_once]
            b, a = torch.cat([f.b for f in some], dim=1), torch.cat([f.a for f in some], dim=0)
            total.addmm_(b, a, alpha=some[0].scaling / self.k)
        return total

    def dense_svd(self) -> LowRank:
        """Compute FlexLoRA as published: the product as a matrix, and its full SVD."""
        u, s, vh = torch.linalg.svd(self._product(), full_matrices=False)
        return LowRank(u[:, : self.rank] * s[: self.rank], vh[: self.rank])

    def dense_lowrank(self) -> LowRank:
        """Compute the product as a matrix, and torch's randomized SVD of it."""
        with torch.random.fork_rng(devices=[]):
            u, s, v = torch.svd_lowrank(self._product(), q=min(self.d, self.rank + OVERSAMPLING), niter=2)
        return LowRank(u[:, : self.rank] * s[: self.rank], v[:, : self.rank].mT)

    def dense_mean(self) -> Tensor:
        """Compute FedAvg on the whole weight: Σ p_k W_k."""
        weights = self.weights()
        total = torch.zeros_like(weights[0])
        for i in range(self.k):
            total.add_(weights[i % len(weights)], alpha=1 / self.k)
        return total

    def weights(self) -> list[Tensor]:
        """Return eight matrices that stand for K of them: more than the cache holds."""
        if not self._weights:
            self._weights += [torch.randn((self.d, self.d), device=self.factors[0].b.device) for _ in range(8)]
        return self._weights

    def peft(self, kind: str) -> LowRank:
        """Merge K adapters on a model of one layer with PEFT's own function."""
        return self.peft_model().merge(kind, self.rank)

    def peft_model(self) -> PeftServer:
        """Return a PeftModel with every client's adapter; created at the first call."""
        if not self._peft:
            self._peft.append(PeftServer(self.d, self.factors))
        return self._peft[0]

    def undo(self) -> None:
        """Delete the merged adapter."""
        self._peft[0].undo()


def _agreement(
    case: Case, states: dict[str, ServerState], outputs: Mapping[str, Any]
) -> dict[str, Mapping[str, float]]:
    """Return the relative distances between results that should be equal, as products with 16 random vectors.

    Exact rules are compared with T = Σ p_k s_k B_k A_k; rules that return the best product of rank r are compared with
    the dense SVD, or with FlexLoRA if that was not run. `excess` is the share by which such a product's distance from T
    exceeds the best one's.
    """
    x = torch.randn((case.d, 16), generator=generator("bench", "probe")).to(case.factors[0].a.device)
    target = torch.stack([f.b @ (f.a @ x) * (f.scaling / case.k) for f in case.factors]).sum(dim=0)
    products = {}
    for name, output in outputs.items():
        if isinstance(output, ServerState):
            states[name] = output
            products[name] = _applied(case.broadcast(name, output), x)
        elif isinstance(output, LowRank):
            products[name] = output.b @ (output.a @ x)
    best = products.get("dense_svd", products.get("flexlora"))
    agreement: dict[str, Mapping[str, float]] = {}
    for name, product in products.items():
        if name in ("flora", "fedex_lora", "peft_cat"):
            agreement[name] = _within(_relative(product, target), 1e-4)
        elif name in ("flexlora", "dense_lowrank", "dense_svd", "peft_svd") and best is not None:
            excess = float((product - target).norm() / (best - target).norm()) - 1
            agreement[name] = {**_within(_relative(product, best), 0.05), "excess": excess}
        else:
            agreement[name] = {"distance_to_mean": _relative(product, target)}
    return agreement


def _within(distance: float, tolerance: float) -> dict[str, float]:
    return {"distance": distance, "agrees": distance <= tolerance}


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def _applied(sent: Broadcast, x: Tensor) -> Tensor:
    """Return ΔW·x, where ΔW is the adapter and the patch that a client adds to its base."""
    total = torch.zeros((sent.adapter[MODULE].b.shape[0], x.shape[1]), device=x.device)
    delta = sent.adapter[MODULE].delta()
    total += delta.b.to(x.device) @ (delta.a.to(x.device) @ x)
    patch = sent.patch.get(MODULE)
    if isinstance(patch, LowRank):
        total += patch.b @ (patch.a @ x)
    elif patch is not None:
        total += patch @ x
    return total
