"""Fed-PLoRA: one-rank modules in parallel; a client trains as many as it can and has the others folded into its base.

Shapes: b_j (m,), a_j (n,), j = 1 … R; sB (m, R) and A (R, n) hold all of them, scalings folded into sB.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import (
    Broadcast,
    ClientState,
    Diagnostics,
    Factors,
    Request,
    Template,
    Tensors,
    Update,
    Vector,
)
from fedspan.methods.readout import fresh_adapter
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator


def fed_plora() -> Method:
    """Fed-PLoRA: ΔW = Σ_j b_j a_jᵀ; a client trains r_k of the R modules, the rest is a frozen part of its base.

    Every module becomes the mean over the clients that trained it: with S_j those clients and N_j their examples,

        b_j ← Σ_{k∈S_j} (n_k/N_j) b_kj,    a_j ← Σ_{k∈S_j} (n_k/N_j) a_kj;    unchanged where S_j is empty.

    So every client runs the whole model whatever its rank, and no zero-padding dilutes the modules that few clients
    train, as in HetLoRA. Which r_k modules it trains changes from round to round: an order of the R modules is
    drawn for each round, and every client takes the first r_k. Factors are averaged, so the result depends on the
    clients' gauges; at equal ranks it is FedIT.

    Source: Zhang et al. 2026, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation" (2602.16936),
    from its abstract and public summaries.
    Differences: clients of one rank train the same modules in a round, and smaller ranks a part of the larger ones',
    from the run's seed, where the paper's clients select for themselves; so the server needs sums alone. The folded
    part stays beside the base in float32. Scalings are folded into b_j, because α/r_k differs between clients.
    """

    def init(template: Template, dense: Tensors) -> ServerState:
        first = fresh_adapter(template, template.rank)
        return ServerState(template, {name: {"a": f.a, "sb": f.b} for name, f in first.items()}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        rank = request.rank or state.template.rank
        if rank > state.template.rank:
            raise FedspanError(f"a client of rank {rank}: expected at most {state.template.rank}")
        order, s = module_order(state), state.template.scaling(rank)
        trained, folded = order[:rank], order[rank:]
        adapter = {name: Factors(t["sb"][:, trained] / s, t["a"][trained], s) for name, t in state.modules.items()}
        patch = {name: rest for name, t in state.modules.items() if (rest := _folded(t, folded)).rank}
        return Broadcast(adapter, state.dense, patch=patch, news=(patch,) if patch else ())

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        modules: dict[str, Vector] = {}
        for name in update.modules:
            x = update.factors(name).delta()
            modules[name] = Vector({"a": x.a, "sb": x.b, "trained": x.b.new_ones((1, x.rank))})
        return replace(update, modules=modules), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        order = module_order(state)
        modules = {name: _averaged(held, partial.mean(name), order) for name, held in state.modules.items()}
        return advance(state, modules=modules, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="fed_plora",
            title="Fed-PLoRA",
            paper="2602.16936",
            exact=False,
            gauge_invariant=False,
            hetero_rank=True,
            traffic_up="r(m+n) + r",
            traffic_down="R(m+n)",
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        encode=encode,
    )


def module_order(state: ServerState) -> Tensor:
    """Return the order (R,) of this round, of which a client trains the first r_k modules in every layer."""
    rng = generator(state.template.seed, state.round_num, "fed_plora")
    return torch.randperm(state.template.rank, generator=rng)


def _folded(held: Tensors, modules: Tensor) -> LowRank:
    """Return Σ b_j a_jᵀ over these modules, those left out that have not learnt anything."""
    live = modules[held["sb"][:, modules].any(dim=0)]
    return LowRank(held["sb"][:, live], held["a"][live])


def _averaged(held: Tensors, mean: Tensors, order: Tensor) -> Tensors:
    """Return the modules with the means over the clients that trained them, the others as they were."""
    share = mean["trained"][0]  # (largest rank that took part,): N_j/N
    trained = order[: len(share)]
    sb, a = held["sb"].to(mean["sb"].dtype, copy=True), held["a"].to(mean["a"].dtype, copy=True)
    sb[:, trained], a[trained] = mean["sb"] / share, mean["a"] / share[:, None]
    return {"a": a, "sb": sb}
