"""U·C of layers over many clients' factors by `spectral`'s queries, with every layer of one shape in the same calls.

Shapes: L modules; S (L, m, c) and A (L, c, n) the stacked factors of K clients of rank r, c = K·r; w (L, c) the terms'
weights, so that T = S diag(w) A; Ω (L, ·, l), l = R + 8; U (L, m, R), C (L, R, n).

The procedures of `spectral` are about one layer and decide by numbers that they look at, for which a device other than
the CPU has to be waited for: hundreds of small calls and a dozen waits for each layer. Here the same blocks, made of
the same random numbers, are multiplied for all layers at once; orthonormal bases come from Gram matrices in float64
(CholeskyQR, twice; Yamamoto et al. 2015), singular vectors from eigenvectors of small ones. Layers for which that is
not accurate (blocks whose columns are nearly dependent, clients whose factors are, directions near rounding) are left
to the caller. Which they are is known at the end, in one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspan.algebra import lowrank, scales, subspace, ties
from fedspan.algebra.lowrank import LowRank
from fedspan.methods import spectral
from fedspan.methods.messages import Factors
from fedspan.methods.queries import ordinary_shift
from fedspan.methods.spectral import OVERSAMPLING, PROBES, Approximation, ApproximationSpec

_EPS = float(torch.finfo(torch.float32).eps)
_DEPENDENT = 1e12
"""‖G⁻¹‖ of a float64 Gram matrix at unit diagonal from which CholeskyQR is not orthogonal after its second pass."""
_ADDS_NOTHING = 1e-9
"""The share of a column's length that is left beside a basis, below which it is rounding of float64 products."""
_MARGIN = 4.0
"""Singular values within this factor of the bound of rounding are not told from rounding here."""


def applies(layer: Sequence[Factors], spec: ApproximationSpec) -> bool:
    """Return whether layers like this are solved here, of which `spectral.prefers_exact` is not true."""
    if spec.both_sides or spec.tolerance is not None:
        return False
    return len({f.rank for f in layer}) == 1 and all(f.b.dtype == f.a.dtype == torch.float32 for f in layer)


def solve(
    layers: Sequence[Sequence[Factors]],
    shares: Sequence[float],
    spec: ApproximationSpec,
    keys: Sequence[tuple[object, ...]],
) -> list[Approximation | None]:
    """Return U·C of layers of one shape whose clients all have one rank; None where it would not be accurate.

    Parameters
    ----------
    layers
        Every client's factors, by layer, as they came.
    shares
        p_k.
    keys
        Of every layer's random numbers, as for `spectral.procedure_for`.
    """
    voting = spec.basis == "projector"
    stack = _Stack.of(layers, shares, spec.vote, voting)
    found = _votes(stack, spec, keys) if voting else _energy(stack, spec, keys)
    told = torch.stack([found.safe.double(), found.live.sum(dim=1).double(), found.lost, found.size]).tolist()
    solved: list[Approximation | None] = []
    for i, (ok, rank, lost, size) in enumerate(zip(*told, strict=True)):
        state = LowRank(found.u[i, :, : int(rank)].contiguous(), found.c[i, : int(rank)].contiguous())
        solved.append(spectral.shifted(Approximation(state, lost, size, True), stack.shifts[i]) if ok else None)
    return solved


