"""FFA-LoRA: one frozen random A for all clients, only B is trained and averaged."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedspan.methods.base import Direct, Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import (
    Broadcast,
    ClientState,
    Diagnostics,
    Factors,
    Recipe,
    Request,
    Template,
    Tensors,
    Update,
    Vector,
)
from fedspan.methods.readout import fresh_adapter


def ffa_lora() -> Method:
    """FFA-LoRA: A₀ is drawn once from the run's seed and is the same everywhere; the server keeps Σ p_k s_k B_k.

    With one A₀ the average of the products is the product of the averages, so the rule is exact; but the row space
    of the global update always stays inside that of A₀. A client of rank r_k uses the first r_k rows of A₀ and the
    first r_k columns of the server's B, so ranks may differ.

    Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (2403.12313).
    Differences: mixed ranks by nesting, with each client's scaling folded into B before it is summed.
    """

    def init(template: Template, dense: Tensors) -> ServerState:
        start = fresh_adapter(template, template.rank)
        return ServerState(template, {name: {"a": f.a, "sb": f.b} for name, f in start.items()}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        rank = request.rank or state.template.rank
        s = state.template.scaling(rank)
        adapter = {name: Factors(t["sb"][:, :rank] / s, t["a"][:rank], s) for name, t in state.modules.items()}
        return Broadcast(adapter, state.dense, Recipe(train_a=False), seeded=frozenset({"a"}))

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        factors = {name: update.factors(name) for name in update.modules}
        modules = {name: Vector({"sb": f.delta().b}) for name, f in factors.items()}
        return replace(update, modules=modules), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        modules: dict[str, Tensors] = {}
        for name, kept in state.modules.items():
            mean = partial.mean(name)["sb"]  # (m, largest rank that took part)
            spare = mean.new_zeros((mean.shape[0], state.template.rank - mean.shape[1]))
            modules[name] = {"a": kept["a"], "sb": torch.cat([mean, spare], dim=1)}
        return advance(state, modules=modules, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="ffa_lora",
            title="FFA-LoRA",
            paper="2403.12313",
            exact=True,
            gauge_invariant=True,
            hetero_rank=True,
            traffic_up="rm",
            traffic_down="rm",
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        encode=encode,
        lasting=True,
        vector=Direct(_read, _write),
    )


def _read(state: ServerState) -> Tensors:
    """Return s·B of every module, whose A is common to all clients, and the heads."""
    return {**state.dense, **{f"{name}/sb": held["sb"] for name, held in state.modules.items()}}


def _write(state: ServerState, values: Tensors) -> ServerState:
    modules = {name: {**held, "sb": values[f"{name}/sb"]} for name, held in state.modules.items()}
    return replace(state, modules=modules, dense={name: values[name] for name in state.dense})
