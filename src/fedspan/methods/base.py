"""The contract of a method: pure functions over frozen state.

A round is a short list of exchanges, for most methods one. An exchange, in the order of the calls:

    server                            site of client k
    ------                            ----------------
    broadcast(state, request) ─────▶  start(broadcast, client_state)
                                      local training, when the exchange trains
    fold.add(partial, update) ◀─────  encode(update, broadcast, client_state)
    finish(state, partial)

Between the exchanges of a round the site keeps its own update, and `state.exchange` tells all three server
functions and `encode` (through the broadcast) where in the round they are.

A method is one frozen `Method`, made by a factory whose keyword arguments are its options. Nothing here knows
a model, a file or a network. Shapes: B (m, r), A (r, n), as in `fedspan.lowrank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor

from fedspan import lowrank
from fedspan.lowrank import LowRank

Tensors = Mapping[str, Tensor]
Diagnostics = Mapping[str, float]
ClientState = Mapping[str, Tensor]
"""What a client keeps between its rounds, on its own site."""

Patch = LowRank | Tensor
"""A frozen addition to one base weight: low-rank while that is smaller, dense otherwise."""


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """What is true of a method; `fedspan methods` prints it and the law tests check it."""

    name: str
    title: str
    paper: str
    exact: bool
    """What the clients receive, at sufficient rank, is the ideal update T = Σ p_k s_k B_k A_k."""
    gauge_invariant: bool
    """Re-factoring any client's (B, A) as (B G, G⁻¹ A) does not change the result."""
    hetero_rank: bool
    """Clients may train adapters of different ranks."""
    traffic_up: str
    traffic_down: str
    trains: Literal["adapter", "targets", "all"] = "adapter"
    """LoRA factors, the weights of the target modules, or every weight of the model."""
    personalised: bool = False
    """Each client ends with a model of its own; figures are averages over the clients' models."""
    pooled: bool = False
    """A control that trains on everybody's data in one place."""


@dataclass(frozen=True, slots=True)
class Template:
    """What is fixed for a whole run: the adapted modules, the server's rank, the scaling rule, the seed."""

    modules: Mapping[str, tuple[int, int]]
    """Module name -> (m, n)."""
    rank: int
    """The largest client rank: what the server keeps unless the method's options say otherwise."""
    alpha: float = 16.0
    rslora: bool = False
    seed: int = 0

    def scaling(self, rank: int) -> float:
        """s = α/r, or α/√r for rsLoRA (Kalajdzievski 2023, 2312.03732)."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's adapter, ΔW = scaling · B·A. The scaling travels with the factors, always."""

    b: Tensor  # (m, r)
    a: Tensor  # (r, n)
    scaling: float

    @property
    def rank(self) -> int:
        """The adapter's rank r."""
        return self.b.shape[1]

    def delta(self) -> LowRank:
        """ΔW with the scaling folded into B."""
        return LowRank(lowrank.promote(self.b) * self.scaling, lowrank.promote(self.a))


@dataclass(frozen=True, slots=True)
class Vector:
    """Named tensors in coordinates that all clients share, scalings folded in: a vector space, safe to sum.

    Where clients' ranks differ, the smaller tensor fills the leading rows or columns.
    """

    values: Tensors


Payload = Factors | Vector


@dataclass(frozen=True, slots=True)
class GaloreOptions:
    """Local GaLore (Zhao et al. 2024, 2403.03507): see `fedspan.galore`."""

    rank: int = 8
    update_gap: int = 50
    scale: float = 1.0
    svd: Literal["exact", "randomized"] = "randomized"
    on_refresh: Literal["keep", "project", "reset"] = "keep"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the client trains what it was sent, beyond the run's own `[local]` settings."""

    train_a: bool = True
    train_b: bool = True
    galore: GaloreOptions | None = None
    tail_penalty: tuple[float, int] | None = None
    """(λ, k): add λ·Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F to the loss (HetLoRA's rank self-pruning)."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the server must know of a client to answer it."""

    rank: int | None
    """The rank that the client can train; none: everything the server has."""
    seen: int = 0
    """The newest patch version that the client already holds."""


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What a client starts from: base + patch, an adapter to train, dense weights (heads or full weights)."""

    adapter: Mapping[str, Factors]
    dense: Tensors
    recipe: Recipe = Recipe()
    patch: Mapping[str, Patch] = field(default_factory=dict)
    """Everything to be added to the original base, old and new."""
    news: tuple[Mapping[str, Patch], ...] = ()
    """The part of `patch` that this client does not hold yet."""
    seeded: frozenset[str] = frozenset()
    """Parts ("a", "b", "dense") that the client derives from the run's seed, so that they do not travel."""