@dataclass(frozen=True, slots=True)
class _Solved:
    """U·C of every module, its columns beyond the live ones without meaning."""

    u: Tensor
    c: Tensor
    live: Tensor  # (L, R), the leading ones
    lost: Tensor  # (L,), ‖T − U·C‖_F², estimated
    size: Tensor  # (L,)
    safe: Tensor  # (L,)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The stacked factors of some modules, T near ordinary size, and the clients' bases where votes are asked for."""

    b: Tensor  # (L, m, c)
    a: Tensor  # (L, c, n)
    weights: Tensor  # (L, c, 1)
    bases: Tensor | None  # (L, m, K·q), orthonormal in blocks of q, or zero
    votes: Tensor  # (K·q, 1), every basis vector's share
    safe: Tensor  # (L,)
    shifts: list[int]

    @classmethod
    def of(cls, layers: Sequence[Sequence[Factors]], shares: Sequence[float], vote: int | None, voting: bool) -> _Stack:
        count, rank, m = len(layers), layers[0][0].rank, layers[0][0].b.shape[0]
        scalings = [[p * f.scaling for f, p in zip(layer, shares, strict=True)] for layer in layers]
        shifts = [ordinary_shift(row) for row in scalings]
        # One call for all of them; a transposed view is multiplied as it is.
        b = torch.cat([f.b for layer in layers for f in layer], dim=1).view(m, count, -1).transpose(0, 1)
        a = torch.cat([f.a for layer in layers for f in layer], dim=0).view(count, -1, layers[0][0].a.shape[1])
        own = [[w * 2.0**-e for w in row for _ in range(rank)] for row, e in zip(scalings, shifts, strict=True)]
        weights = torch.tensor(own, dtype=torch.float64).to(b)[:, :, None]
        bases, safe = _bases(b, a, rank, vote, voting)
        each = rank if vote is None else min(rank, vote)
        votes = torch.tensor([p for p in shares for _ in range(each)], dtype=torch.float64).to(b)[:, None]
        return cls(b, a, weights, bases, votes, safe, shifts)

    def times(self, x: Tensor) -> Tensor:
        """Return T X (L, m, l)."""
        return self.b @ self._weighted(self.a @ x.to(self.a))

    def adjoint(self, y: Tensor) -> Tensor:
        """Return Tᵀ Y (L, n, l)."""
        return self.a.mT @ self._weighted(self.b.mT @ y.to(self.b))

    def _weighted(self, x: Tensor) -> Tensor:
        """Return diag(w) X (L, c, l), and zeros for layers that are not fit: an eigensolver refuses what may be NaN."""
        return torch.where(self.safe[:, None, None], self.weights * x, 0.0)

    def named(self, y: Tensor) -> Tensor:
        """Return Σ p_k P_k Y (L, m, l)."""
        assert self.bases is not None  # made where votes are asked for
        return self.bases @ (self.votes * (self.bases.mT @ y.to(self.b)))


