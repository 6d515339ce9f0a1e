"""What the tests of GLoRA's rounds share: federations of mixed ranks, and what one round leads to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from federations import Array, Federation, array, served, weighted_sum
from hypothesis import settings

from fedspan.methods.base import ServerState
from fedspan.methods.messages import Factors, Request, Update

laws = settings(deadline=None, max_examples=15, derandomize=True)
MIXED: dict[str, Any] = {"shapes": ((20, 20), (24, 14)), "ranks": (2, 4, 7), "counts": (5, 2, 9)}
BASES = ("projector", "energy")


def held(state: ServerState, name: str) -> Array:
    """U·C, densely."""
    return array(state.modules[name]["u"]) @ array(state.modules[name]["c"])


def with_deltas(fed: Federation, factors: list[dict[str, tuple[Array, Array]]]) -> Federation:
    """The federation with other (B, A) than were drawn."""
    updates = []
    for update, pairs in zip(fed.updates, factors, strict=True):
        made = {
            name: Factors(torch.from_numpy(b), torch.from_numpy(a), update.factors(name).scaling)
            for name, (b, a) in pairs.items()
        }
        updates.append(replace(update, modules=made))
    return replace(fed, updates=tuple(updates))


def next_round(fed: Federation, state: ServerState, updates: list[Update]) -> ServerState:
    return served(replace(fed, state=state, updates=tuple(updates)))[0]


def returned(fed: Federation, state: ServerState, rank: int, client_id: str = "client0", count: float = 1) -> Update:
    """What a client that learns nothing sends back: the readout that it was given."""
    sent = fed.method.broadcast(state, Request(rank))
    return Update(client_id, count, dict(sent.adapter), dict(fed.updates[0].dense))


def low_rank(seed: int, m: int, n: int, spectrum: list[float]) -> tuple[Array, Array, Array]:
    """(U, σ, V) with orthonormal U (m, q) and V (n, q)."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((m, len(spectrum))))
    v, _ = np.linalg.qr(rng.standard_normal((n, len(spectrum))))
    return u, np.array(spectrum), v


def added(fed: Federation, name: str) -> Array:
    """Σ p_k (adapter that came back − readout that was sent)."""

    def innovation(update: Update) -> Array:
        sent = fed.method.broadcast(fed.state, Request(update.factors(name).rank)).adapter[name]
        return fed.delta_of(update, name) - sent.scaling * array(sent.b) @ array(sent.a)

    return weighted_sum(fed, innovation)
