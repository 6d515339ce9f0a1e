"""The two controls of every comparison: each client alone, and all data in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Factors, Request, Template, Tensors, Update
from fedspan.methods.readout import fresh_adapter

Trains = Literal["adapter", "targets", "all"]


def local(trains: Trains = "adapter") -> Method:
    """No federation: every client continues its own training, and nothing is sent. Figures are means over the clients.

    Parameters
    ----------
    trains
        What clients train: LoRA factors, the weights of the target modules, or every weight of the model.
    """

    def start(sent: Broadcast, kept: ClientState | None) -> Broadcast:
        if kept is None:
            return sent
        adapter = {name: Factors(kept[f"{name}/b"], kept[f"{name}/a"], f.scaling) for name, f in sent.adapter.items()}
        return replace(sent, adapter=adapter, dense={name: kept[f"{name}/dense"] for name in sent.dense})

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        keep: dict[str, torch.Tensor] = {f"{name}/dense": value for name, value in update.dense.items()}
        for name in update.modules:
            keep[f"{name}/a"], keep[f"{name}/b"] = update.factors(name).a, update.factors(name).b
        return replace(update, modules={}, dense={}), keep

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        return advance(state), {}

    info = MethodInfo(
        name="local",
        title="Local only",
        paper="control",
        exact=False,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="0",
        traffic_down="0",
        trains=trains,
        personalised=True,
        alone=True,
    )
    return Method(
        info=info,
        init=_init(trains),
        broadcast=_broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        start=start,
        encode=encode,
        lasting=True,
    )


def centralised(trains: Trains = "adapter") -> Method:
    """All data in one place: one client holds it and does as many steps a round as the cohort together.

    Parameters
    ----------
    trains
        What is trained: LoRA factors of the largest client rank, the weights of the target modules, or every weight of
        the model.
    """

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        means = {name: partial.mean(name) for name in state.modules}
        return advance(state, modules=means, dense=partial.mean_dense()), {}

    info = MethodInfo(
        name="centralised",
        title="Centralised",
        paper="control",
        exact=True,
        gauge_invariant=True,
        hetero_rank=False,
        traffic_up="data",
        traffic_down="0",
        trains=trains,
        pooled=True,
    )
    return Method(
        info=info,
        init=_init(trains),
        broadcast=_broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        lasting=True,
    )


def _init(trains: Trains) -> Callable[[Template, Tensors], ServerState]:
    def init(template: Template, dense: Tensors) -> ServerState:
        first = fresh_adapter(template, template.rank) if trains == "adapter" else {}
        return ServerState(template, {name: {"a": f.a, "b": f.b} for name, f in first.items()}, dense)

    return init


def _broadcast(state: ServerState, request: Request) -> Broadcast:
    rank = request.rank or state.template.rank
    s = state.template.scaling(rank)
    adapter = {name: Factors(t["b"][:, :rank], t["a"][:rank], s) for name, t in state.modules.items()}
    return Broadcast(adapter, state.dense, seeded=frozenset({"a", "b", "dense"}))