@dataclass(frozen=True, slots=True)
class Update:
    """What came out of one client's local work; `encode` reduces it to what leaves the site."""

    client_id: str
    num_examples: float
    modules: Mapping[str, Payload]
    dense: Tensors
    """Trained dense weights, absolute values."""

    def factors(self, module: str) -> Factors:
        """The module's factor pair; a TypeError tells a method that was sent something else."""
        payload = self.modules[module]
        if not isinstance(payload, Factors):
            raise TypeError(f"{module} holds a {type(payload).__name__}, not a factor pair")
        return payload


@dataclass(frozen=True, slots=True)
class ServerState:
    """All that the server keeps: plain tensors and numbers, so that it can be saved, resumed and sent."""

    template: Template
    modules: Mapping[str, Tensors]
    dense: Tensors
    round_num: int = 0
    """Rounds finished."""
    exchange: int = 0
    """Exchanges of this round finished."""
    patches: PatchLog | None = None


@dataclass(frozen=True, slots=True)
class PatchLog:
    """The base's accumulated patch and its latest increments.

    A client that was away fetches the increments it missed, or the whole patch where that is smaller. A total whose
    factors outgrow the m×n matrix is kept dense, and increments that outgrow the total are dropped, so the log
    stays within twice the size of the dense patch however many rounds there are.
    """

    total: Mapping[str, Patch]
    version: int = 0
    increments: tuple[Mapping[str, Patch], ...] = ()
    """The increments that led to versions version − len(increments) + 1 … version."""

    def append(self, increment: Mapping[str, Patch]) -> PatchLog:
        """The log after adding `increment` to the base."""
        increment = {name: patch_sum(None, patch) for name, patch in increment.items()}
        total = dict(self.total)
        for name, patch in increment.items():
            total[name] = patch_sum(total.get(name), patch)
        kept: list[Mapping[str, Patch]] = []
        budget = patch_numel(total)
        for candidate in (increment, *reversed(self.increments)):
            budget -= patch_numel(candidate)
            if budget < 0:
                break
            kept.append(candidate)
        return PatchLog(total, self.version + 1, tuple(reversed(kept)))

    def since(self, seen: int) -> tuple[Mapping[str, Patch], ...]:
        """What a client that holds version `seen` must fetch: increments to add, or the one whole patch.

        As many increments as versions missed; otherwise (never for a client that missed one) the whole patch.

        Raises
        ------
        ValueError
            When the client holds a version that this log has not reached.
        """
        missed = self.version - seen
        if missed < 0:
            raise ValueError(f"a client holds patch version {seen}: expected at most {self.version}")
        if missed == 0:
            return ()
        return self.increments[-missed:] if missed <= len(self.increments) else (self.total,)


def patch_sum(x: Patch | None, y: Patch) -> Patch:
    """x + y, kept low-rank while the factors are smaller than the matrix."""
    total: Patch
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        total = lowrank.stack([x, y])
    else:
        total = y if x is None else patch_dense(x) + patch_dense(y)
    if isinstance(total, LowRank) and total.rank * sum(total.shape) >= math.prod(total.shape):
        return total.dense()
    return total


def patch_dense(x: Patch) -> Tensor:
    """The patch as an m×n matrix."""
    return x.dense() if isinstance(x, LowRank) else x


def patch_numel(patch: Mapping[str, Patch]) -> int:
    """How many numbers the patch is made of."""
    return sum(t.numel() for p in patch.values() for t in ((p.b, p.a) if isinstance(p, LowRank) else (p,)))


