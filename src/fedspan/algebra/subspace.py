"""Column spaces of low-rank updates: bases, the consensus of several, angles between two.

Shapes: B (m, r), A (r, n); Q_k (m, q_k) orthonormal; P_k = Q_k Q_kᵀ its projector, never formed; U (m, R) the
consensus basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import Grams, LowRank

_WORST, _WORST_WIDER = 1e2, 1e6
"""The largest ‖G⁻¹‖ of a Gram matrix with unit diagonal that is whitened, in the factors' own precision and in float64
for float32 factors. Rounding of G changes projector and basis by about ‖G⁻¹‖·eps."""
_WORST_FACTORED, _WORST_FACTORED_LARGE = 3e3, 2e4
"""The largest ‖G⁻¹‖ of a B for which B·Z is multiplied in the factors' own precision, where columns that nearly cancel
round as their terms do, by ‖G⁻¹‖^½·eps: 3e-6, and 8e-6 of a B of many rows, whose B·Z in float64 would be the most
expensive part of a server step."""
_LARGE = 1024
"""Rows from which a B has many. One client's, not a batch's: a basis must not depend on who else is in the batch."""


@dataclass(frozen=True, slots=True)
class Span:
    """The space of the orthonormal columns of B·Z: a basis that costs r×r numbers beside the factor it stands on."""

    b: Tensor  # (m, r)
    z: Tensor  # (r, q)

    @property
    def basis(self) -> Tensor:
        """Q = B·Z (m, q)."""
        return self.b.to(self.z.dtype) @ self.z


def column_basis(x: LowRank, max_rank: int | None = None) -> Tensor:
    """Return an orthonormal basis of col(B·A): the left singular vectors above rounding.

    The column space of the *product*, so that neither the gauge, nor its conditioning, nor a zero factor on
    either side changes it. A zero update gives no column.

    Parameters
    ----------
    max_rank
        Keep at most this number of directions, those of largest singular value.

    Returns
    -------
    Tensor
        (m, q) with q ≤ r.
    """
    return accurate_basis(x, max_rank).to(lowrank.promote(x.b).dtype)


def accurate_basis(x: LowRank, max_rank: int | None = None) -> Tensor:
    """Return `column_basis` in float64, where the factors' gauge multiplies rounding least.

    Directions below the factors' own precision are left out all the same: they are what the factors were rounded to.
    """
    eps = torch.finfo(lowrank.promote(x.b).dtype).eps
    x, _ = lowrank.normalised(x)
    f = lowrank.svd(LowRank(x.b.double(), x.a.double()))
    keep = int(lowrank.above_rounding(f.s, lowrank.term_size(x), eps).sum())
    return f.u[:, : keep if max_rank is None else min(keep, max_rank)]


def column_spans(
    terms: Sequence[LowRank], max_rank: int | None = None, grams: Sequence[Grams | None] = ()
) -> list[Span]:
    """Return the column spaces of many products, of any shapes, as `column_basis` does but without a QR of each.

    Where B and A, columns and rows scaled to length 1, are far from dependent, Cholesky factors of their r×r Gram
    matrices replace the triangular factors of two QRs (CholeskyQR; Yamamoto et al. 2015 on its rounding): the
    product then has full rank for certain, and B·Z spans it. Grams that are too ill-conditioned or too small or large
    for float32 are made again in float64, B·Z too, and products that are so there, or near rank deficiency, take the
    QR.

    Parameters
    ----------
    max_rank
        As for `column_basis`.
    grams
        The terms' Gram matrices in their own precision, where they are known; none: of no term.
    """
    spans: dict[int, Span] = {}
    known = {i: pair for i, pair in enumerate(grams) if pair is not None}
    left, right = ({i: pair[side].double() for i, pair in known.items()} for side in (0, 1))
    for dtype in (None, torch.float64):
        groups: dict[object, list[int]] = {}
        for i, x in enumerate(terms):
            if i not in spans and x.rank and lowrank.promote(x.b).dtype != dtype:
                groups.setdefault((x.rank, x.shape[0] >= _LARGE, x.b.dtype, x.b.device), []).append(i)
        accurate: dict[int, Tensor] = {}
        for members in groups.values():
            kind = dtype or lowrank.promote(terms[members[0]].b).dtype
            grams_b = torch.stack([left[i] if i in left else _gram(terms[i].b, kind) for i in members])
            grams_a = torch.stack([right[i] if i in right else _gram(terms[i].a.mT, kind) for i in members])
            found, enough = _whitened([terms[i] for i in members], grams_b, grams_a, max_rank, dtype is None)
            spans |= {i: span for i, span in zip(members, found, strict=True) if span is not None}
            accurate |= {i: gram for i, gram, is_so in zip(members, grams_a, enough, strict=True) if is_so}
        left, right = {}, accurate
    for i, x in enumerate(terms):
        if i not in spans:
            spans[i] = _spanned(column_basis(x, max_rank))
    return [spans[i] for i in range(len(terms))]


def _whitened(
    terms: Sequence[LowRank], grams_b: Tensor, grams_a: Tensor, max_rank: int | None, as_they_are: bool
) -> tuple[list[Span | None], list[bool]]:
    """Return the spans of terms of one rank and type for which these Grams are accurate, and None of the others.

    Returns
    -------
    tuple[list[Span | None], list[bool]]
        The spans, and of which terms A Aᵀ need not be made again in float64.
    """
    first = terms[0]
    kind = torch.promote_types(first.b.dtype, torch.float32)
    limit = _WORST if as_they_are else _WORST_WIDER
    z, safe, worst_b, worst_a, size_b, size_a = whitened(grams_b, grams_a, torch.finfo(kind).eps, limit, max_rank)
    if as_they_are:
        safe &= _ordinary(size_b) & _ordinary(size_a)
    # A Aᵀ bounds a smallest singular value, and enters a basis only where directions are cut.
    whole = max_rank is None or max_rank >= first.rank
    enough = (worst_a < _WORST) & _ordinary(size_a) & whole
    factored = _ordinary(size_b) & (worst_b < (_WORST_FACTORED_LARGE if first.shape[0] >= _LARGE else _WORST_FACTORED))
    spans = [
        None if not ok else Span(x.b, own.to(kind)) if plain else _spanned((x.b.double() @ own).to(kind))
        for x, own, ok, plain in zip(terms, z, safe.tolist(), factored.tolist(), strict=True)
    ]
    return spans, enough.tolist()


def whitened(
    grams_b: Tensor, grams_a: Tensor, eps: float, limit: float = _WORST_WIDER, max_rank: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return Z (k, r, q) with B·Z an orthonormal basis of col(B·A), where it is safe, by Gram matrices (k, r, r).

    Parameters
    ----------
    grams_b, grams_a
        BᵀB and A Aᵀ of k products, in float64.
    eps
        The rounding of the factors.
    limit
        The largest ‖G⁻¹‖ of a Gram matrix with unit diagonal that is whitened.

    Returns
    -------
    tuple[Tensor, ...]
        Z; the mask (k,) of the products of full rank for which it is accurate; ‖G⁻¹‖ of B and of A; the lengths (k, r)
        of the columns of B and of the rows of A.
    """
    left, z, worst_b, size_b = _triangle(grams_b)
    right, _, worst_a, size_a = _triangle(grams_a)
    sizes = size_b * size_a  # (k, r)
    # σ_min(B A) ≥ σ_min of the scaled B × the smallest term × σ_min of the scaled A; σ_1 and term_size ≤ Σ sizes.
    certain = sizes.min(dim=1).values / (worst_b * worst_a).sqrt()
    rounding = 4 * sizes.shape[1] * eps * sizes.sum(dim=1)
    # Not >=, or a product of zeros would pass; a NaN fails.
    safe = (worst_b < limit) & (worst_a < limit) & (certain > rounding)
    if max_rank is not None and max_rank < z.shape[2]:
        cores = torch.where(safe[:, None, None], left @ right.mT, torch.zeros_like(left))
        z = (z @ torch.linalg.svd(cores)[0])[:, :, :max_rank]
    return z, safe, worst_b, worst_a, size_b, size_a


