"""HetLoRA: zero-padding, sparsity-weighted averaging, rank self-pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fedspan.algebra import lowrank
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


def hetlora(gamma: float = 0.99, penalty: float = 5e-3) -> Method:
    """HetLoRA: a client of rank r_k trains the first r_k of the global's R components; the server pads and averages.

    Ā = Σ w_k pad(A_k), B̄ = Σ w_k pad(s_k B_k) with w_k ∝ n_k ‖(s_k B_k A_k)_modules‖_F. A client penalises the tail
    of its components, λ‖B[:, γr:]‖‖A[γr:, :]‖, and gives the tail up for good when training has shrunk it.

    Source: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models" (2401.06432).
    Differences: the scaling is folded into B, because α/r_k differs between the clients that are averaged; the paper's
    weights leave n_k out, which is `federation.weighting = "equal"` here; heads are averaged by the plain counts;
    components beyond every participant's rank are padded with zeros in B alone, so that they can still learn.

    Parameters
    ----------
    gamma
        γ: the tail of a client's components starts at ⌊γ r⌋ (at least 1); 1 turns pruning off.
    penalty
        λ, the weight of the tail's norm in the client's loss.
    """
    if not 0 < gamma <= 1:
        raise FedspanError(f"method.gamma = {gamma}: expected above 0 and at most 1")

    def init(template: Template, dense: Tensors) -> ServerState:
        first = fresh_adapter(template, template.rank)
        return ServerState(template, {name: {"a": f.a, "sb": f.b} for name, f in first.items()}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        rank = request.rank or state.template.rank
        s = state.template.scaling(rank)
        adapter = {name: Factors(t["sb"][:, :rank] / s, t["a"][:rank], s) for name, t in state.modules.items()}
        return Broadcast(adapter, state.dense)

    def tail_of(rank: int) -> int:
        return max(1, int(gamma * rank)) if gamma < 1 else rank

    def start(sent: Broadcast, kept: ClientState | None) -> Broadcast:
        rank = max(f.rank for f in sent.adapter.values())
        if kept is not None:
            rank = min(rank, int(kept["rank"]))
        adapter = {name: Factors(f.b[:, :rank], f.a[:rank], f.scaling) for name, f in sent.adapter.items()}
        tail = tail_of(rank)
        recipe = replace(sent.recipe, tail_penalty=(penalty, tail)) if tail < rank else sent.recipe
        return replace(sent, adapter=adapter, recipe=recipe)

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        factors = {name: update.factors(name) for name in update.modules}
        rank = max(f.rank for f in factors.values())
        tail = tail_of(rank)
        if tail < rank and _tail_norm(factors, tail) < _tail_norm(sent.adapter, tail):
            rank = tail
        factors = {name: Factors(f.b[:, :rank], f.a[:rank], f.scaling) for name, f in factors.items()}
        size = sum(lowrank.norm(f.delta()) ** 2 for f in factors.values()) ** 0.5
        modules = {
            name: Vector({"a": x.a * size, "sb": x.b * size, "size": x.a.new_full((1, 1), size)})
            for name, x in ((name, f.delta()) for name, f in factors.items())
        }
        return replace(update, modules=modules), {"rank": torch.tensor(rank)}

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        modules: dict[str, Tensors] = {}
        for name, kept in state.modules.items():
            mean = partial.mean(name)
            size = float(mean["size"])
            if size == 0:  # every adapter is still zero: there is nothing to weight by
                modules[name] = kept
                continue
            sb = mean["sb"] / size  # (m, largest rank that took part)
            rank = sb.shape[1]
            # Components that no client trained keep their A: with both factors zero they would never have a gradient.
            modules[name] = {
                "a": torch.cat([mean["a"] / size, kept["a"][rank:].to(sb.dtype)], dim=0),
                "sb": torch.cat([sb, sb.new_zeros((sb.shape[0], state.template.rank - rank))], dim=1),
            }
        return advance(state, modules=modules, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="hetlora",
            title="HetLoRA",
            paper="2401.06432",
            exact=False,
            gauge_invariant=False,
            hetero_rank=True,
            traffic_up="r(m+n)",
            traffic_down="r(m+n)",
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        start=start,
        encode=encode,
        prunes=gamma < 1,
    )


def _tail_norm(factors: Mapping[str, Factors], tail: int) -> float:
    return float(sum(f.b[:, tail:].norm() * f.a[tail:].norm() for f in factors.values()))
