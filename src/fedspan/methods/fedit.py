"""FedIT: average the two factors separately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedspan.algebra import lowrank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Factors, Request, Template, Tensors, Update
from fedspan.methods.readout import fresh_adapter
from fedspan.support.errors import FedspanError


def init_factors(template: Template, dense: Tensors) -> ServerState:
    """Return the state of a method that keeps one pair of factors per module: random A, zero B."""
    start = fresh_adapter(template, template.rank)
    return ServerState(template, {name: {"a": f.a, "b": f.b} for name, f in start.items()}, dense)


def factors_of(state: ServerState) -> Mapping[str, Factors]:
    """Return the state's factor pairs as adapters at the run's one rank."""
    s = state.template.scaling(state.template.rank)
    return {name: Factors(t["b"], t["a"], s) for name, t in state.modules.items()}


def check_rank(state: ServerState, request: Request) -> None:
    """Refuse a client whose rank is not the run's one rank."""
    if request.rank not in (None, state.template.rank):
        raise FedspanError(f"a client of rank {request.rank}: expected rank {state.template.rank} for every client")


def fedit() -> Method:
    """FedIT, FedAvg on LoRA factors: Ā = Σ p_k A_k, B̄ = Σ p_k B_k.

    B̄Ā is not the mean of the products: it holds every cross term B_k A_j, and it changes with each client's gauge.
    The field's baseline.

    Source: Zhang et al. 2023, "Towards Building the Federated GPT: Federated Instruction Tuning" (2305.05644).
    Differences: an adapter with another scaling than the run's is rescaled into its B before it is averaged.
    """

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        return Broadcast(factors_of(state), state.dense)

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        modules = {name: _rescaled(update.factors(name), sent.adapter[name]) for name in update.modules}
        return replace(update, modules=modules), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        means = {name: partial.mean(name) for name in state.modules}
        return advance(state, modules=means, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="fedit",
            title="FedIT",
            paper="2305.05644",
            exact=False,
            gauge_invariant=False,
            hetero_rank=False,
            traffic_up="r(m+n)",
            traffic_down="r(m+n)",
        ),
        init=init_factors,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        encode=encode,
        lasting=True,
    )


def _rescaled(f: Factors, sent: Factors) -> Factors:
    """Return the same ΔW at the scaling and rank that were sent."""
    if f.rank != sent.rank:
        raise FedspanError(f"an adapter of rank {f.rank}: expected rank {sent.rank} for every client")
    return Factors(lowrank.promote(f.b) * (f.scaling / sent.scaling), f.a, sent.scaling)
