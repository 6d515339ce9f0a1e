"""FedRot-LoRA: every client turns its factors towards the last global pair before they are averaged."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.methods.base import Method
from fedspan.methods.fedit import fedit
from fedspan.methods.messages import Broadcast, ClientState, Factors, Update


def fedrot_lora() -> Method:
    """FedRot-LoRA: (B_k Q_k, Q_kᵀ A_k) with the orthogonal Q_k that brings it closest to the pair that was sent.

    Q_k = argmin ‖B_k Q/‖B_k‖ − B/‖B‖‖_F² + ‖QᵀA_k/‖A_k‖ − A/‖A‖‖_F², the orthogonal Procrustes problem of both factors
    jointly: Q_k = U Vᵀ from the SVD of the r×r matrix B_kᵀB/(‖B_k‖‖B‖) + A_kAᵀ/(‖A_k‖‖A‖). At length 1 neither factor
    outweighs the other, whatever the scale between them; a factor that is zero, as B is at first, has no influence.
    The product B_k A_k is unchanged, and what follows is FedIT: the server sees sums.

    Turning a client's pair by any orthogonal G changes nothing (Q_k undoes it); a general gauge still does.

    Source: Zhang et al. 2026, "FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA" (2602.23638).
    Differences: both factors are aligned at once, where the paper's configuration names one factor to align by; its
    softened rotations, an ablation, are left out.
    """
    plain = fedit()

    def encode(update: Update, sent: Broadcast, kept: ClientState | None) -> tuple[Update, ClientState | None]:
        update, kept = plain.encode(update, sent, kept)
        modules = {name: _turned(update.factors(name), sent.adapter[name]) for name in update.modules}
        return replace(update, modules=modules), kept

    info = replace(plain.info, name="fedrot_lora", title="FedRot-LoRA", paper="2602.23638")
    return replace(plain, info=info, encode=encode)


def _turned(f: Factors, target: Factors) -> Factors:
    """Return the same product with its factors as close to the target's as an orthogonal Q brings them."""
    overlap = _overlap(f.b.mT, target.b) + _overlap(f.a, target.a.mT)
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
