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
"""Directions that are known of a matrix that is too large for its whole spectrum."""
_OVERSAMPLING = 8
_POWERS = 2
_EXACT_SPACE = 96
"""Up to this min(m, n) a leading subspace comes from an SVD."""
_EXACT_VALUES = 192
"""Up to this min(m, n) singular values come from an SVD, up to the next from the eigenvalues of a Gram matrix."""
_GRAM_VALUES = 768


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Squared singular values, decreasing: all of them, or the first ones and the sum of all."""

    squares: Tensor  # (q,)
    total: float
    complete: bool

    def tail(self, rank: int) -> float | None:
        """Σ_{j > rank} σ_j²; none beyond what is known."""
        if self.complete:
            return float(self.squares[rank:].sum())
        return max(self.total - float(self.squares[:rank].sum()), 0.0) if rank <= len(self.squares) else None


def leading(x: Tensor, rank: int, *key: object) -> Tensor:
    """The first left singular vectors of X that stand above rounding, at most `rank`.

    Above a size they are those of a randomized range finder (Halko, Martinsson and Tropp 2011, 0909.4061) with two
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
    """What is known of the singular values of X at a price of at most O(mn·min(m, n)) at 768, O(mn) above."""
    size = min(x.shape)
    if size > _GRAM_VALUES:
        squares = _sketched(x, SKETCH_RANK, *key)[1][:SKETCH_RANK].square()
        return Spectrum(squares, max(float(x.square().sum()), float(squares.sum())), False)
    if size > _EXACT_VALUES:
        wide = (x if x.shape[0] <= x.shape[1] else x.mT).double()
        squares = torch.linalg.eigvalsh(wide @ wide.mT).flip(0).clamp(min=0)
    else:
        squares = torch.linalg.svdvals(x).square()
    return Spectrum(squares, float(squares.sum()), True)


def _sketched(x: Tensor, rank: int, *key: object) -> tuple[Tensor, Tensor]:
    q: Tensor = torch.randn((x.shape[1], rank + _OVERSAMPLING), generator=generator(*key, "sketch")).to(x)
    q = torch.linalg.qr(x @ q)[0]
    for _ in range(_POWERS):
        q = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ q)[0])[0]
    u, s = lowrank.left_singular(q.mT @ x, rank)
    return q @ u, s


def effective_rank(known: Spectrum) -> float | None:
    """exp(−Σ q_j log q_j) with q_j = σ_j² / Σ σ²: how many directions the energy is spread over.

    Where only the first singular values are known it is a lower bound: the rest of the energy counts as if it lay in
    directions as strong as the last known one, of all spectra that fit the one with the least entropy.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    Differences: on squared singular values, shares of energy, as for all figures here; theirs takes σ_j itself.

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
    """‖X‖_F² / σ₁², none for a matrix of zeros."""
    return known.total / float(known.squares[0]) if known.total > 0 else None


def degrees(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """All principal angles of all pairs of orthonormal bases, in degrees; an empty space has none."""
    angles = [principal_angles(u, v) for u, v in pairs if u.shape[1] and v.shape[1]]
    return torch.cat(angles).rad2deg() if angles else torch.zeros(0)
