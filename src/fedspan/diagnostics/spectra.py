"""Spectra, leading subspaces and angles of one matrix: exactly while it is small, through a seeded sketch above.

Shapes: X (m, n); U (m, R) orthonormal; σ (q,) decreasing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.subspace import principal_angles
from fedspan.support.seeding import generator

SKETCH_RANK = 32
"""Number of leading directions computed of a matrix that is too large for its whole spectrum."""
_OVERSAMPLING = 8
"""Extra columns of the sketch."""
_POWERS = 2
"""Power steps of the sketch, which sharpen a slowly decaying spectrum."""
_EXACT_SPACE = 96
"""Largest min(m, n) whose leading subspace comes from an SVD."""
_EXACT_VALUES = 192
"""Largest min(m, n) whose singular values come from an SVD."""
_GRAM_VALUES = 768
"""Largest min(m, n) whose singular values come from the eigenvalues of a Gram matrix; above it they are sketched."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Squared singular values, decreasing: all of them, or the first ones and the sum of all."""

    squares: Tensor  # (q,)
    total: float
    """The sum of all squares, ‖X‖_F²."""
    complete: bool
    """All singular values are in `squares`."""

    def tail(self, rank: int) -> float | None:
        """Return Σ_{j > rank} σ_j²; none where too few singular values are known."""
        if self.complete:
            return float(self.squares[rank:].sum())
        return max(self.total - float(self.squares[:rank].sum()), 0.0) if rank <= len(self.squares) else None


def leading(x: Tensor, rank: int, *key: object) -> Tensor:
    """Return the first left singular vectors of X that stand above rounding, at most `rank` of them.

    For large X they are those of a randomized range finder (Halko, Martinsson and Tropp 2011, 0909.4061) with two
    power steps; its test matrix depends on `key` alone.

    Returns
    -------
    Tensor
        U (m, R') orthonormal, R' ≤ rank.
    """
    if min(x.shape) <= _EXACT_SPACE or 4 * (rank + _OVERSAMPLING) >= min(x.shape):
        u, s = lowrank.left_singular(x, rank)
    else:
        u, s = _sketched(x, rank, *key)
    return u[:, : lowrank.numerical_rank(s)]


def spectrum(x: Tensor, *key: object) -> Spectrum:
    """Return the singular values of X: all of them while min(m, n) ≤ 768, the first 32 above.

    Costs O(mn·min(m, n)) up to that size, and O(mn) above it.
    """
    size = min(x.shape)
    if size > _GRAM_VALUES:
        squares = _sketched(x, SKETCH_RANK, *key)[1][:SKETCH_RANK].square()
        return Spectrum(squares, max(float(x.square().sum()), float(squares.sum())), False)
    if size > _EXACT_VALUES:
        # The Gram matrix squares the condition number, so it is formed in float64.
        wide = (x if x.shape[0] <= x.shape[1] else x.mT).double()
        squares = torch.linalg.eigvalsh(wide @ wide.mT).flip(0).clamp(min=0)
    else:
        squares = torch.linalg.svdvals(x).square()
    return Spectrum(squares, float(squares.sum()), True)


def _sketched(x: Tensor, rank: int, *key: object) -> tuple[Tensor, Tensor]:
    """Return approximate leading left singular vectors (m, R) and singular values (R,) of X."""
    q: Tensor = torch.randn((x.shape[1], rank + _OVERSAMPLING), generator=generator(*key, "sketch")).to(x)
    q = torch.linalg.qr(x @ q)[0]
    for _ in range(_POWERS):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ q)[0])[0]
    u, s = lowrank.left_singular(q.mT @ x, rank)
    return q @ u, s


def effective_rank(known: Spectrum) -> float | None:
    """Return exp(−Σ q_j log q_j) with q_j = σ_j² / Σ σ²: the number of directions that the energy is spread over.

    Where only the first singular values are known it is a lower bound: the rest of the energy counts as if it lay in
    directions as strong as the last known one, which of all spectra that fit has the least entropy.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    Differences: on squared singular values, shares of energy, as for all figures here; they take σ_j itself.

    Returns
    -------
    float or None
        Between 1 and min(m, n); none for a matrix of zeros.
    """
    if not known.total > 0:
        return None
    q = known.squares / known.total
    entropy = float(-torch.special.xlogy(q, q).sum())
    rest, last = 1.0 - float(q.sum()), float(q[-1])
    if not known.complete and rest > 0 and last > 0:
        full, left = divmod(rest, last)
        entropy -= full * last * math.log(last) + (left * math.log(left) if left > 0 else 0.0)
    return math.exp(entropy)


def stable_rank(known: Spectrum) -> float | None:
    """Return ‖X‖_F² / σ₁²; none for a matrix of zeros."""
    return known.total / float(known.squares[0]) if known.total > 0 else None


def degrees(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return all principal angles of all pairs of orthonormal bases, in degrees; an empty space has none."""
    angles = [principal_angles(u, v) for u, v in pairs if u.shape[1] and v.shape[1]]
    return torch.cat(angles).rad2deg() if angles else torch.zeros(0)