@dataclass(frozen=True, slots=True)
class Partial:
    """The fold of the updates seen so far; two of them merge, so servers can form a tree."""

    num_clients: int = 0
    weight: float = 0.0
    dense: Tensors = field(default_factory=dict)
    """Σ n_k x_k."""
    sums: Mapping[str, Tensors] = field(default_factory=dict)
    """Σ n_k · payload_k, for a sum."""
    collected: tuple[Update, ...] = ()
    """The updates themselves, for a method that needs each."""

    def mean_dense(self) -> Tensors:
        """Σ p_k x_k over the participants."""
        return {name: value / self.weight for name, value in self.dense.items()}

    def mean(self, module: str) -> Tensors:
        """Σ p_k payload_k of one module, field by field."""
        return {name: value / self.weight for name, value in self.sums[module].items()}

    def shares(self) -> list[float]:
        """p_k = n_k / Σ n of the collected updates. The one place where counts become weights."""
        return [update.num_examples / self.weight for update in self.collected]

    def deltas(self, module: str) -> list[LowRank]:
        """s_k B_k A_k of the collected updates."""
        return [update.factors(module).delta() for update in self.collected]


@dataclass(frozen=True, slots=True)
class Fold:
    """How the answers of one exchange are accumulated."""

    kind: Literal["sum", "collect"]
    add: Callable[[Partial, Update], Partial]
    merge: Callable[[Partial, Partial], Partial]


def _plus(x: Tensors, y: Tensors) -> dict[str, Tensor]:
    """x + y, name by name. Nothing is padded: the shapes of dense weights must agree."""
    _same_names("tensors", x, y)
    for name in x:
        if x[name].shape != y[name].shape:
            shapes = f"{tuple(x[name].shape)} and {tuple(y[name].shape)}"
            raise ValueError(f"updates hold {name} in shapes {shapes}: expected one shape")
    return {name: x[name] + y[name] for name in x}


def _same_names(what: str, x: Mapping[str, object], y: Mapping[str, object]) -> None:
    if x.keys() != y.keys():
        raise ValueError(f"updates name different {what}: {sorted(x.keys() ^ y.keys())[:3]}")


def _plus_nested(x: Tensor, y: Tensor) -> Tensor:
    """x + y, where a factor of smaller rank fills the leading rows or columns and counts as zero elsewhere."""
    if x.shape == y.shape:
        return x + y
    rows, columns = max(x.shape[0], y.shape[0]), max(x.shape[1], y.shape[1])
    total = x.new_zeros((rows, columns))
    total[: x.shape[0], : x.shape[1]] += x
    total[: y.shape[0], : y.shape[1]] += y
    return total


def _weighted(x: Tensors, weight: float) -> dict[str, Tensor]:
    return {name: lowrank.promote(value) * weight for name, value in x.items()}


def _payload_tensors(payload: Payload) -> Tensors:
    return payload.values if isinstance(payload, Vector) else {"a": payload.a, "b": payload.b}


def _plus_modules(x: Mapping[str, Tensors], y: Mapping[str, Tensors]) -> dict[str, Tensors]:
    _same_names("modules", x, y)
    total: dict[str, Tensors] = {}
    for name in x:
        _same_names(f"tensors of {name}", x[name], y[name])
        total[name] = {part: _plus_nested(x[name][part], y[name][part]) for part in x[name]}
    return total


def _add_to_sum(partial: Partial, update: Update) -> Partial:
    w = update.num_examples
    modules = {name: _weighted(_payload_tensors(p), w) for name, p in update.modules.items()}
    return _merge(partial, Partial(1, w, _weighted(update.dense, w), modules))


def _collect(partial: Partial, update: Update) -> Partial:
    w = update.num_examples
    return _merge(partial, Partial(1, w, _weighted(update.dense, w), collected=(replace(update, dense={}),)))


def _merge(x: Partial, y: Partial) -> Partial:
    # Only a fold of nothing may lack what the other names: anything else would be averaged as a zero.
    if x.num_clients == 0 or y.num_clients == 0:
        return y if x.num_clients == 0 else x
    return Partial(
        x.num_clients + y.num_clients,
        x.weight + y.weight,
        _plus(x.dense, y.dense),
        _plus_modules(x.sums, y.sums),
        (*x.collected, *y.collected),
    )


