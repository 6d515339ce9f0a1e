"""FedGaLore: averaged weights, and second moments that the clients' optimizers share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.subspace import consensus
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import COLLECT, Exchange, Partial, weighted_mean
from fedspan.methods.full_weights import WEIGHTS, OnRefresh, Side, SVDKind, average_weights, galore_options
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Recipe, Request, Tensors, Update
from fedspan.support.errors import FedspanError


def fedgalore(
    galore_rank: int = 8,
    update_gap: int = 50,
    scale: float = 1.0,
    svd: SVDKind = "randomized",
    side: Side = "auto",
    on_refresh: OnRefresh = "keep",
    threshold: float = 0.5,
    floor: float = 0.1,
) -> Method:
    """FedGaLore, an approximation: FedFTG whose clients also share the second moments of their projected gradients.

    The server averages the weights, W̄ = Σ p_k W_k, and takes from the second moments v_k (r, n) what the clients have
    in common: with V_k the right singular vectors of v_k and J those of [√p_1 V_1 … √p_K V_K] whose squared singular
    value is at least τ,

        v = max(v̄ J Jᵀ, φ v̄),   v̄ = Σ p_k v_k,

    from which every client's optimizer starts the next round. A squared singular value is Σ p_k ‖V_kᵀ x‖², the weight
    of the clients whose space holds the direction x, so τ = 1 keeps what all share and τ = 0 everything. Where no
    direction passes, moments start from zero as in FedFTG.

    Source: "FedGaLore" (2602.01746), whose server synchronises projected second moments by AJIVE (Feng et al. 2018,
    1704.02060).
    Differences: an approximation, because the paper's exact thresholds are not public: τ is an option here, where AJIVE
    bounds it by Wedin's theorem and by random directions. Row j of v_k belongs to client k's own j-th direction, so
    the mean matches the clients' directions by their order alone. The floor φ is ours: a direction that the projection
    leaves near (or below) zero would otherwise make Adam's first steps 1/√(1−β₂) times too long.

    Parameters
    ----------
    galore_rank
        r of the gradient projector.
    update_gap, scale, svd, side, on_refresh
        As in `fedftg`.
    threshold
        τ, from 0 to 1: the share of the clients' weight that must contain a direction for its moments to be kept.
    floor
        φ, from 0 to 1: the share of the plain mean below which no second moment falls.
    """
    galore = galore_options(galore_rank, update_gap, scale, svd, side, on_refresh)
    for name, value in (("threshold", threshold), ("floor", floor)):
        if not 0 <= value <= 1:
            raise FedspanError(f"method.{name} = {value}: expected from 0 to 1")
    info = MethodInfo(
        name="fedgalore",
        title="FedGaLore (approximation)",
        paper="2602.01746",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up="mn + r max(m,n)",
        traffic_down="mn + r max(m,n)",
        trains="targets",
    )
    plain = average_weights(info, Recipe(galore=galore))

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        moments = {name: kept["second_moment"] for name, kept in state.modules.items()}
        return replace(plain.broadcast(state, request), moments=moments)

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        return update, kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        modules: dict[str, Tensors] = {}
        joint = 0
        # A weight on which no loss depends has no gradient, and so no moments, at any client. A client that leaves out
        # moments which the others have must not end the round: theirs count alone.
        for name in (n for n in state.template.modules if any(n in u.moments for u in partial.collected)):
            moments, shares = _moments_of(partial, name)
            basis = _joint(moments, shares, threshold)
            joint += basis.shape[1]
            if basis.shape[1]:
                mean = weighted_mean(moments, shares)
                modules[name] = {"second_moment": torch.maximum(mean @ basis @ basis.mT, mean * floor)}
        diagnostics = {"joint_directions": joint / max(len(state.template.modules), 1)}
        return advance(state, modules=modules, dense=partial.mean_dense()), diagnostics

    return replace(
        plain,
        broadcast=broadcast,
        encode=encode,
        finish=finish,
        exchanges=(Exchange(COLLECT),),
        # Every round starts from the moments that the server sends.
        lasting=False,
        vector=WEIGHTS,
    )


def _moments_of(partial: Partial, name: str) -> tuple[list[Tensor], list[float]]:
    """Return the second moments of a weight, and the clients' shares among those that sent some."""
    having = [update for update in partial.collected if name in update.moments]
    whole = partial.weight if len(having) == len(partial.collected) else sum(u.num_examples for u in having)
    return [lowrank.promote(u.moments[name]) for u in having], [u.num_examples / whole for u in having]


def _joint(moments: list[Tensor], shares: list[float], threshold: float) -> Tensor:
    """Return J (n, q): the directions in the row spaces of clients that hold at least that share of the weight."""
    bases = []
    for v in moments:
        _, s, vh = torch.linalg.svd(v, full_matrices=False)
        bases.append(vh[lowrank.above_rounding(s)].mT)
    basis, shared = consensus(bases, shares, sum(q.shape[1] for q in bases))
    # Rounding must not drop a direction that all clients share.
    return basis[:, shared[: basis.shape[1]] >= threshold * (1 - 1e-5)]
