"""FedRot-LoRA: every client turns its factors towards the last global pair before they are averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.methods.base import Method, ServerState
from fedspan.methods.fedit import fedit
from fedspan.methods.messages import Broadcast, ClientState, Factors, Request, Update
from fedspan.support.errors import FedspanError

Align = Literal["both", "alternate"]


def fedrot_lora(align: Align = "both") -> Method:
    """FedRot-LoRA: (B_k Q_k, Q_kᵀ A_k) with the orthogonal Q_k that brings it closest to the pair that was sent.

    Q_k = argmin ‖B_k Q/‖B_k‖ − B/‖B‖‖_F² + ‖QᵀA_k/‖A_k‖ − A/‖A‖‖_F², the orthogonal Procrustes problem of both factors
    jointly: Q_k = U Vᵀ from the SVD of the r×r matrix B_kᵀB/(‖B_k‖‖B‖) + A_kAᵀ/(‖A_k‖‖A‖). At length 1 neither factor
    outweighs the other, whatever the scale between them; a factor that is zero, as B is at first, has no influence.
    The product B_k A_k is unchanged, and what follows is FedIT: the server sees sums.

    With `align = "alternate"` one factor alone determines Q_k, as in the authors' code: none in round 1, A in rounds
    2, 4, 6, …, where Q_k = U Vᵀ from the SVD of A_kAᵀ, and B in rounds 3, 5, 7, …, from that of B_kᵀB.

    Turning a client's pair by any orthogonal G changes nothing (Q_k undoes it), but for round 1 of `alternate`; a
    general gauge still does.

    Source: Zhang et al. 2026, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA" (2602.23638).
    Differences: the default, ours, aligns by both factors at once and from round 1 on; `alternate` is the rule of the
    authors' public code, whose softened rotations, off by default there, are left out.

    Parameters
    ----------
    align
        The factors that determine Q_k: `both` in every round, or `alternate`, one of them from round 2 on.
    """
    if align not in ("both", "alternate"):
        raise FedspanError(f"method.align = {align!r}: expected 'both' or 'alternate'")
    plain = fedit()

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        sent = plain.broadcast(state, request)
        if align == "both" or state.round_num == 0:
            return sent
        return replace(sent, recipe=replace(sent.recipe, align="a" if state.round_num % 2 else "b"))

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        update, kept = plain.encode(update, sent, kept)
        by = "ab" if align == "both" else sent.recipe.align or ""
        modules = {name: _turned(update.factors(name), sent.adapter[name], by) for name in update.modules}
        return replace(update, modules=modules), kept

    info = replace(plain.info, name="fedrot_lora", title="FedRot-LoRA", paper="2602.23638")
    # A kept optimizer's moments would be about the pair before it was turned.
    return replace(plain, info=info, broadcast=broadcast, encode=encode, lasting=False)


def _turned(f: Factors, target: Factors, by: str) -> Factors:
    """Return the same product with the factors that are named as close to the target's as an orthogonal Q brings them.

    Parameters
    ----------
    by
        "ab", "a", "b", or nothing.
    """
    overlap = torch.zeros(f.rank, f.rank, dtype=torch.float64, device=f.b.device)
    if "b" in by:
        overlap = overlap + _overlap(f.b.mT, target.b)
    if "a" in by:
        overlap = overlap + _overlap(f.a, target.a.mT)
    if not overlap.any():
        return f
    u, _, vh = torch.linalg.svd(overlap)
    q = u @ vh  # (r, r)
    b, a = lowrank.promote(f.b), lowrank.promote(f.a)
    return Factors(b @ q.to(b), q.mT.to(a) @ a, f.scaling)


def _overlap(x: Tensor, y: Tensor) -> Tensor:
    """Return X Y / (‖X‖ ‖Y‖) in float64; zero where one of them is."""
    x, y = x.double(), y.double()
    size = x.norm() * y.norm()
    return x @ y / torch.where(size > 0, size, torch.ones_like(size))
