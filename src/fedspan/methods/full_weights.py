"""Direct averaging of weights: FedAvg on the whole model, FedFTG with GaLore in the client."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from fedspan.methods.base import Direct, Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import (
    Broadcast,
    ClientState,
    Diagnostics,
    GaloreOptions,
    Recipe,
    Request,
    Template,
    Tensors,
    Update,
)
from fedspan.support.errors import FedspanError

SVDKind = Literal["exact", "randomized", "power"]
Side = Literal["auto", "left", "right"]
OnRefresh = Literal["keep", "project", "reset"]
WEIGHTS = Direct(read=lambda state: state.dense, write=lambda state, values: replace(state, dense=values))
"""The weights themselves, as the vector that a server optimizer acts on."""


def fedavg() -> Method:
    """FedAvg: every client trains every weight, and the server averages them, W̄ = Σ p_k W_k.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data"
    (1602.05629).
    Differences: the local optimizer is AdamW, as for all methods here.
    """
    info = MethodInfo(
        name="fedavg",
        title="FedAvg",
        paper="1602.05629",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="mn",
        traffic_down="mn",
        trains="all",
    )
    return average_weights(info, Recipe())


def fedftg(
    galore_rank: int | None = 8,
    update_gap: int = 50,
    scale: float = 1.0,
    svd: SVDKind = "randomized",
    side: Side = "auto",
    on_refresh: OnRefresh = "keep",
) -> Method:
    """FedFTG: GaLore on the target modules' weights in the client, plain averaging of those weights on the server.

    LoRA confines learning to the factors; a projected gradient does not: the update's rank grows with every
    projector refresh and every client, and averaging weights is exact for any local optimizer.

    Source: "Exploring Gradient Subspaces: Addressing and Overcoming LoRA's Limitations in Federated Fine-Tuning of
    Large Language Models" (2410.23111), with GaLore by Zhao et al. 2024 (2403.03507).
    Differences: the authors' public code passes its parameters without a rank, so that its optimizer never
    projects; this is what the paper describes. Their arm with full-rank AdamW is `galore_rank = "none"`. Their code
    keeps a client's optimizer state from round to round, here it starts anew: `local.keep_optimizer = true` is theirs.

    Parameters
    ----------
    galore_rank
        r of the gradient projector; `none`: no projection, plain AdamW on the same weights.
    update_gap
        Local steps between two refreshes of the projector, which also starts afresh every round unless
        `local.keep_optimizer` keeps it.
    scale
        Factor on the projected step (α in the paper).
    svd
        Algorithm for the projector; `power`, one power iteration from the last projector, is the cheapest.
    side
        The side of the weights that is projected; `auto`: the narrower one, as in GaLore.
    on_refresh
        What happens to the optimizer's moments when the projector changes: `keep` them (GaLore's rule), `project` them
        onto the new basis (LDAdam's rule), or `reset` them to zero.
    """
    galore = None
    if galore_rank is not None:
        galore = galore_options(galore_rank, update_gap, scale, svd, side, on_refresh)
    info = MethodInfo(
        name="fedftg",
        title="FedFTG",
        paper="2410.23111",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="mn",
        traffic_down="mn",
        trains="targets",
    )
    return average_weights(info, Recipe(galore=galore))


def galore_options(
    rank: int, update_gap: int, scale: float, svd: SVDKind, side: Side, on_refresh: OnRefresh
) -> GaloreOptions:
    """Return a method's options as the local optimizer takes them; a FedspanError names one that is out of range."""
    if rank < 1:
        raise FedspanError(f"method.galore_rank = {rank}: expected at least 1, or 'none'")
    if update_gap < 1:
        raise FedspanError(f"method.update_gap = {update_gap}: expected at least 1")
    if not scale > 0:
        raise FedspanError(f"method.scale = {scale}: expected more than 0")
    return GaloreOptions(rank=rank, update_gap=update_gap, scale=scale, svd=svd, side=side, on_refresh=on_refresh)


def average_weights(info: MethodInfo, recipe: Recipe) -> Method:
    """Return the method that trains weights by that recipe and averages them: W̄ = Σ p_k W_k."""

    def init(template: Template, dense: Tensors) -> ServerState:
        return ServerState(template, {}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        return Broadcast({}, state.dense, recipe)

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        return replace(update, moments={}), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        return advance(state, dense=partial.mean_dense()), {}

    return Method(
        info=info,
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        encode=encode,
        lasting=True,
        vector=WEIGHTS,
    )
