"""Algebra of low-rank products B·A that never forms the m×n matrix.

Shapes, PEFT's: B (m, r), A (r, n); m = out_features, n = in_features; c = the summed rank of a stack.

One rule serves all functions of a single pair: thin QR of B and of Aᵀ, then ordinary dense algebra on the core
R_B R_Aᵀ, which is min(m, c) × min(n, c). Householder QR is backward stable column by column, so factors of wildly
different scale (B·1e8, A·1e-8) lose nothing, which a Gram matrix would.
`left_coordinates` and `left_singular`, which servers apply to whole stacks, are the same rule and compute no more than
they return; they take leading dimensions (…), so that layers of one shape share every call. Those two expect factors
near ordinary size (`normalised`); all that takes a `LowRank` does that itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan.algebra import scales
from fedspan.support.errors import FedspanError


def promote(x: Tensor) -> Tensor:
    """Return x in float32 at least: half-precision factors are accumulated in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@dataclass(frozen=True, slots=True)
class LowRank:
    """The matrix B·A, held by its factors."""

    b: Tensor  # (m, r)
    a: Tensor  # (r, n)

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise FedspanError(
                f"factors of shapes {tuple(self.b.shape)} and {tuple(self.a.shape)}: expected (m, r) and (r, n)"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of B, an upper bound of the matrix rank."""
        return self.b.shape[1]

    def transposed(self) -> LowRank:
        """Return the n×m matrix AᵀBᵀ."""
        return LowRank(self.a.mT, self.b.mT)

    def dense(self) -> Tensor:
        """Return the m×n matrix itself: for a client's base weight and for oracles, never for a server rule."""
        return promote(self.b) @ promote(self.a)


@dataclass(frozen=True, slots=True)
class SVD:
    """U diag(σ) Vᵀ with σ decreasing."""

    u: Tensor  # (m, q)
    s: Tensor  # (q,)
    vh: Tensor  # (q, n)


def zeros(m: int, n: int, like: Tensor | None = None) -> LowRank:
    """Return the zero matrix, at rank 0."""
    make = torch.zeros if like is None else like.new_zeros
    return LowRank(make((m, 0)), make((0, n)))


def normalised(x: LowRank) -> tuple[LowRank, int]:
    """Return (B', A') near ordinary size, and e with B·A = 2^e B'·A' exactly; factors of ordinary size as they are."""
    i, j = scales.excess(x.b), scales.excess(x.a)
    return (LowRank(scales.shifted(x.b, -i), scales.shifted(x.a, -j)), i + j) if i or j else (x, 0)


def balanced(x: LowRank) -> LowRank:
    """Return the same product with B and A of like size, moved by a power of two and so exactly."""
    by = (scales.exponent(x.a) - scales.exponent(x.b)) // 2
    return LowRank(scales.shifted(x.b, by), scales.shifted(x.a, -by))


CANCELS = 16.0
"""The `term_size` of a product, in units of its norm, from which its factors are re-factored."""


Grams = tuple[Tensor, Tensor]
"""BᵀB and A Aᵀ (r, r) of a pair, multiplied in its own precision."""


def uncancelled(x: LowRank) -> LowRank:
    """Return the same product in factors whose terms b_j a_j do not cancel; x itself where they hardly do.

    Whatever is computed from B·A in the factors' precision is off by eps times the size of the terms: after a gauge of
    condition κ, by up to κ·eps of the product. With B = Q·R in float64, (Q, R·A) is the product to its own rounding.
    A pair of ordinary condition is told from its r×r Gram matrices and keeps its bits. Expects factors near ordinary
    size (`normalised`).
    """
    if promote(x.b).dtype == torch.float64:
        return x
    return x if _hardly_cancels(*_in_numpy(_grams(x))) else _refactored(x)


def prepared(x: LowRank) -> tuple[LowRank, int, Grams | None]:
    """Return `uncancelled` of `normalised`, e with B·A = 2^e B'·A', and the Gram matrices of B' and A' where it made
    them: each factor is read once where it is at ordinary size as it is."""
    if promote(x.b).dtype == torch.float64:
        return *normalised(x), None
    grams, e = _grams(x), 0
    left, right = _in_numpy(grams)
    if not (_at_ordinary_size(left, x.shape[0]) and _at_ordinary_size(right, x.shape[1])):
        x, e = normalised(x)
        grams = _grams(x)
        left, right = _in_numpy(grams)
    return (x, e, grams) if _hardly_cancels(left, right) else (_refactored(x), e, None)


_Numbers = np.ndarray[Any, np.dtype[Any]]


def _grams(x: LowRank) -> Grams:
    b, a = promote(x.b), promote(x.a)
    return b.mT @ b, a @ a.mT


def _in_numpy(grams: Grams) -> tuple[_Numbers, _Numbers]:
    """Return the same numbers for numpy, whose calls on so few cost a tenth of torch's."""
    left, right = (gram.detach().cpu().numpy() for gram in grams)
    return left, right


def _hardly_cancels(left: _Numbers, right: _Numbers) -> bool:
    terms, size = left.diagonal() @ right.diagonal(), (left * right).sum()  # ‖·‖²; the second may round below 0
    # Not <=, or a product of zeros would be re-factored; a NaN stays as it is, too.
    return not size * CANCELS**2 < terms


def _refactored(x: LowRank) -> LowRank:
    b, a = promote(x.b), promote(x.a)
    q, r = torch.linalg.qr(b.double())
    return LowRank(q.to(b), (r @ a.double()).to(a))


def _at_ordinary_size(gram: _Numbers, length: int) -> bool:
    """Return whether the longest column of a factor proves that `normalised` leaves it as it is; a NaN proves nothing.

    Parameters
    ----------
    length
        Of the columns: the largest entry is at least the longest column over its root, and at most the column.
    """
    longest = gram.diagonal().max(initial=0.0) ** 0.5
    return bool(1.01 * 2.0 ** (-scales.WINDOW - 1) * length**0.5 <= longest <= 0.99 * 2.0**scales.WINDOW)


def collected(x: LowRank) -> LowRank:
    """Return `uncancelled` of a pair of any size."""
    y, e = normalised(x)
    z = uncancelled(y)
    return x if z is y else LowRank(z.b, scales.shifted(z.a, e))


def scaled(x: LowRank, factor: float) -> LowRank:
    """Return factor · B·A."""
    return LowRank(promote(x.b) * factor, promote(x.a))


def stack(terms: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """Return Σ w_k B_k A_k as one pair [w_1 B_1 …], [A_1; …] of rank Σ r_k: exact, since nothing is computed beside the
    weights.

    Raises
    ------
    FedspanError
        When there is no term, or the terms' shapes differ.
    """
    if not terms:
        raise FedspanError("an empty sum of low-rank terms has no shape: expected at least one term")
    shapes = {term.shape for term in terms}
    if len(shapes) != 1:
        raise FedspanError(f"low-rank terms of different shapes {sorted(shapes)}: expected one shape")
    factors = [1.0] * len(terms) if weights is None else weights
    return LowRank(
        torch.cat([promote(term.b) * w for term, w in zip(terms, factors, strict=True)], dim=1),
        torch.cat([promote(term.a) for term in terms], dim=0),
    )


def core(x: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Q_B, K, Q_A) with B·A = Q_B K Q_Aᵀ, orthonormal Q_B (m, p) and Q_A (n, q), small K (p, q)."""
    q_b, r_b = torch.linalg.qr(promote(x.b))
    q_a, r_a = torch.linalg.qr(promote(x.a).mT)
    return q_b, r_b @ r_a.mT, q_a


def svd(x: LowRank) -> SVD:
    """Return the thin SVD of B·A, of at most min(m, n, r) terms."""
    x, e = normalised(x)
    q_b, k, q_a = core(x)
    u, s, vh = torch.linalg.svd(k, full_matrices=False)
    return SVD(q_b @ u, scales.shifted(s, e), vh @ q_a.mT)


def term_size(x: LowRank) -> float:
    """Return (Σ_j ‖b_j‖² ‖a_j‖²)^½ over the columns of B and rows of A, above ‖B·A‖_F where terms b_j a_j cancel."""
    sizes = scales.norms(promote(x.b), 0).double() * scales.norms(promote(x.a), 1).double()
    return float(sizes.norm())


def above_rounding(s: Tensor, size: float | Tensor = 0.0, eps: float | None = None) -> Tensor:
    """Return a mask of the singular values (…, q) that stand above rounding: σ_j > 4·q·eps·max(σ_1, size).

    Parameters
    ----------
    size
        The `term_size` of their product, (…) where there are several. Rounding follows the terms, not their sum:
        after an ill-conditioned gauge its noise stands far above eps·σ_1 and would count as directions of its own.
    eps
        The rounding of what the values were computed from; none: that of their own type.
    """
    eps = torch.finfo(s.dtype).eps if eps is None else eps
    s = s.double()  # where eps·σ_1 does not underflow
    floor = torch.as_tensor(size, dtype=s.dtype, device=s.device)[..., None]
    # Not >=, or this fails with a matrix of all zeros.
    return s > 4 * s.shape[-1] * eps * torch.maximum(s[..., :1], floor)


def numerical_rank(s: Tensor, size: float = 0.0) -> int:
    """Return the number of singular values (q,) that are `above_rounding`."""
    return int(above_rounding(s, size).sum())


def left_coordinates(b: Tensor, a: Tensor) -> Tensor:
    """Return Y with Y Yᵀ = B A Aᵀ Bᵀ, no larger than the factors: B·A on an orthonormal basis of its row space.

    Left singular vectors, singular values, norms and ‖B A − U Uᵀ B A‖ are those of Y.

    Parameters
    ----------
    b, a
        (…, m, c) and (…, c, n).

    Returns
    -------
    Tensor
        (…, m, c), or (…, m, n) where c ≥ min(m, n).
    """
    if b.shape[-1] >= min(b.shape[-2], a.shape[-1]):
        return b @ a
    return b @ _triangle(a.mT).mT


def left_singular(y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first left singular vectors of Y (…, m, q), and all its singular values.

    Returns
    -------
    tuple[Tensor, Tensor]
        U (…, m, min(rank, m, q)) orthonormal, σ (…, min(m, q)) decreasing.
    """
    m, q = y.shape[-2:]
    _, s, vh = torch.linalg.svd(_triangle(y if m > q else y.mT))
    first: Tensor = vh[..., :rank, :].mT
    if m > q:  # QR, because Y·v of a small singular value is orthogonal to the others only up to rounding
        first = torch.linalg.qr(y @ first)[0]
    return first, s


def _triangle(x: Tensor) -> Tensor:
    """Return R of X = Q R without Q: half the work, as fast as a Gram matrix in float64, and without squaring."""
    r: Tensor = torch.linalg.qr(x, mode="r")[1]
    return r


def truncate(x: LowRank, rank: int) -> LowRank:
    """Return the best rank-`rank` approximation in Frobenius norm (Eckart and Young 1936), as (U Σ, Vᵀ)."""
    f = svd(x)
    return LowRank(f.u[:, :rank] * f.s[:rank], f.vh[:rank])


def norm(x: LowRank) -> float:
    """Return ‖B·A‖_F, on a basis of the row space (a difference never goes negative, as it would through Grams)."""
    x, e = normalised(x)
    return math.ldexp(float(scales.norms(left_coordinates(promote(x.b), promote(x.a)))), e)


def distance(x: LowRank, y: LowRank) -> float:
    """Return ‖X − Y‖_F: subtract first, as a stacked pair, then take the norm."""
    return norm(stack([x, y], [1.0, -1.0]))


def inner(x: LowRank, y: LowRank) -> float:
    """Return ⟨X, Y⟩ = tr(Xᵀ Y) from r×r matrices only."""
    (x, e), (y, f) = normalised(x), normalised(y)
    return math.ldexp(float(((promote(x.b).mT @ promote(y.b)) * (promote(x.a) @ promote(y.a).mT)).sum()), e + f)