def _bases(b: Tensor, a: Tensor, rank: int, vote: int | None, voting: bool) -> tuple[Tensor | None, Tensor]:
    """Return orthonormal bases of every client's column space side by side, and where factors and they are fit (L,).

    Not fit are factors that `queries.own_contribution` would change: far from ordinary size, or of terms that cancel.
    """
    count, m, c = b.shape
    wide, tall = b.view(count, m, -1, rank), a.view(count, -1, rank, a.shape[2])
    fit = _ordinary(wide.abs().amax(dim=(1, 3))) & _ordinary(tall.abs().amax(dim=(2, 3)))
    wide, tall = wide.double(), tall.double()
    grams_b, grams_a = torch.einsum("lmkr,lmks->lkrs", wide, wide), torch.einsum("lkrn,lksn->lkrs", tall, tall)
    terms = (grams_b.diagonal(dim1=2, dim2=3) * grams_a.diagonal(dim1=2, dim2=3)).sum(dim=2)
    fit &= (grams_b * grams_a).sum(dim=(2, 3)) * lowrank.CANCELS**2 >= terms
    if not voting:
        return None, fit.all(dim=1)
    z, safe, *_ = subspace.whitened(grams_b.flatten(0, 1), grams_a.flatten(0, 1), _EPS, max_rank=vote)
    z = torch.where(safe[:, None, None], z, 0.0).view(count, c // rank, rank, -1)
    return torch.einsum("lmkr,lkrq->lmkq", wide, z).flatten(2).float(), (fit & safe.view(count, -1)).all(dim=1)


def _ordinary(largest: Tensor) -> Tensor:
    """Return which of the largest entries `lowrank.normalised` would leave as they are."""
    return (largest == 0) | ((largest >= 0.5 * 2.0**-scales.WINDOW) & (largest < 2.0**scales.WINDOW))


def _energy(stack: _Stack, spec: ApproximationSpec, keys: Sequence[tuple[object, ...]]) -> _Solved:
    """Return what `spectral`'s procedure for the energy does."""
    m, n = stack.b.shape[1], stack.a.shape[2]
    width = min(spec.rank + OVERSAMPLING, m, n)
    first, safe = _orthonormal(stack.times(_drawn(stack, n, width, keys, "range")))
    z = stack.adjoint(first)
    rows, ok = _orthonormal(z)
    second, fresh = _beside(first, stack.times(rows))
    probes = _drawn(stack, m, PROBES, keys, "probes")
    result = stack.adjoint(torch.cat([second, probes.double()], dim=2))
    q = torch.cat([first, second], dim=2)
    c = torch.cat([z, result[:, :, :width]], dim=2).mT.double()  # Qᵀ T
    outside = _left_out(result[:, :, width:], probes, q, c)
    squares, turn = _descending(c @ c.mT)
    sizes = squares.clamp(min=0).sqrt()
    above, clear = _above_rounding(sizes)
    live = above[:, : spec.rank]
    turn = turn[:, :, : live.shape[1]] * live[:, None, :]
    kept = torch.where(torch.nn.functional.pad(live, (0, above.shape[1] - live.shape[1])), squares, 0.0).sum(dim=1)
    whole = outside + squares.clamp(min=0).sum(dim=1)
    safe = safe & ok & fresh & clear[:, : spec.rank].all(dim=1)
    return _Solved((q @ turn).float(), (turn.mT @ c).float(), live, whole - kept, whole, safe)


def _votes(stack: _Stack, spec: ApproximationSpec, keys: Sequence[tuple[object, ...]]) -> _Solved:
    """Return what `spectral`'s procedure for the projectors does where the sketch does not show all of their sum.

    Energy settles all votes, which needs the image of all that were named: whether they tie is not looked at.
    """
    m, rank = stack.b.shape[1], spec.rank
    width = min(rank + OVERSAMPLING, m)
    first, safe = _orthonormal(_drawn(stack, m, width, keys, "columns"))
    y = stack.named(first)
    second, fresh = _beside(first, y)
    x = torch.cat([first, second], dim=2)
    w, votes, clear = _nystrom(x, torch.cat([y, stack.named(second)], dim=2).double())
    probes = _drawn(stack, m, PROBES, keys, "probes")
    result = stack.adjoint(torch.cat([w, probes.double()], dim=2))
    image = result[:, :, : w.shape[2]].mT.double()  # Wᵀ T
    v = _settled(votes, image, rank)
    u, c = w @ v, v.mT @ image
    lost = _left_out(result[:, :, w.shape[2] :], probes, u, c)
    size = lost + c.square().sum(dim=(1, 2))
    live = torch.ones_like(c[:, :, 0], dtype=torch.bool)
    if spec.ordered:
        squares, turn = _descending(c @ c.mT)
        live, told = _above_rounding(squares.clamp(min=0).sqrt())
        clear = clear & told.all(dim=1)
        turn = turn * live[:, None, :]
        u, c = u @ turn, turn.mT @ c
    return _Solved(u.float(), c.float(), live, lost, size, stack.safe & safe & fresh & clear)


def _nystrom(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvectors of Y (Xᵀ Y)⁺ Yᵀ, their eigenvalues, decreasing, and where all are accurate (L,)."""
    seen, _ = _descending(y.mT @ y)
    # Where Y has fewer directions than columns it shows all of the sum, and more than this approximation does.
    above, told = _above_rounding(seen.clamp(min=0).sqrt())
    whole = (above & told).all(dim=1)
    values, vectors = _descending(x.mT @ y)
    clear = values[:, -1] > _MARGIN * 4 * values.shape[1] * _EPS * values[:, 0]
    safe = (whole & clear)[:, None]
    half = y @ (vectors * torch.where(safe, values, 1.0).clamp(min=_EPS).rsqrt()[:, None, :])
    votes, turn = _descending(half.mT @ half)
    return half @ (turn * votes.clamp(min=_EPS**2).rsqrt()[:, None, :]), votes, safe[:, 0] & (votes[:, -1] > _EPS)


def _settled(votes: Tensor, image: Tensor, rank: int) -> Tensor:
    """Return `ties.settled` of every module (L, q, R): where votes do not tie it changes nothing."""
    width = ties.tie_width(spectral.sums_eps(torch.float32))
    energy = image @ image.mT
    # The trace is the size; a T of zeros has no directions by energy.
    size = energy.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    near = torch.exp(-((votes[:, :, None] - votes[:, None, :]) / width).square() / 2)
    squares, turn = torch.linalg.eigh(energy / torch.where(size > 0, size, 1.0) * near)
    sizes = (turn * squares.clamp(min=0).sqrt()[:, None, :]) @ turn.mT
    return _descending(torch.diag_embed(votes) + width * sizes)[1][:, :, :rank]


def _drawn(stack: _Stack, rows: int, columns: int, keys: Sequence[tuple[object, ...]], purpose: str) -> Tensor:
    """Return every module's Gaussian numbers (L, rows, columns), those of `spectral`, in one transfer."""
    return torch.stack([spectral.gaussian(rows, columns, *key, purpose) for key in keys]).to(stack.b)


def _orthonormal(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases (L, ·, l) of the columns of Y in float64, and where they are that (L,)."""
    once, safe = _whitened(y.double())
    twice, again = _whitened(once)
    return twice, safe & again


def _whitened(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return Y Z with Z from the Cholesky factor of its Gram matrix, and where its columns are far from dependent."""
    gram = y.mT @ y
    lengths = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    ordinary = (lengths > 0).all(dim=1) & lengths.isfinite().all(dim=1)
    scale = torch.where(ordinary[:, None], lengths, 1.0).reciprocal()
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    unit = torch.where(ordinary[:, None, None], scale[:, :, None] * gram * scale[:, None, :], eye)
    lower, failed = torch.linalg.cholesky_ex(unit)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    worst = torch.linalg.matrix_norm(inverse.mT @ inverse)
    safe = ordinary & (failed == 0) & (worst < _DEPENDENT)  # a NaN fails
    # What is not accurate may be anything, and an eigensolver refuses NaN.
    z = torch.where(safe[:, None, None], inverse.mT * scale[:, :, None], 0.0)
    return y @ z, safe


def _beside(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis (L, ·, l) of what Y adds to the orthonormal X, and where it is that (L,)."""
    y = y.double()
    rest = y - x @ (x.mT @ y)
    rest = rest - x @ (x.mT @ rest)
    adds = (rest.norm(dim=1) > _ADDS_NOTHING * y.norm(dim=1)).all(dim=1)
    q, safe = _orthonormal(rest)
    return q, safe & adds


def _left_out(result: Tensor, probes: Tensor, u: Tensor, c: Tensor) -> Tensor:
    """Return the unbiased estimates of ‖T − U Uᵀ T‖_F² (L,) from Tᵀg for the Gaussian probes g."""
    missing = result.double() - c.mT @ (u.mT @ probes.double())
    return missing.square().sum(dim=(1, 2)) / probes.shape[2]


def _above_rounding(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return which singular values stand above the rounding of float32, and of which that is certain."""
    above = lowrank.above_rounding(sizes, eps=_EPS)
    return above, torch.where(
        above, lowrank.above_rounding(sizes, eps=_EPS * _MARGIN), ~lowrank.above_rounding(sizes, eps=_EPS / _MARGIN)
    )


def _descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, decreasing, and eigenvectors of symmetric X (L, q, q)."""
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    return values.flip(-1), vectors.flip(-1)