SUM = Fold("sum", _add_to_sum, _merge)
COLLECT = Fold("collect", _collect, _merge)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question to the cohort: whether the clients train before they answer, and how answers are folded."""

    fold: Fold = COLLECT
    train: bool = True


def _as_sent(broadcast: Broadcast, client_state: ClientState | None) -> Broadcast:
    return broadcast


def _everything(update: Update, broadcast: Broadcast, state: ClientState | None) -> tuple[Update, ClientState | None]:
    return update, state


@dataclass(frozen=True, slots=True)
class Method:
    """One federated method. The exchanges and the two site functions have defaults that most methods keep."""

    info: MethodInfo
    init: Callable[[Template, Tensors], ServerState]
    """(template, dense weights of the base) -> the state before the first round."""
    broadcast: Callable[[ServerState, Request], Broadcast]
    finish: Callable[[ServerState, Partial], tuple[ServerState, Diagnostics]]
    """Runs on the fold of all updates; returns the next state and what the method measured of itself."""
    exchanges: tuple[Exchange, ...] = (Exchange(),)
    start: Callable[[Broadcast, ClientState | None], Broadcast] = _as_sent
    """On the site, before training: combine what was sent with what the client kept."""
    encode: Callable[[Update, Broadcast, ClientState | None], tuple[Update, ClientState | None]] = _everything
    """On the site, after training: what leaves it, and what stays."""

    @property
    def secure_sum(self) -> bool:
        """Every exchange is a sum, so the method runs as it is where the server may see only sums."""
        return all(exchange.fold.kind == "sum" for exchange in self.exchanges)


def aggregate(method: Method, state: ServerState, updates: list[Update]) -> tuple[ServerState, Diagnostics]:
    """The server's side of one exchange: fold the encoded updates in sorted client order, then finish.

    Raises
    ------
    ValueError
        When the list is empty, two updates carry the same client id, or a client counts for nothing.
    """
    if not updates:
        raise ValueError("no update to aggregate: expected at least one client")
    ids = [update.client_id for update in updates]
    if len(set(ids)) != len(ids):
        raise ValueError(f"two updates of one client among {sorted(ids)}: expected one each")
    for update in updates:
        if not (math.isfinite(update.num_examples) and update.num_examples > 0):
            raise ValueError(f"{update.client_id} has {update.num_examples} examples: expected more than 0")
    fold = method.exchanges[state.exchange].fold
    partial = Partial()
    for update in sorted(updates, key=lambda u: u.client_id):
        partial = fold.add(partial, update)
    return method.finish(state, partial)


def advance(state: ServerState, **changes: Any) -> ServerState:
    """The state with `changes`, one round later."""
    return replace(state, round_num=state.round_num + 1, exchange=0, **changes)


def generator(*key: object) -> torch.Generator:
    """A generator that depends on nothing but `key`: (run seed, round, client, purpose) and the like."""
    # Not Python's hash: that is salted per process.
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def fresh_a(template: Template, module: str, rank: int, round_num: int = 0) -> Tensor:
    """A newly initialised A (rank, n), the same everywhere for the same seed, module and round.

    PEFT's initialisation, U(−1/√n, 1/√n). Row j does not depend on `rank`, so adapters of different ranks nest.
    """
    n = template.modules[module][1]
    values = torch.rand((rank, n), generator=generator(template.seed, module, round_num, "lora_A"))
    return (values * 2 - 1) / math.sqrt(n)


def fresh_adapter(template: Template, rank: int, round_num: int = 0) -> dict[str, Factors]:
    """LoRA's start for every module: random A, zero B, hence ΔW = 0."""
    return {
        name: Factors(torch.zeros(m, rank), fresh_a(template, name, rank, round_num), template.scaling(rank))
        for name, (m, _) in template.modules.items()
    }


def readout(template: Template, module: str, x: LowRank, rank: int, round_num: int) -> Factors:
    """The best rank-`rank` approximation of X as a balanced adapter, B = U_r Σ_r^½ and A = Σ_r^½ V_rᵀ / s.

    Where X has fewer directions than `rank`, the spare rows of A are fresh and the spare columns of B zero: the
    product is the same, and the adapter can still learn there (with both factors zero its gradient would vanish).
    """
    f = lowrank.svd(x)
    s = template.scaling(rank)
    keep = min(rank, lowrank.numerical_rank(f.s, lowrank.term_size(x)))
    root = f.s[:keep].sqrt()
    spare = fresh_a(template, module, rank, round_num)[keep:].to(f.u.dtype)
    return Factors(
        torch.cat([f.u[:, :keep] * root, f.u.new_zeros((x.shape[0], rank - keep))], dim=1),
        torch.cat([root[:, None] * f.vh[:keep] / s, spare], dim=0),
        s,
    )
