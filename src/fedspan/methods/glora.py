"""GLoRA and FlexLoRA: servers that aggregate products in low-rank form and read adapters of any rank out of them.

State per module: U (m, R) orthonormal and C (R, n), standing for U·C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedspan import lowrank, subspace
from fedspan.lowrank import LowRank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, Diagnostics, Factors, Request, Template, Tensors
from fedspan.methods.readout import fresh_adapter, readout


@dataclass(frozen=True, slots=True)
class _Options:
    server_rank: int | Literal["auto"] | None
    tolerance: float
    basis: Literal["projector", "energy"]
    sides: Literal["left", "both"]
    update: Literal["replace", "innovation"]
    start: Literal["readout", "state"]
    readout: Literal["svd", "nested"]


def glora(
    server_rank: int | Literal["auto"] | None = None,
    tolerance: float = 0.01,
    basis: Literal["projector", "energy"] = "projector",
    sides: Literal["left", "both"] = "left",
    update: Literal["replace", "innovation"] = "replace",
    start: Literal["readout", "state"] = "readout",
    readout: Literal["svd", "nested"] = "svd",
) -> Method:
    """GLoRA: a consensus update subspace, aggregation in its coordinates, adapters of any rank read out.

    P_k = Q_k Q_kᵀ with Q_k an orthonormal basis of col(B_k A_k);  U = top-R eigenvectors of Σ p_k P_k;
    C = Σ p_k s_k (Uᵀ B_k) A_k.  The state U·C stands for U Uᵀ T.

    Source: Chen et al. 2026, "Beyond Factor Aggregation: Gauge-Aware Low-Rank Server Representations for Federated
    LoRA" (2605.06733). The formulas are our reconstruction from its public statements.
    Differences: the basis is that of the product B_k A_k rather than of B_k alone (they differ only where A_k has lost
    rank, and the product's is gauge-invariant to rounding); spare readout directions start fresh, so that they can
    learn; and every option below that is not at its default.

    Parameters
    ----------
    server_rank
        R; none: the largest client rank. The aggregate is exact once R spans the union of the clients' column spaces,
        at most min(m, Σ r_k). `auto`: the smallest R whose discarded share of ‖T‖_F is at most `tolerance`.
    basis
        `projector`: every client's subspace counts by its weight alone. `energy`: the left singular vectors of the
        aggregate itself, which lose the least energy.
    sides
        `both`: a consensus right basis V too, so that the state is U (Uᵀ T V) Vᵀ.
    update
        `replace`: the new state is built from the whole adapters that came back. `innovation`: each client's
        innovation, its adapter minus the readout it was sent, is added to the state; directions that a low-rank client
        was never sent are kept, and so is what absent clients taught.
    start
        `readout`: clients continue from the state truncated to their rank. `state`: they receive the whole state as a
        frozen patch and train a fresh adapter on top, so innovations are exact at any rank; more traffic down.
    readout
        `svd`: the best adapter of each rank. `nested`: B = U[:, :r], A = C[:r]/s, so that ranks nest.
    """
    if start == "state":
        # What comes back is an addition to the state, never a replacement of it.
        update = "innovation"
    if server_rank is not None and server_rank != "auto" and server_rank < 1:
        raise ValueError(f"method.server_rank = {server_rank}: expected at least 1, or 'auto'")
    if not 0 < tolerance < 1:
        raise ValueError(f"method.tolerance = {tolerance}: expected between 0 and 1")
    options = _Options(server_rank, tolerance, basis, sides, update, start, readout)
    info = MethodInfo(
        name="glora",
        title="GLoRA",
        paper="2605.06733",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="r(m+n)",
        traffic_down="R(m+n)" if start == "state" else "r(m+n)",
    )
    return _product_server(info, options)


def flexlora() -> Method:
    """FlexLoRA: T = Σ p_k s_k B_k A_k, and each client gets the best rank-r_k approximation of it by SVD.

    Source: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
    Resources" (2402.11505).
    Differences: the paper forms T densely and decomposes it (m×n); here the same SVD comes from the QR core of the
    stacked factors. The server keeps T at the largest client rank, which is all that any client can receive.
    """
    info = MethodInfo(
        name="flexlora",
        title="FlexLoRA",
        paper="2402.11505",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="r(m+n)",
        traffic_down="r(m+n)",
    )
    return _product_server(info, _Options(None, 0.01, "energy", "left", "replace", "readout", "svd"))


def _product_server(info: MethodInfo, options: _Options) -> Method:
    def init(template: Template, dense: Tensors) -> ServerState:
        empty = {name: lowrank.zeros(m, n) for name, (m, n) in template.modules.items()}
        return ServerState(template, {name: {"u": x.b, "c": x.a} for name, x in empty.items()}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        template = state.template
        held = {name: LowRank(t["u"], t["c"]) for name, t in state.modules.items()}
        if options.start == "state":
            # A new adapter every round: the last one is in the state.
            adapter = fresh_adapter(template, request.rank or template.rank, state.round_num)
            patch = {name: x for name, x in held.items() if x.rank}
            return Broadcast(adapter, state.dense, patch=patch, news=(patch,), seeded=frozenset({"a", "b"}))
        adapter = {}
        for name, x in held.items():
            rank = request.rank or max(x.rank, template.rank)
            read = _nested if options.readout == "nested" else readout
            adapter[name] = read(template, name, x, rank, state.round_num)
        return Broadcast(adapter, state.dense)

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        innovations = options.update == "innovation"
        sent: dict[int, Broadcast] = {}
        if innovations and options.start == "readout":
            ranks = {update.factors(name).rank for update in partial.collected for name in update.modules}
            sent = {rank: broadcast(state, Request(rank)) for rank in ranks}
        modules: dict[str, Tensors] = {}
        lost, total, rank = 0.0, 0.0, 0
        for name, kept in state.modules.items():
            terms = partial.deltas(name)
            if sent:
                reads = [sent[u.factors(name).rank].adapter[name].delta() for u in partial.collected]
                terms = [lowrank.stack([x, read], [1.0, -1.0]) for x, read in zip(terms, reads, strict=True)]
            before = LowRank(kept["u"], kept["c"]) if innovations else None
            after, loss, size = _aggregate(before, terms, partial.shares(), state.template.rank, options)
            modules[name] = {"u": after.b, "c": after.a}
            lost, total, rank = lost + loss**2, total + size**2, max(rank, after.rank)
        error = (lost / total) ** 0.5 if total > 0 else 0.0
        diagnostics = {"server_rank": float(rank), "truncation_error": error}
        return advance(state, modules=modules, dense=partial.mean_dense()), diagnostics

    return Method(info=info, init=init, broadcast=broadcast, finish=finish)


def _aggregate(
    before: LowRank | None,
    terms: Sequence[LowRank],
    weights: Sequence[float],
    default_rank: int,
    options: _Options,
) -> tuple[LowRank, float, float]:
    """(U·C, ‖T − U·C‖_F, ‖T‖_F) for T = Σ p_k X_k, or T = before + Σ p_k X_k where X_k are innovations."""
    kept = [] if before is None else [before]
    target = lowrank.stack([*kept, *terms], [*([1.0] * len(kept)), *weights])
    m, n = target.shape
    automatic = options.server_rank == "auto"
    limit = max(m, n) if automatic else int(options.server_rank or default_rank)
    if options.basis == "energy":
        f = lowrank.svd(target)
        keep = min(limit, lowrank.numerical_rank(f.s, lowrank.term_size(target)))
        state, size = LowRank(f.u[:, :keep], f.s[:keep, None] * f.vh[:keep]), float(f.s.norm())
    else:
        # A client's vote on innovations is its update as if it had been sent the whole state; with at most R
        # directions each, or the old state, which all of them hold, would outvote everything new.
        voters = [lowrank.stack([*kept, x]) for x in terms]
        vote = None if before is None else max(limit if not automatic else default_rank, 1)
        u = _consensus(voters, weights, limit, vote)
        c = (u.mT @ target.b) @ target.a
        if options.sides == "both":
            v = _consensus([LowRank(x.a.mT, x.b.mT) for x in voters], weights, limit, vote)
            c = (c @ v) @ v.mT
        state, size = LowRank(u, c), lowrank.norm(target)
    if automatic:
        state = _smallest_within(_by_energy(state), target, options.tolerance * size)
    return state, lowrank.distance(target, state), size


def _consensus(terms: Sequence[LowRank], weights: Sequence[float], rank: int, vote: int | None) -> Tensor:
    """The consensus basis (m, ≤ rank), each client naming at most `vote` directions."""
    return subspace.consensus([subspace.column_basis(x, vote) for x in terms], weights, rank)[0]


def _by_energy(x: LowRank) -> LowRank:
    """The same U·C in the basis of its left singular vectors, strongest first."""
    f = lowrank.svd(x)
    return LowRank(f.u, f.s[:, None] * f.vh)


def _smallest_within(x: LowRank, target: LowRank, allowed: float) -> LowRank:
    """The fewest leading directions of x whose distance to the target is at most `allowed` (or all of x)."""
    base = lowrank.distance(target, x) ** 2
    row_energy = x.a.square().sum(dim=1)
    tails = row_energy.flip(0).cumsum(0).flip(0)  # what dropping directions r, r+1, … costs
    fits = (base + tails <= allowed**2).nonzero()
    rank = int(fits[0]) if len(fits) else x.rank
    return LowRank(x.b[:, :rank], x.a[:rank])


def _nested(template: Template, module: str, x: LowRank, rank: int, round_num: int) -> Factors:
    """B = U[:, :r], A = C[:r]/s; spare directions start fresh, as in `readout`."""
    s = template.scaling(rank)
    keep = min(rank, x.rank)
    spare = fresh_adapter(template, rank, round_num)[module].a[keep:].to(x.a.dtype)
    zeros = x.b.new_zeros((x.shape[0], rank - keep))
    return Factors(torch.cat([x.b[:, :keep], zeros], dim=1), torch.cat([x.a[:keep] / s, spare], dim=0), s)
