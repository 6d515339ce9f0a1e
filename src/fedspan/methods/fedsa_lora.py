"""FedSA-LoRA: A is shared and averaged, every client keeps a B of its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.fedit import check_rank, fedit
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


def fedsa_lora() -> Method:
    """FedSA-LoRA: both factors are trained, Ā = Σ p_k A_k is shared, and B_k never leaves its client.

    Client k's model is the base + s·B_k Ā. B_k is the client's own state: it is kept through rounds in which the client
    is away, and saved with the checkpoint. A client that never took part has B = 0, that is, the base itself with
    the averaged heads, and so has the server's own model.

    Source: Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (2410.01463).
    Differences: an adapter with another scaling than the run's is rescaled into its B; heads are averaged, as for all
    methods here.
    """
    plain = fedit()

    def init(template: Template, dense: Tensors) -> ServerState:
        first = fresh_adapter(template, template.rank)
        return ServerState(template, {name: {"a": f.a} for name, f in first.items()}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        template = state.template
        s = template.scaling(template.rank)
        adapter = {
            name: Factors(torch.zeros(template.modules[name][0], template.rank).to(held["a"]), held["a"], s)
            for name, held in state.modules.items()
        }
        return Broadcast(adapter, state.dense, seeded=frozenset({"b"}))

    def start(sent: Broadcast, kept: ClientState | None) -> Broadcast:
        if kept is None:
            return sent
        return replace(sent, adapter={name: replace(f, b=kept[f"{name}/b"]) for name, f in sent.adapter.items()})

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        # Rescaling makes a new tensor of B, so the client's state is no view of a model that continues to train.
        rescaled, _ = plain.encode(update, sent, kept)
        own = {f"{name}/b": rescaled.factors(name).b for name in update.modules}
        return replace(rescaled, modules={name: Vector({"a": update.factors(name).a}) for name in update.modules}), own

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        means = {name: partial.mean(name) for name in state.modules}
        return advance(state, modules=means, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="fedsa_lora",
            title="FedSA-LoRA",
            paper="2410.01463",
            exact=False,
            gauge_invariant=False,
            hetero_rank=False,
            traffic_up="rn",
            traffic_down="rn",
            personalised=True,
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        start=start,
        encode=encode,
        lasting=True,
    )
