"""The choice among directions of a consensus that have equally many votes, or nearly so.

Projectors have eigenvalues 0 and 1, so equal eigenvalues of Σ p_k P_k are nothing rare: one client above the server's
rank, clients without common rows, clients of one column space. Inside such a space every basis is right, and what an
eigensolver returns follows rounding, and so the gauge of the clients' factors. Here the energy of the aggregate
decides: with W the eigenvectors, λ their eigenvalues and E = Wᵀ T Tᵀ W / ‖Wᵀ T‖²,

    diag(λ) + δ (E ∘ Φ)^½,    Φ_ij = exp(−(λ_i − λ_j)² / 2δ²),

is diagonalised instead. Φ is a positive semi-definite kernel, so this is one symmetric problem that depends smoothly on
λ and T: inside a tie it orders by energy (the root has the same eigenvectors, and tells weak directions better apart),
between eigenvalues much further apart than δ it changes nothing. Directions of equal votes and equal energy stay
undetermined, as equal singular values are for every truncation.

Shapes: λ (q,), decreasing, shares of the total weight; G = Wᵀ T (q, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

_REACH = 5.5
"""Widths beyond which two directions mix by less than 5e-8."""


def tie_width(eps: float) -> float:
    """Return δ, for eigenvalues that were computed with that rounding: far above it, and far below a vote."""
    return float(eps**0.4)


def reach(eps: float) -> float:
    """Return the distance of two eigenvalues below which their directions mix."""
    return _REACH * tie_width(eps)


def undecided(values: Tensor, rank: int, in_order: bool, eps: float) -> bool:
    """Return whether ties decide which directions are the first `rank`, or with `in_order` what their order is."""
    gaps = (values[:-1] - values[1:])[:rank]
    if not in_order:
        gaps = gaps[rank - 1 :]
    return bool((gaps < reach(eps)).any())


def settled(values: Tensor, g: Tensor, rank: int, eps: float) -> Tensor:
    """Return orthonormal V (q, ≤ rank) in float64: W V leads in votes, and among equals in energy."""
    values, g = values.double(), g.double()
    width = tie_width(eps)
    size = g.square().sum()
    energy = g @ g.mT / torch.where(size > 0, size, torch.ones_like(size))
    near = torch.exp(-((values[:, None] - values) / width).square() / 2)
    squares, turn = torch.linalg.eigh(energy * near)
    sizes = (turn * squares.clamp(min=0).sqrt()) @ turn.mT
    _, vectors = torch.linalg.eigh(torch.diag(values) + width * sizes)
    first: Tensor = vectors.flip(1)[:, :rank]
    return first
