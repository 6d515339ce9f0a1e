"""Column spaces of low-rank updates: bases, the consensus of several, angles between two.

Shapes: Q_k (m, q_k) orthonormal; P_k = Q_k Q_kᵀ its projector, never formed; U (m, R) the consensus basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedspan import lowrank
from fedspan.lowrank import LowRank


def column_basis(x: LowRank, max_rank: int | None = None) -> Tensor:
    """Orthonormal basis of col(B·A): the left singular vectors above rounding.

    The column space of the *product*, so that neither the gauge, nor its conditioning, nor a zero factor on
    either side changes it. A zero update gives no column.

    Parameters
    ----------
    max_rank
        Keep at most so many directions, those of largest singular value.

    Returns
    -------
    Tensor
        (m, q) with q ≤ r.
    """
    f = lowrank.svd(x)
    keep = lowrank.numerical_rank(f.s, lowrank.term_size(x))
    return f.u[:, : keep if max_rank is None else min(keep, max_rank)]


def consensus(bases: Sequence[Tensor], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """Top-`rank` eigenvectors of the weighted projector sum Σ p_k Q_k Q_kᵀ.

    They are the left singular vectors of [√p_1 Q_1 … √p_K Q_K], so no m×m matrix is formed. Chen et al. 2026
    (2605.06733) call this the consensus update subspace; the formula is our reconstruction of it.

    Returns
    -------
    tuple[Tensor, Tensor]
        U (m, R') orthonormal with R' ≤ rank (fewer when the union of the spaces is smaller), and all
        eigenvalues of the projector sum, decreasing: 1 where every client agrees.
    """
    stacked = torch.cat([q * w**0.5 for q, w in zip(bases, weights, strict=True)], dim=1)
    if stacked.shape[1] == 0:
        return stacked, stacked.new_zeros(0)
    u, s, _ = torch.linalg.svd(stacked, full_matrices=False)
    keep = min(rank, lowrank.numerical_rank(s))
    return u[:, :keep], s.square()


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """Angles in radians, increasing, between span(U) and span(V), both orthonormal (Björck and Golub 1973).

    Small angles are taken from their sine: the cosine alone cannot tell 1e-4 from 0 in float32.
    """
    # The smaller space is measured against the larger.
    small, large = (u, v) if u.shape[1] <= v.shape[1] else (v, u)
    overlap = large.mT @ small
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(small - large @ overlap).flip(0).clamp(max=1.0)
    return torch.where(cosines.square() < 0.5, torch.arccos(cosines), torch.arcsin(sines))
