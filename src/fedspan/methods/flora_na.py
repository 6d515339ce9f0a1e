"""FLoRA-NA: the weights of the two averages are chosen so that their product comes nearest the ideal update.

Shapes: B_k (m, r), A_k (r, n); p, q (K,). T stands for Σ p_k B_k A_k with the plain shares: the scaling is common to
all clients and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import Method
from fedspan.methods.factor_weights import chosen_by_grams
from fedspan.methods.fedit import fedit
from fedspan.methods.folds import weighted_mean
from fedspan.methods.lora_fair import Round, nearer
from fedspan.support.errors import FedspanError

_GRAMS_FROM = 192
"""Σ r_k above which inner products of the factors replace bases of them: a QR of every sweep costs K times as much."""


def flora_na(sweeps: int = 10) -> Method:
    """FLoRA-NA: B̂ = Σ p_k B_k, Â = Σ q_k A_k with p, q ∈ ℝ^K minimising ‖T − B̂ Â‖_F.

    Alternating least squares from the plain shares: for a given Â the best p is the solution of a linear problem in
    the K matrices B_k Â, and likewise q. Neither step can increase the distance, so what is broadcast is never farther
    from T than FedIT's product. Where the K matrices are dependent, the solution closest to the shares is taken, in
    the norm Σ (p_k − w_k)²/w_k of shares w: a client that is split in two changes nothing.

    Source: Nguyen et al. 2025, "Communication-Efficient and Accurate Approach for Aggregation in Federated Low-Rank
    Adaptation" (2509.26399).
    Differences: alternating least squares in place of gradient steps; the ideal update is weighted by the shares.

    Parameters
    ----------
    sweeps
        Number of times that p and then q are solved for.
    """
    if sweeps < 1:
        raise FedspanError(f"method.sweeps = {sweeps}: expected at least 1")

    def refine(x: Round) -> LowRank:
        shares = torch.tensor(x.shares, dtype=torch.float64, device=x.mean.b.device)
        p, q = _chosen(x.pairs, shares, sweeps)
        means = [weighted_mean([pair.b for pair in x.pairs], p.tolist())]
        means.append(weighted_mean([pair.a for pair in x.pairs], q.tolist()))
        return LowRank(*means)

    return nearer(replace(fedit().info, name="flora_na", title="FLoRA-NA", paper="2509.26399"), refine)


def _chosen(pairs: Sequence[LowRank], shares: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Return p and q (K,)."""
    columns = sum(x.rank for x in pairs)
    if _GRAMS_FROM < columns < min(pairs[0].shape):
        return chosen_by_grams([x.b for x in pairs], [x.a.mT for x in pairs], shares, sweeps)
    # On bases of all the clients' columns and rows the same problem has at most Σ r_k of each.
    b, a = _on_a_basis([x.b for x in pairs]), _on_a_basis([x.a.mT for x in pairs]).mT  # (K, ·, r), (K, r, ·)
    p = q = shares
    for _ in range(sweeps):
        p = _best(b, a, torch.einsum("k,kij->ij", q, a), shares)
        q = _best(a.mT, b.mT, torch.einsum("k,kij->ji", p, b), shares)
    return p, q


def _on_a_basis(factors: Sequence[Tensor]) -> Tensor:
    """Return the factors (m, r) in float64 on an orthonormal basis of all their columns: (K, min(m, K·r), r)."""
    stacked = torch.cat([x.double() for x in factors], dim=1)
    if stacked.shape[1] < stacked.shape[0]:
        stacked = torch.linalg.qr(stacked, mode="r")[1]
    return stacked.reshape(stacked.shape[0], len(factors), -1).transpose(0, 1)


def _best(b: Tensor, a: Tensor, fixed: Tensor, weights: Tensor) -> Tensor:
    """Return p minimising ‖Σ w_k B_k A_k − (Σ p_k B_k) Â‖_F for Â = `fixed` (r, ·), by an orthogonal method."""
    basis, triangle = torch.linalg.qr(fixed.mT)  # Âᵀ = Q S; what is outside row(Â) does not depend on p
    columns = b @ triangle.mT  # (K, ·, r): B_k Â Q
    # Σ w_k B_k (A_k − Â) Q, subtracted first: what the plain shares leave.
    rest = torch.einsum("k,kij->ij", weights, b @ ((a - fixed) @ basis))
    roots = weights.sqrt()
    scaled = (columns * roots[:, None, None]).flatten(1).mT  # (·r, K)
    r = torch.linalg.qr(torch.cat([scaled, rest.flatten()[:, None]], dim=1), mode="r")[1]
    u, s, vh = torch.linalg.svd(r[:, :-1], full_matrices=False)
    keep = lowrank.above_rounding(s)
    solution: Tensor = vh[keep].mT @ ((u[:, keep].mT @ r[:, -1]) / s[keep])
    return weights + roots * solution