def _spanned(q: Tensor) -> Span:
    """Return the space of a basis that stands for itself."""
    return Span(q, torch.eye(q.shape[1], dtype=q.dtype, device=q.device))


_LEAST, _MOST = 2.0**-40, 2.0**40


def _ordinary(lengths: Tensor) -> Tensor:
    """Return which of the lengths (k, r) have squares that float32 holds, in every column."""
    return ((lengths > _LEAST) & (lengths < _MOST)).all(dim=1)


def _gram(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return XᵀX (r, r) in float64 of a factor (·, r), multiplied in that precision."""
    x = factor.to(dtype)
    return (x.mT @ x).double()


def _triangle(grams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (R, Z, ‖G⁻¹‖_F, lengths): B Z orthonormal, B = (B Z) R, for Grams BᵀB (k, r, r), G at unit diagonal."""
    lengths = grams.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    unit = grams / (lengths[:, :, None] * lengths[:, None, :])
    lower, failed = torch.linalg.cholesky_ex(unit)
    eye = torch.eye(grams.shape[1], dtype=grams.dtype, device=grams.device).expand_as(grams)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    worst = torch.linalg.matrix_norm(inverse.mT @ inverse)
    worst = torch.where((failed == 0) & worst.isfinite(), worst, torch.inf)
    return lower.mT * lengths[:, None, :], inverse.mT / lengths[:, :, None], worst, lengths


def consensus(bases: Sequence[Tensor], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """Return the top-`rank` eigenvectors of the weighted projector sum Σ p_k Q_k Q_kᵀ.

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
    u, s = lowrank.left_singular(stacked, rank)
    return u[:, : lowrank.numerical_rank(s)], s.square()


def principal_angles(u: Tensor, v: Tensor) -> Tensor:
    """Return the angles in radians, increasing, between span(U) and span(V), both orthonormal (Björck and Golub 1973).

    Small angles are taken from their sine: the cosine alone cannot tell 1e-4 from 0 in float32.
    """
    # The smaller space is measured against the larger.
    small, large = (u, v) if u.shape[1] <= v.shape[1] else (v, u)
    overlap = large.mT @ small
    cosines = torch.linalg.svdvals(overlap).clamp(max=1.0)
    sines = torch.linalg.svdvals(small - large @ overlap).flip(0).clamp(max=1.0)
    return torch.where(cosines.square() < 0.5, torch.arccos(cosines), torch.arcsin(sines))
