"""FLoRA and FedEx-LoRA: exact by adding to every client's base what the adapter cannot hold."""

from __future__ import annotations

import math

from fedspan.algebra import lowrank, scales
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.fedit import check_rank, factors_of, init_factors
from fedspan.methods.folds import Partial, weighted_mean
from fedspan.methods.messages import Broadcast, Diagnostics, Request, Template, Tensors
from fedspan.methods.patches import Patch, PatchLog, patch_sum
from fedspan.methods.queries import own_contribution
from fedspan.methods.readout import fresh_adapter
from fedspan.support import parallel


def patches_of(state: ServerState) -> PatchLog:
    """Return the state's patch log; empty before the first round."""
    return state.patches or PatchLog({})


def flora() -> Method:
    """FLoRA: the stack [s_1 p_1 B_1 …], [A_1; …] is T exactly; every client adds it to its base and starts afresh.

    Source: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations" (2409.05976).
    Differences: the patch stays beside the original base in float32 and is applied once, so repeated merges cannot
    make the base drift; a client that was away fetches what it missed.
    """

    def init(template: Template, dense: Tensors) -> ServerState:
        return ServerState(template, {}, dense, patches=PatchLog({}))

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        log = patches_of(state)
        return Broadcast(
            fresh_adapter(state.template, request.rank or state.template.rank, state.round_num),
            state.dense,
            patch=log.total,
            news=log.since(request.seen),
            seeded=frozenset({"a", "b"}),
        )

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        shares = partial.shares()

        def whole(name: str) -> Patch:
            contributions = [own_contribution(update, name) for update in partial.collected]
            pairs = [LowRank(lowrank.promote(x.own.b) * x.scaling, x.own.a) for x in contributions]
            return patch_sum(None, lowrank.stack(pairs, shares))

        names = list(state.template.modules)
        stacked = dict(zip(names, parallel.ordered_map(whole, names), strict=True))
        return advance(state, patches=patches_of(state).append(stacked), dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="flora",
            title="FLoRA",
            paper="2409.05976",
            exact=True,
            gauge_invariant=True,
            hetero_rank=True,
            traffic_up="r(m+n)",
            traffic_down="min(c(m+n), mn)",
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
    )


def fedex_lora() -> Method:
    """FedEx-LoRA: FedIT's means, and the residual T − s B̄Ā added to every client's base.

    With s_k folded into B_k the residual is Σ p_k (B_k − B̄)(A_k − Ā), and since Σ p_k (B_k − B̄) = 0 any one A_j
    may stand in for Ā: (K−1)·r columns hold it exactly, without a dense matrix.

    Source: Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
    Models" (2410.09432).
    Differences: the residual stays low-rank while that is smaller than the matrix. The clients receive T in
    every gauge, but its split between adapter and patch, and so their further training, is not invariant.
    """

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        log = patches_of(state)
        return Broadcast(factors_of(state), state.dense, patch=log.total, news=log.since(request.seen))

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        s = state.template.scaling(state.template.rank)
        shares = partial.shares()

        def means(name: str) -> tuple[Tensors, Patch | None, float]:
            # s_k B_k, not B_k: the clients' scalings may differ even where their ranks do not.
            pairs = partial.deltas(name)
            mean_b = weighted_mean([x.b for x in pairs], shares)
            mean = {"a": weighted_mean([x.a for x in pairs], shares), "b": mean_b / s}
            terms = [LowRank(x.b - mean_b, x.a - pairs[-1].a) for x in pairs[:-1]]
            if not terms:
                return mean, None, 0.0
            residual = patch_sum(None, lowrank.stack(terms, shares[:-1]))
            return (
                mean,
                residual,
                lowrank.norm(residual) if isinstance(residual, LowRank) else float(scales.norms(residual)),
            )

        by_module = dict(zip(state.modules, parallel.ordered_map(means, state.modules), strict=True))
        residuals = {name: residual for name, (_, residual, _) in by_module.items() if residual is not None}
        log = patches_of(state).append(residuals) if residuals else patches_of(state)
        diagnostics = {"residual_norm": math.hypot(*(norm for _, _, norm in by_module.values()))}
        modules = {name: mean for name, (mean, _, _) in by_module.items()}
        return advance(state, modules=modules, patches=log, dense=partial.mean_dense()), diagnostics

    return Method(
        info=MethodInfo(
            name="fedex_lora",
            title="FedEx-LoRA",
            paper="2410.09432",
            exact=True,
            gauge_invariant=True,
            hetero_rank=False,
            traffic_up="r(m+n)",
            traffic_down="r(m+n) + min((K-1)r(m+n), mn)",
        ),
        init=init_factors,
        broadcast=broadcast,
        finish=finish,
    )
