"""SCAFFOLD: control variates against the drift of clients with different data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from fedspan.algebra.lowrank import promote
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Request, Template, Tensors, Update, Vector
from fedspan.support.errors import FedspanError


def scaffold(
    optimizer: Literal["sgd", "adamw"] = "sgd",
    server_rate: float = 1.0,
    trains: Literal["all", "targets"] = "all",
) -> Method:
    """SCAFFOLD, option II: every local step follows g_k + c − c_k, so that clients do not drift to their own optima.

    The client keeps c_k and trains with the correction c − c_k; afterwards

        c_k⁺ = c_k − c + (W − W_k) / Σ η_t,      the mean of its own gradients along the way,

    and sends W_k and c_k⁺ − c_k. The server: W ← W + ρ Σ p_k (W_k − W),  c ← c + |S|/N Σ p_k (c_k⁺ − c_k), |S| of the
    run's N clients having taken part. With equal weights c stays the mean of all clients' c_k, those that have never
    taken part counting as 0; with `federation.weighting = "examples"` and full participation, the weighted mean.

    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (1910.06378).
    Differences: clients are averaged by the run's weights, the paper's plainly (`federation.weighting = "equal"`);
    Σ η_t in place of K·η follows any schedule of the learning rate; the correction is added to the clipped gradient,
    so c_k is the mean of clipped gradients, weight decay included; where N is unknown, |S|/N counts as 1.

    Parameters
    ----------
    optimizer
        `sgd`: the method as published, which requires `local.optimizer = "sgd"`. `adamw`: a heuristic for any local
        optimizer, outside the paper's theory: the correction passes through Adam's moments, and c_k⁺ is a mean of
        scaled steps rather than of gradients.
    server_rate
        ρ, the server's step size; 1 in the paper's experiments.
    trains
        The weights that clients train: every weight of the model, or those of the target modules.
    """
    if not server_rate > 0:
        raise FedspanError(f"method.server_rate = {server_rate}: expected above 0")

    def init(template: Template, dense: Tensors) -> ServerState:
        return ServerState(template, {}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        # Before the first round c = 0, and nothing is sent for it.
        return Broadcast({}, state.dense, correction=state.extra)

    def start(sent: Broadcast, kept: ClientState | None) -> Broadcast:
        if kept is None:
            return sent
        c = sent.correction
        return replace(sent, correction={name: c[name] - own if name in c else -own for name, own in kept.items()})

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        if not update.rate_sum > 0:
            raise FedspanError(
                f"{update.client_id} trained with learning rates of sum {update.rate_sum}: expected above 0"
            )
        own: dict[str, Tensor] = {}
        for name, value in update.dense.items():
            own[name] = (promote(sent.dense[name]) - promote(value)) / update.rate_sum
            if name in sent.correction:
                own[name] -= sent.correction[name]
        change = own if kept is None else {name: value - kept[name] for name, value in own.items()}
        return replace(update, modules={name: Vector({"control": value}) for name, value in change.items()}), own

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        total = state.template.num_clients
        share = partial.num_clients / total if total else 1.0
        means, dense, control = partial.mean_dense(), {}, {}
        for name, mean in means.items():
            # At ρ = 1 the mean itself, to the bit.
            dense[name] = mean + (server_rate - 1) * (mean - state.dense[name])
            control[name] = share * partial.mean(name)["control"]
            if name in state.extra:
                control[name] = state.extra[name] + control[name]
        return advance(state, dense=dense, extra=control), {}

    return Method(
        info=MethodInfo(
            name="scaffold",
            title="SCAFFOLD",
            paper="1910.06378",
            exact=server_rate == 1,
            gauge_invariant=True,
            hetero_rank=True,
            traffic_up="2mn",
            traffic_down="2mn",
            trains=trains,
            optimizer="sgd" if optimizer == "sgd" else "any",
        ),
        init=init,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        start=start,
        encode=encode,
    )
