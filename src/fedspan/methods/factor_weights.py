"""Weights of two averages of factors, chosen from the factors' inner products alone.

Shapes: B_k (m, r) and A_kᵀ (n, r) of K clients; G (K·r, K·r) the inner products of all their columns.

With M = Â Âᵀ (r, r), the problem min_p ‖Σ w_k B_k A_k − Σ p_k B_k Â‖_F has normal equations whose matrix is
H_kl = ⟨B_k Â, B_l Â⟩ = tr(M B_kᵀ B_l), linear in the K² blocks of G: after one product of the stacked factors with
themselves, in float64, no step reads a factor again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PANEL = 256
"""Columns of a panel of inner products."""
_SETTLED = 1e-13
"""A sweep that changes p and q by less, beside their size, is the last."""


def inner_products(factors: Sequence[Tensor]) -> Tensor:
    """Return XᵀX (c, c) in float64 of the stack X (m, c) of factors (m, r); only one half of it is multiplied."""
    x = torch.cat([factor.double() for factor in factors], dim=1)
    c = x.shape[1]
    gram = x.new_empty((c, c))
    for start in range(0, c, _PANEL):
        stop = min(start + _PANEL, c)
        panel = x[:, start:stop].mT @ x[:, start:]
        gram[start:stop, start:] = panel
        gram[start:, start:stop] = panel.mT
    return gram


def _blocks(factors: Sequence[Tensor]) -> Tensor:
    """Return B_kᵀ B_l of all clients, entry by entry: (r, r, K, K)."""
    k, rank = len(factors), factors[0].shape[1]
    return inner_products(factors).reshape(k, rank, k, rank).permute(1, 3, 0, 2).contiguous()


def chosen_by_grams(b: Sequence[Tensor], at: Sequence[Tensor], shares: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Return p and q (K,) after alternating least squares for min ‖Σ w_k B_k A_k − (Σ p_k B_k)(Σ q_k A_k)‖_F.

    Directions of p or q below the rounding of the inner products are left at the shares: in terms of the matrices
    B_k Â they are those of relative size below (K·eps)^½, about 3e-7.

    Parameters
    ----------
    b, at
        B_k (m, r) and A_kᵀ (n, r), of one rank.
    shares
        w (K,) in float64.
    """
    left, right = _blocks(b), _blocks(at)
    p = q = shares
    for _ in range(sweeps):
        before = torch.cat([p, q])
        p = _best(left, right, q, shares)
        q = _best(right, left, p, shares)
        after = torch.cat([p, q])
        if bool((after - before).norm() <= _SETTLED * after.norm()):
            break
    return p, q


def _best(own: Tensor, other: Tensor, q: Tensor, shares: Tensor) -> Tensor:
    """Return p minimising ‖Σ w_k B_k A_k − (Σ p_k B_k) Â‖_F for Â = Σ q_k A_k, nearest to the shares.

    Parameters
    ----------
    own, other
        The inner products (r, r, K, K) of the B_k, and of the A_kᵀ.
    """
    rank, k = own.shape[0], own.shape[-1]
    seen = other @ q  # A_k Âᵀ, (r, r, K)
    m = seen @ q  # Â Âᵀ
    lacking = (seen - m[..., None]) * shares  # w_k (A_k − Â) Âᵀ, subtracted first
    # Σ_l tr(B_kᵀ B_l · w_l (A_l − Â) Âᵀ) = ⟨B_k Â, Σ w_l B_l (A_l − Â)⟩
    turned = lacking.transpose(0, 1).reshape(rank * rank, k, 1)
    gain = torch.bmm(own.reshape(rank * rank, k, k), turned).sum(dim=(0, 2))
    roots = shares.sqrt()
    matrix = (m.flatten() @ own.reshape(rank * rank, k * k)).reshape(k, k) * roots[:, None] * roots
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    # Not >=, or a matrix of zeros would be divided by zero.
    kept = values > 4 * k * torch.finfo(values.dtype).eps * values[-1]
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    change: Tensor = roots * (vectors @ (inverse * (vectors.mT @ (roots * gain))))
    return shares + change
