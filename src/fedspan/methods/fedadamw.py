"""FedAdamW: averaged weights, with what local AdamW learns about the gradients' sizes and direction carried on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.methods.base import Method, MethodInfo, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.full_weights import average_weights
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Recipe, Request, Tensors, Update, Vector
from fedspan.support.errors import FedspanError

Blocks = Literal["row", "tensor"]
_MOMENT, _DIRECTION = "moment/", "direction/"
_FLOOR = 0.1
"""The share of a tensor's mean second moment below which none of its blocks falls."""


def fedadamw(alpha: float = 0.5, blocks: Blocks = "row", trains: Literal["targets", "all"] = "targets") -> Method:
    """FedAdamW: every client's AdamW starts from the mean second moments of the last round and leans to its mean step.

    With v_k client k's second moments at the end of a round, averaged within blocks, and Δ = W̄ − W the last round's
    step, a client starts from m = 0 and v = Σ p_k block(v_k), and its step t is

        x ← x − η_t m̂ / (√v̂ + ε)  +  α Δ η_t / Σ η,     weight decay decoupled, as local.weight_decay says.

    Over the round the second term adds α Δ. Starting v anew, clients of few steps would take sign-like first steps;
    sending v itself would double the traffic, its mean in every block costs next to nothing. W̄ = Σ p_k W_k is exact.

    Source: Liu et al. 2025, "FedAdamW: A Communication-Efficient Optimizer with Convergence and Generalization
    Guarantees for Federated Large Models" (2510.27486) and its public code.
    Differences: a block is an output neuron's row, or a whole tensor, for every layer, where the paper partitions by
    the kind of layer (attention heads for queries and keys, and so on) and its code sends v undivided; the moments that
    a round starts from count as a complete average, where the paper corrects v for its zero start over all rounds;
    Δ_G is spread by the learning rates of the steps, as the code's γ Δ/K is at a constant one; clients are averaged by
    the run's weights; a floor, a tenth of the tensor's mean, keeps blocks without a gradient (or noised below 0) from
    making huge first steps, which is ours.

    Parameters
    ----------
    alpha
        α ≥ 0, the weight of the last round's step; 0: no such term.
    blocks
        The part of a tensor that shares one second moment: a `row` (an output neuron) or the whole `tensor`.
    trains
        The weights that clients train: those of the target modules, or every weight of the model.
    """
    if not alpha >= 0:
        raise FedspanError(f"method.alpha = {alpha}: expected at least 0")
    if blocks not in ("row", "tensor"):
        raise FedspanError(f"method.blocks = {blocks!r}: expected 'row' or 'tensor'")
    # One number for a whole tensor is not counted.
    size = " + m" if blocks == "row" else ""
    info = MethodInfo(
        name="fedadamw",
        title="FedAdamW",
        paper="2510.27486",
        exact=True,
        gauge_invariant=True,
        hetero_rank=True,
        traffic_up=f"mn{size}",
        traffic_down=f"2mn{size}",
        trains=trains,
    )
    plain = average_weights(info, Recipe(carries_moments=True, drifts=True))

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        sent = plain.broadcast(state, request)
        directions = {name: alpha * x for name, x in _part(state, _DIRECTION).items()} if alpha else {}
        return replace(sent, correction=directions, moments=_part(state, _MOMENT))

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        modules: dict[str, Vector] = {}
        for name, value in update.dense.items():
            # A weight on which the loss does not depend has no gradient, and so no moments.
            moment = update.moments.get(name, torch.zeros_like(value))
            modules[name] = Vector({"moment": _block_means(lowrank.promote(moment), blocks)})
        return replace(update, modules=modules, moments={}, rate_sum=0.0), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        after, diagnostics = plain.finish(state, partial)
        extra = dict(state.extra)
        for name, x in after.dense.items():
            extra[_DIRECTION + name] = x - state.dense[name]
            moment = partial.mean(name)["moment"].clamp(min=0.0)
            mean = float(moment.mean())
            extra.pop(_MOMENT + name, None)
            if mean > 0:
                extra[_MOMENT + name] = moment.clamp(min=_FLOOR * mean)
        return replace(after, extra=extra), diagnostics

    # Every round starts from the moments that the server sends.
    return replace(plain, broadcast=broadcast, encode=encode, finish=finish, lasting=False)


def _part(state: ServerState, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in state.extra.items() if key.startswith(prefix)}


def _block_means(x: Tensor, blocks: Blocks) -> Tensor:
    """Return the mean of every block in a shape that expands to that of x."""
    kept = 1 if blocks == "row" and x.ndim > 1 else 0
    return x.mean(dim=tuple(range(kept, x.ndim)), keepdim=True)
