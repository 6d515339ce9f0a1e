"""RoLoRA: rounds take turns, B in one and A in the next; the other factor is frozen and the same for all clients."""

from __future__ import annotations

from dataclasses import replace

from fedspan.algebra import lowrank
from fedspan.methods.base import Method, MethodInfo, ServerState, advance
from fedspan.methods.fedit import check_rank, factors_of, fedit, init_factors
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Recipe, Request, Update, Vector


def rolora() -> Method:
    """RoLoRA: B̄ = Σ p_k B_k in rounds 1, 3, 5, … and Ā = Σ p_k A_k in rounds 2, 4, 6, …, the other factor unchanged.

    With one factor common to all clients the average of the products is the product of the averages, so every round
    is exact; and unlike a method that freezes A for good, the row space of the global update moves.

    The first round trains B. B starts at 0 and the gradient of A is s·BᵀG, so a first round for A would change nothing.

    Within a round no client has a gauge of its own to change: one factor of its pair is the server's. That is what the
    tag `gauge_invariant` says here, as it does for FFA-LoRA. Writing the *global* pair as (B G, G⁻¹ A) leaves the model
    as it is but changes what the clients learn next.

    Source: Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA" (2502.01755).
    Differences: both factors are sent down, because a client that was away may hold neither; an adapter with another
    scaling than the run's is rescaled into the factor that it sends.
    """
    plain = fedit()

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        check_rank(state, request)
        trains_b = state.round_num % 2 == 0
        return Broadcast(factors_of(state), state.dense, Recipe(train_a=not trains_b, train_b=trains_b))

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        rescaled, kept = plain.encode(update, sent, kept)  # into B, and refused at another rank
        modules: dict[str, Vector] = {}
        for name in update.modules:
            f = update.factors(name)
            a = lowrank.promote(f.a) * (f.scaling / sent.adapter[name].scaling)
            modules[name] = Vector({"b": rescaled.factors(name).b} if sent.recipe.train_b else {"a": a})
        return replace(rescaled, modules=modules), kept

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        modules = {name: {**held, **partial.mean(name)} for name, held in state.modules.items()}
        return advance(state, modules=modules, dense=partial.mean_dense()), {}

    return Method(
        info=MethodInfo(
            name="rolora",
            title="RoLoRA",
            paper="2502.01755",
            exact=True,
            gauge_invariant=True,
            hetero_rank=False,
            traffic_up="rm or rn",
            traffic_down="r(m+n)",
        ),
        init=init_factors,
        broadcast=broadcast,
        finish=finish,
        exchanges=(Exchange(SUM),),
        encode=encode,
        lasting=True,
    )
