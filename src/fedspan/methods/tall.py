"""U·C of layers that are tall beside the stack of a few clients' factors: every layer of one shape in the same calls.

Shapes: L modules; S (L, m, c) and A (L, c, n) the stacked factors, c = Σ r_k; w (L, c) the terms' weights, so that
T = S diag(w) A; U (L, m, R), C (L, R, n).

Where c is a small part of m and n, all that `spectral.solve_exactly` computes follows from the Gram matrices SᵀS and
A Aᵀ (c, c), made once in float64: bases of the clients' column spaces (CholeskyQR; Yamamoto et al. 2015), the Gram
matrix of the stacked bases and its eigenvectors, C Cᵀ, ‖T‖². The factors are read three times and no QR touches a
matrix of m rows. float64 squares the condition of float32 factors to what it still resolves; modules whose factors are
too close to dependent for that, whose votes tie, or whose terms cancel are left to the caller. Which they are is known
at the end, in one transfer from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedspan.algebra import lowrank, subspace, ties
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.queries import Sums, ordinary_shift
from fedspan.methods.spectral import Approximation, ApproximationSpec, shifted, votes_eps, within

_TALL = 16
"""m and n are at least this many times c."""
_EPS = float(torch.finfo(torch.float32).eps)
_CERTAIN, _NOTHING = 1e-7, 1e-10
"""Eigenvalues of the Gram matrix of the bases, relative to the largest, above and below which they are told from 0."""
_DEPENDENT = 1e-13
"""Relative eigenvalues of SᵀS, at unit diagonal, that are rounding."""
_CANCELLED = 1e-6
"""‖T‖² beside the squares of its terms, below which a float64 sum of Gram products is not accurate."""


def applies(sums: Sums, shape: tuple[int, int], spec: ApproximationSpec) -> bool:
    """Return whether modules like this are solved here."""
    plain = all(x.rest is None for x in sums.contributions) and not spec.both_sides
    return plain and sums.dtype == torch.float32 and 0 < _TALL * sums.total_rank <= min(shape)


def solve(modules: Sequence[Sums], spec: ApproximationSpec) -> list[Approximation | None]:
    """Return U·C of modules of one shape whose clients have the same ranks; None where it would not be accurate."""
    stack, shifts = _Stack.of(modules)
    ranks = modules[0].ranks
    basis, safe = (
        _by_energy(stack, spec)
        if spec.basis == "energy"
        else _by_votes(stack, [r for r, _ in ranks], modules[0].weights, spec)
    )
    step = (basis.mT @ stack.gram_b) * stack.weights[:, None, :]  # C = step · A, (L, R, c)
    held = step @ stack.gram_a @ step.mT  # C Cᵀ
    live = basis.any(dim=1)
    if spec.ordered and spec.basis == "projector":
        squares, turn = _descending(held)
        live = _above_rounding(squares.clamp(min=0).sqrt(), squares.new_zeros(()))
        turn = turn * live[:, None, :]
        basis, step, held = basis @ turn, turn.mT @ step, turn.mT @ held @ turn
    size = stack.square()
    lost = (size - held.diagonal(dim1=1, dim2=2).sum(dim=1)).clamp(min=0)
    safe = safe & (size > _CANCELLED * stack.terms().square().sum(dim=1))
    u, c = (stack.b @ basis).float(), (step @ stack.a).float()
    told = torch.stack([safe.double(), live.sum(dim=1).double(), lost, size]).tolist()  # one transfer
    found: list[Approximation | None] = []
    for i, (ok, rank, out, whole) in enumerate(zip(*told, strict=True)):
        state = LowRank(u[i, :, : int(rank)].contiguous(), c[i, : int(rank)].contiguous())
        found.append(shifted(within(spec, Approximation(state, out, whole)), shifts[i]) if ok else None)
    return found


@dataclass(frozen=True, slots=True)
class _Stack:
    """The stacked factors of some modules in float64, and their Gram matrices."""

    b: Tensor  # (L, m, c)
    a: Tensor  # (L, c, n)
    weights: Tensor  # (L, c)
    gram_b: Tensor  # (L, c, c)
    gram_a: Tensor  # (L, c, c)

    @classmethod
    def of(cls, modules: Sequence[Sums]) -> tuple[_Stack, list[int]]:
        """Return T near ordinary size, and the exponents e with 2^e times it the modules' own."""
        terms = [[(w * x.scaling, x.own) for x, w in zip(s.contributions, s.weights, strict=True)] for s in modules]
        shifts = [ordinary_shift([w for w, _ in pairs]) for pairs in terms]
        b = torch.stack([torch.cat([x.b for _, x in pairs], dim=1) for pairs in terms]).double()
        a = torch.stack([torch.cat([x.a for _, x in pairs], dim=0) for pairs in terms]).double()
        columns = [
            [w * 2.0**-e for w, x in pairs for _ in range(x.rank)] for pairs, e in zip(terms, shifts, strict=True)
        ]
        weights = torch.tensor(columns, dtype=torch.float64, device=b.device)
        return cls(b, a, weights, b.mT @ b, a @ a.mT), shifts

    def terms(self) -> Tensor:
        """Return w_j ‖b_j‖ ‖a_j‖ (L, c)."""
        squares = self.gram_b.diagonal(dim1=1, dim2=2) * self.gram_a.diagonal(dim1=1, dim2=2)
        return self.weights * squares.sqrt()

    def square(self) -> Tensor:
        """Return ‖T‖_F² (L,)."""
        return (self.weights[:, :, None] * self.gram_b * self.weights[:, None, :] * self.gram_a).sum(dim=(1, 2))


