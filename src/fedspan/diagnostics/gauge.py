"""A finished round done again, with every client's factors re-factored at random."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.federation.rounds import Observation
from fedspan.methods.base import ServerState, aggregate
from fedspan.methods.messages import Factors, Request, Update
from fedspan.support.seeding import generator

CONDITION = 10.0
"""‖G‖·‖G⁻¹‖ of the gauges: moderate, so that float32 rounding is not amplified into a figure."""


def random_gauge(rank: int, *key: object) -> Tensor:
    """Return a random invertible G (r, r) in float64 with this condition number.

    Its singular values are evenly spaced in the logarithm.
    """
    draw = generator(*key, "gauge")
    left, right = (torch.linalg.qr(torch.randn((rank, rank), generator=draw, dtype=torch.float64))[0] for _ in "lr")
    # Rank 1 has one singular value; with 1, the gauge would be no more than a sign.
    spread = torch.logspace(0, -1, rank, base=CONDITION) if rank > 1 else torch.tensor([CONDITION**-0.5])
    g: Tensor = left * spread.double() @ right
    return g


def refactored(update: Update, *key: object) -> Update:
    """Return the update with every pair (B, A) written as (B G, G⁻¹ A): the same ΔW, and nothing else changes."""
    modules = {}
    for name in update.modules:
        f = update.factors(name)
        g = random_gauge(f.rank, *key, update.client_id, name)
        b, a = lowrank.promote(f.b), lowrank.promote(f.a)
        regauged_a = torch.linalg.solve(g, a.double()).to(a)
        modules[name] = Factors((b.double() @ g).to(b), regauged_a, f.scaling)
    return replace(update, modules=modules)


def applies(observation: Observation) -> bool:
    """Return whether there is a gauge to choose: both factors are trained, freely, and the result is one model for all.

    With a frozen factor only G = I keeps it, and a personalised method's clients hold the other half of the result.
    """
    info = observation.method.info
    recipes = [sent.recipe for sent in observation.broadcasts]
    free = all(recipe.train_a and recipe.train_b and not recipe.confined for recipe in recipes)
    return info.trains == "adapter" and not info.personalised and free


def regauged(observation: Observation) -> ServerState:
    """Return the state after the round if the clients had sent the same updates in other factors."""
    method, state = observation.method, observation.before
    round_num = state.round_num
    key = (state.template.seed, round_num)
    updates = [refactored(update, *key) for update in observation.updates]
    client_states = dict(observation.client_states)
    for number in range(state.exchange, len(method.exchanges)):
        if not method.exchanges[number].due(round_num):
            continue
        # Every exchange of the round is repeated from the training on: later ones build on earlier answers.
        state = replace(state, exchange=number)
        encoded = []
        for update, started in zip(updates, observation.broadcasts, strict=True):
            rank = max(update.factors(name).rank for name in update.modules)
            sent = started if number == observation.before.exchange else method.broadcast(state, Request(rank))
            leaving, kept = method.encode(update, sent, client_states.get(update.client_id))
            encoded.append(replace(leaving, num_examples=update.num_examples))
            if kept is not None:
                client_states[update.client_id] = kept
        state, _ = aggregate(method, state, encoded)
    return state
