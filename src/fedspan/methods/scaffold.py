"""SCAFFOLD: control variates against the drift of clients with different data."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from fedspan.algebra.lowrank import promote
from fedspan.methods.base import Method, MethodInfo, ServerState
from fedspan.methods.fedit import check_rank
from fedspan.methods.ffa_lora import ffa_lora
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.full_weights import average_weights
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Recipe, Request, Tensors, Update, Vector
from fedspan.support.errors import FedspanError


def scaffold(
    optimizer: Literal["sgd", "adamw"] = "sgd",
    server_rate: float = 1.0,
    trains: Literal["all", "targets", "adapter"] = "all",
) -> Method:
    """SCAFFOLD, option II: every local step follows g_k + c − c_k, so that clients do not drift to their own optima.

    The client keeps c_k and trains with the correction c − c_k; afterwards

        c_k⁺ = c_k − c + (W − W_k) / Σ η_t,      the mean of its own gradients along the way,

    and sends W_k and c_k⁺ − c_k. The server: W ← W + ρ Σ p_k (W_k − W),  c ← c + |S|/N Σ p_k (c_k⁺ − c_k), |S| of the
    run's N clients having taken part. With equal weights c stays the mean of all clients' c_k, those that have never
    taken part counting as 0; with `federation.weighting = "examples"` and full participation, the weighted mean.

    With `trains = "adapter"` W is B beside FFA-LoRA's A₀, which is the same everywhere, and the heads. On a pair of
    trained factors the rule is not offered: gradients of factors in different gauges have no mean.

    Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning" (1910.06378).
    Differences: clients are averaged by the run's weights, the paper's plainly (`federation.weighting = "equal"`);
    Σ η_t in place of K·η follows any schedule of the learning rate; the correction is added to the clipped gradient,
    so c_k is the mean of clipped gradients, weight decay included; where N is unknown, |S|/N counts as 1. Adapters are
    ours, and there all clients train one rank.

    Parameters
    ----------
    optimizer
        `sgd`: the method as published, which requires `local.optimizer = "sgd"`. `adamw`: a heuristic for any local
        optimizer, outside the paper's theory: the correction passes through Adam's moments, and c_k⁺ is a mean of
        scaled steps rather than of gradients.
    server_rate
        ρ, the server's step size; 1 in the paper's experiments.
    trains
        The weights that clients train: every weight of the model, or those of the target modules; or an `adapter`.
    """
    if not server_rate > 0:
        raise FedspanError(f"method.server_rate = {server_rate}: expected above 0")
    info = MethodInfo(
        name="scaffold",
        title="SCAFFOLD",
        paper="1910.06378",
        exact=server_rate == 1,
        gauge_invariant=True,
        hetero_rank=trains != "adapter",
        traffic_up="2rm" if trains == "adapter" else "2mn",
        traffic_down="2rm" if trains == "adapter" else "2mn",
        trains=trains,
        optimizer="sgd" if optimizer == "sgd" else "any",
    )
    plain = replace(ffa_lora(), info=info) if trains == "adapter" else average_weights(info, Recipe())

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        if trains == "adapter":
            check_rank(state, request)
        sent = plain.broadcast(state, request)
        # Before the first round c = 0, and nothing is sent for it.
        return replace(sent, correction=state.extra, recipe=replace(sent.recipe, corrected=True))

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        if not update.rate_sum > 0:
            raise FedspanError(
                f"{update.client_id} trained with learning rates of sum {update.rate_sum}: expected above 0"
            )
        own: dict[str, Tensor] = {}
        for name, (before, after) in _movements(update, sent).items():
            own[name] = (promote(before) - promote(after)) / update.rate_sum
            if name in sent.correction:
                own[name] -= sent.correction[name]
        change = own if kept is None else {name: value - kept[name] for name, value in own.items()}
        answer, _ = plain.encode(update, sent, kept)
        controls = {name.removesuffix(_B): Vector({**_values(answer, name), _CONTROL: x}) for name, x in change.items()}
        return replace(answer, modules=controls), own

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        after, diagnostics = plain.finish(state, partial)
        total = state.template.num_clients
        share = partial.num_clients / total if total else 1.0
        control: dict[str, Tensor] = {}
        for name in partial.sums:
            key = name + _B if name in state.modules else name
            control[key] = share * partial.mean(name)[_CONTROL]
            if key in state.extra:
                control[key] = state.extra[key] + control[key]
        return replace(_stepped(plain, state, after, server_rate), extra=control), diagnostics

    return replace(
        plain,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        start=_corrected,
        encode=encode,
        # A server optimizer would move the weights by other steps than those that c is about.
        vector=None,
    )


_B, _CONTROL = "/b", "control"


def _corrected(sent: Broadcast, kept: ClientState | None) -> Broadcast:
    if kept is None:
        return sent
    c = sent.correction
    return replace(sent, correction={name: c[name] - own if name in c else -own for name, own in kept.items()})


def _movements(update: Update, sent: Broadcast) -> dict[str, tuple[Tensor, Tensor]]:
    """Return every trained tensor, by the name that training has for it, before and after."""
    moved = {name: (sent.dense[name], value) for name, value in update.dense.items()}
    for name in update.modules:
        f, start = update.factors(name), sent.adapter[name]
        if f.rank != start.rank:
            raise FedspanError(f"an adapter of rank {f.rank}: expected rank {start.rank} for every client")
        moved[name + _B] = start.b, promote(f.b) * (f.scaling / start.scaling)
    return moved


def _values(answer: Update, name: str) -> Tensors:
    """Return the adapter method's own part of the answer about a tensor; a dense weight has none."""
    module = name.removesuffix(_B)
    return answer.vector(module) if name.endswith(_B) and module in answer.modules else {}


def _stepped(plain: Method, state: ServerState, after: ServerState, server_rate: float) -> ServerState:
    """Return the state with W + ρ (W̄ − W) in place of W̄."""
    assert plain.vector is not None
    before, means = plain.vector.read(state), plain.vector.read(after)
    # At ρ = 1 the mean itself, to the bit.
    values = {name: mean + (server_rate - 1) * (mean - before[name]) for name, mean in means.items()}
    return plain.vector.write(after, values)