def _by_votes(
    stack: _Stack, ranks: Sequence[int], shares: Sequence[float], spec: ApproximationSpec
) -> tuple[Tensor, Tensor]:
    """Return P (L, c, R) with U = S·P the consensus of the clients' column spaces, and where it is accurate (L,)."""
    coordinates, safe = _own_bases(stack, ranks, shares, spec.vote)
    votes, vectors = _descending(coordinates.mT @ stack.gram_b @ coordinates)
    top = votes[:, :1]
    named = votes > _CERTAIN * top  # not >=, or a sum of zeros would name directions
    unclear = (votes > _NOTHING * top) & ~named
    safe = safe & ~unclear[:, : spec.rank + 1].any(dim=1)
    width = ties.reach(votes_eps(torch.float32))
    close = (votes[:, :-1] - votes[:, 1:] < width) & named[:, 1:]
    first = 0 if not spec.ordered else spec.rank - 1
    safe = safe & ~close[:, first : spec.rank].any(dim=1)
    kept = named[:, : spec.rank]
    inverse = torch.where(kept, torch.where(kept, votes[:, : spec.rank], 1.0).rsqrt(), 0.0)
    return coordinates @ (vectors[:, :, : spec.rank] * inverse[:, None, :]), safe


def _own_bases(stack: _Stack, ranks: Sequence[int], shares: Sequence[float], vote: int | None) -> tuple[Tensor, Tensor]:
    """Return V (L, c, c') with S·V = [√p_1 Q_1, …, √p_K Q_K], and where every basis is accurate (L,)."""
    count, c = stack.gram_b.shape[:2]
    widths = [r if vote is None else min(r, vote) for r in ranks]
    v = stack.gram_b.new_zeros((count, c, sum(widths)))
    safe = torch.ones(count, dtype=torch.bool, device=v.device)
    starts = [sum(ranks[:k]) for k in range(len(ranks))]
    columns = [sum(widths[:k]) for k in range(len(ranks))]
    for rank in sorted(set(ranks) - {0}):
        members = [k for k, r in enumerate(ranks) if r == rank]
        blocks = [slice(starts[k], starts[k] + rank) for k in members]
        gram_b, gram_a = (torch.cat([g[:, at, at] for at in blocks]) for g in (stack.gram_b, stack.gram_a))
        z, good, *_ = subspace.whitened(gram_b, gram_a, _EPS, max_rank=vote)
        safe = safe & good.reshape(-1, count).all(dim=0)
        for k, at, own in zip(members, blocks, torch.split(z, count), strict=True):
            v[:, at, columns[k] : columns[k] + widths[k]] = own * shares[k] ** 0.5
    # What is not accurate may be anything, and an eigensolver refuses NaN.
    return torch.where(safe[:, None, None], v, 0.0), safe


def _by_energy(stack: _Stack, spec: ApproximationSpec) -> tuple[Tensor, Tensor]:
    """Return P (L, c, R) with U = S·P the left singular vectors of T, zero where made of rounding; all are accurate."""
    lengths = stack.gram_b.diagonal(dim1=1, dim2=2).sqrt()
    inverse = torch.where(lengths > 0, 1 / torch.where(lengths > 0, lengths, 1.0), 0.0)
    values, vectors = torch.linalg.eigh(inverse[:, :, None] * stack.gram_b * inverse[:, None, :])
    kept = values > _DEPENDENT * values[:, -1:]
    roots = torch.where(kept, values, 0.0).sqrt()
    # S = Q diag(roots) vectorsᵀ diag(lengths), with an orthonormal Q where roots > 0.
    core = roots[:, :, None] * vectors.mT * (lengths * stack.weights)[:, None, :]
    squares, turn = _descending(core @ stack.gram_a @ core.mT)
    sizes = squares.clamp(min=0).sqrt()
    live = _above_rounding(sizes, stack.terms().norm(dim=1))[:, : spec.rank]
    back = torch.where(kept, torch.where(kept, roots, 1.0).reciprocal(), 0.0)
    p = (inverse[:, :, None] * vectors * back[:, None, :]) @ (turn[:, :, : spec.rank] * live[:, None, :])
    return p, torch.isfinite(p).flatten(1).all(dim=1)


def _descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, decreasing, and eigenvectors of symmetric X (L, q, q)."""
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    return values.flip(-1), vectors.flip(-1)


def _above_rounding(s: Tensor, size: Tensor) -> Tensor:
    """Return which singular values stand above the rounding of float32 factors."""
    return lowrank.above_rounding(s, size, _EPS)
