"""FLoRA and FedEx-LoRA: exact by adding to every client's base what the adapter cannot hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedspan.algebra import lowrank, scales
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, MethodInfo, ProductSums, ServerState, advance
from fedspan.methods.distances import Total, measurable
from fedspan.methods.fedit import check_rank, factors_of, init_factors
from fedspan.methods.folds import Partial, weighted_mean
from fedspan.methods.messages import Broadcast, Diagnostics, Request, Template, Tensors, Update
from fedspan.methods.patches import Patch, PatchLog, patch_sum
from fedspan.methods.products import mean_of, terms_of
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
            return patch_sum(None, lowrank.stack([_term(update, name) for update in partial.collected], shares))

        names = list(state.template.modules)
        return patched(state, partial, dict(zip(names, parallel.ordered_map(whole, names), strict=True)))

    def finish_by_products(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        return patched(
            state, partial, {name: _patch_of(held, partial.weight) for name, held in partial.product_sums.items()}
        )

    def patched(state: ServerState, partial: Partial, whole: Mapping[str, Patch]) -> tuple[ServerState, Diagnostics]:
        return advance(state, patches=patches_of(state).append(whole), dense=partial.mean_dense()), {}

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
        product_sums=ProductSums(finish_by_products, finish, _term),
    )


def _term(update: Update, name: str) -> LowRank:
    """Return s_k B_k A_k in factors that do not cancel."""
    x = own_contribution(update, name)
    return LowRank(lowrank.promote(x.own.b) * x.scaling, x.own.a)


def _patch_of(held: Tensors, weight: float) -> Patch:
    """Return T from its running sum."""
    terms = terms_of(held)
    if terms is None:
        total, kind = mean_of(held, weight)
        return total.to(kind)
    pairs, counts = terms
    return patch_sum(None, lowrank.stack(pairs, [count / weight for count in counts]))


@dataclass(frozen=True, slots=True)
class _Means:
    """FedIT's means of one module, and what their product lacks."""

    mean: Tensors
    residual: Patch | None
    size: float
    """The residual's norm."""
    estimated: bool = False


def _means(pairs: Sequence[LowRank], shares: Sequence[float], s: float, key: tuple[object, ...]) -> _Means:
    """Return the means of s_k B_k A_k at scaling s, and the residual T − s B̄ Ā."""
    mean = LowRank(weighted_mean([x.b for x in pairs], shares), weighted_mean([x.a for x in pairs], shares))
    tensors = {"a": mean.a, "b": mean.b / s}
    if len(pairs) == 1:
        return _Means(tensors, None, 0.0)
    terms = [LowRank(x.b - mean.b, x.a - pairs[-1].a) for x in pairs[:-1]]
    residual = patch_sum(None, lowrank.stack(terms, shares[:-1]))
    if not isinstance(residual, LowRank):
        return _Means(tensors, residual, float(scales.norms(residual)))
    if measurable(terms):
        return _Means(tensors, residual, lowrank.norm(residual))
    return _Means(tensors, residual, Total(pairs, shares, [mean.a], *key).distance(mean), estimated=True)


def _means_of_sums(partial: Partial, name: str, s: float, key: tuple[object, ...]) -> _Means:
    """Return the same from running sums."""
    held = partial.product_sums[name]
    terms = terms_of(held)
    if terms is not None:
        pairs, counts = terms
        return _means(pairs, [count / partial.weight for count in counts], s, key)
    mean = partial.mean(name)
    tensors = {"a": mean["a"], "b": mean["b"] / s}
    if partial.num_clients == 1:
        return _Means(tensors, None, 0.0)
    total, kind = mean_of(held, partial.weight)
    sums = partial.sums[name]
    residual = (total - (sums["b"] / partial.weight) @ (sums["a"] / partial.weight)).to(kind)
    return _Means(tensors, residual, float(scales.norms(residual)))


def fedex_lora() -> Method:
    """FedEx-LoRA: FedIT's means, and the residual T − s B̄Ā added to every client's base.

    With s_k folded into B_k the residual is Σ p_k (B_k − B̄)(A_k − Ā), and since Σ p_k (B_k − B̄) = 0 any one A_j
    may stand in for Ā: (K−1)·r columns hold it exactly, without a dense matrix.

    Source: Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
    Models" (2410.09432).
    Differences: the residual stays low-rank while that is smaller than the matrix. The clients receive T in
    every gauge, but its split between adapter and patch, and so their further training, is not invariant. For many
    clients of a large layer the residual's norm, a diagnostic, is an estimate (`fedspan.methods.distances`).
    """

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        log = patches_of(state)
        return Broadcast(factors_of(state), state.dense, patch=log.total, news=log.since(request.seen))

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        s = state.template.scaling(state.template.rank)
        shares = partial.shares()

        def means(name: str) -> _Means:
            # s_k B_k, not B_k: the clients' scalings may differ even where their ranks do not.
            return _means(partial.deltas(name), shares, s, (state.template.seed, state.round_num, name))

        return patched(
            state, partial, dict(zip(state.modules, parallel.ordered_map(means, state.modules), strict=True))
        )

    def finish_by_products(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        s = state.template.scaling(state.template.rank)

        def means(name: str) -> _Means:
            return _means_of_sums(partial, name, s, (state.template.seed, state.round_num, name))

        return patched(state, partial, {name: means(name) for name in state.modules})

    def patched(
        state: ServerState, partial: Partial, by_module: Mapping[str, _Means]
    ) -> tuple[ServerState, Diagnostics]:
        residuals = {name: x.residual for name, x in by_module.items() if x.residual is not None}
        log = patches_of(state).append(residuals) if residuals else patches_of(state)
        diagnostics = {"residual_norm": math.hypot(*(x.size for x in by_module.values()))}
        if any(x.estimated for x in by_module.values()):
            diagnostics["residual_norm_estimated"] = 1.0
        modules = {name: x.mean for name, x in by_module.items()}
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
        product_sums=ProductSums(finish_by_products, finish, lambda u, name: u.factors(name).delta(), factors=True),
    )
