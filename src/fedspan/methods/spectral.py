"""The leading part U·C of T = Σ p_k X_k: exactly, from the stacked factors, or through a few queries.

Shapes: X_k (m, n) of rank r_k, c = Σ r_k; U (m, R) orthonormal, C (R, n); l = R + 8, the columns of a query.

One rule by shape, `prefers_exact`: while c, m or n is small, or R is not small beside all three, the exact algebra of
`fedspan.algebra.lowrank` is also the cheapest, at O(c²(m+n)). Above, U comes from a block Krylov space of two blocks
(Musco and Musco 2015, 1504.05477), which costs no product more than one power step of a randomized range finder does,
since the results for both blocks are known by then: of T and Tᵀ for the energy; of the projector sum, by a Nyström
approximation (Gittens and Mahoney 2016, 1303.1849), for the consensus. Both are query procedures, of O(c(m+n)l) work
and O((m+n)l) memory. What they lose is estimated, without bias, from Gaussian probes that are part of the
last query. Test matrix and probes have a key of their own, so a result does not depend on any other draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank, scales, ties
from fedspan.algebra.lowrank import LowRank
from fedspan.algebra.subspace import accurate_basis, column_spans
from fedspan.methods.queries import Contribution, Queries, Query, QueryResults, Sums, ordinary_shift, weighted_pairs
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

OVERSAMPLING = 8
PROBES = 8
_EXACT = 192
"""Up to this min(m, n, c) the exact algebra is used: measured, the two cross between 150 and 300."""


@dataclass(frozen=True, slots=True)
class ApproximationSpec:
    """The U·C that is to be found."""

    rank: int
    """R."""
    basis: Literal["projector", "energy"]
    both_sides: bool = False
    """A consensus right basis too; an energy basis has two sides as it is."""
    vote: int | None = None
    """The number of directions that each client may name, at most; none: all that it has."""
    tolerance: float | None = None
    """Keep the fewest directions that leave out at most this share of ‖T‖_F; the exact algebra alone can tell."""
    ordered: bool = True
    """Bring U·C into the form of its own SVD; otherwise U stays in the order of the consensus."""


@dataclass(frozen=True, slots=True)
class Approximation:
    """U·C, and the part of T that it leaves out."""

    state: LowRank
    lost_squared: float
    """‖T − U·C‖_F²."""
    size_squared: float
    """‖T‖_F²."""
    estimated: bool = False
    """Both figures are estimates from probes."""


ModuleProcedure = Generator[tuple[Query, ...], tuple[Tensor, ...], Approximation]
"""Like `QueryProcedure`, about one module."""


def prefers_exact(shape: tuple[int, int], total_rank: int, rank: int) -> bool:
    """Return whether the exact algebra is chosen for this m, n, c and R: see the head of the file."""
    smallest = min(*shape, total_rank)
    return smallest <= max(_EXACT, 4 * (rank + OVERSAMPLING))


_Totals = tuple[Tensor, Tensor]
"""The stacked factors of several modules of one shape: (modules, m, c), (modules, c, n)."""


def solve_exactly(modules: Sequence[Sums], spec: ApproximationSpec) -> list[Approximation]:
    """Return U·C for several modules of one shape whose clients have the same ranks."""
    pairs, shifts = zip(*(_stacked(sums) for sums in modules), strict=True)
    b, a = _batch([x.b for x in pairs]), _batch([x.a for x in pairs])  # (modules, m, c), (modules, c, n)
    y = lowrank.left_coordinates(b, a)
    if spec.basis == "energy":
        u, s = lowrank.left_singular(y, spec.rank)
        u = _cut(u, s, (scales.norms(b, -2) * scales.norms(a, -1)).norm(dim=-1))
    else:
        u = _consensus(modules, spec, (b, a))
    c = (u.mT @ b) @ a
    lost = _squares(torch.baddbmm(y, u, u.mT @ y, alpha=-1))
    if spec.both_sides:
        v = _consensus(modules, spec, (a.mT, b.mT), "rows")
        inside = (c @ v) @ v.mT
        lost, c = lost + _squares(c - inside), inside
    if spec.ordered and spec.basis == "projector":
        u, c = _ordered(u, c)
    ranks = u.any(dim=-2).sum(dim=-1).tolist()
    results = zip(u, c, ranks, lost.tolist(), _squares(y).tolist(), strict=True)
    found = [within(spec, Approximation(_first(u, c, rank), out, size)) for u, c, rank, out, size in results]
    return [shifted(x, e) for x, e in zip(found, shifts, strict=True)]


def _stacked(sums: Sums) -> tuple[LowRank, int]:
    """Return T near ordinary size as a stack, and e with T = 2^e · stack."""
    pairs = weighted_pairs(sums.contributions, sums.weights)
    e = ordinary_shift([w for _, w in pairs])
    return lowrank.stack([x for x, _ in pairs], [math.ldexp(w, -e) for _, w in pairs]), e


def shifted(x: Approximation, e: int) -> Approximation:
    """Return 2^e times an approximation; a FedspanError where its type cannot hold that."""
    if e == 0:
        return x
    state = LowRank(x.state.b, scales.shifted(x.state.a, e))
    if not bool(state.a.isfinite().all()):
        raise FedspanError(f"the mean update has entries of about 2^{e}: expected a product that {state.a.dtype} holds")
    return replace(
        x,
        state=state,
        lost_squared=math.ldexp(x.lost_squared, 2 * e),
        size_squared=math.ldexp(x.size_squared, 2 * e),
    )


def _squares(x: Tensor) -> Tensor:
    """Return ‖X‖_F² of every (…, rows, columns)."""
    return scales.norms(x).double().square()


def _batch(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _first(u: Tensor, c: Tensor, rank: int) -> LowRank:
    return LowRank(u[:, :rank].contiguous(), c[:rank].contiguous())


def _cut(u: Tensor, s: Tensor, size: float | Tensor = 0.0) -> Tensor:
    """Return U (modules, m, R) with its last columns zeroed where they are made of rounding."""
    return u * lowrank.above_rounding(s, size)[..., None, : u.shape[-1]]


def _consensus(
    modules: Sequence[Sums], spec: ApproximationSpec, totals: _Totals, side: Literal["columns", "rows"] = "columns"
) -> Tensor:
    """Return `subspace.consensus` of every module: U (modules, m, R), zero where fewer directions were named.

    Parameters
    ----------
    totals
        T, or Tᵀ for the rows, by its stacked factors.
    """
    pairs = [_named(x, side) for sums in modules for x in sums.contributions]
    bases = [span.basis for span in column_spans(pairs, spec.vote)]
    roots = [w**0.5 for w in modules[0].weights]
    clients = len(roots)
    stacked = []
    for k, root in enumerate(roots):
        own = bases[k::clients]
        widest = max(q.shape[1] for q in own)
        # A column of zeros names no direction.
        own = [q if q.shape[1] == widest else torch.nn.functional.pad(q, (0, widest - q.shape[1])) for q in own]
        stacked.append(_batch(own) * root)
    u, s = lowrank.left_singular(torch.cat(stacked, dim=-1), spec.rank)
    u, eps = _cut(u, s), votes_eps(s.dtype)
    for i, votes in enumerate(s):
        named = votes[lowrank.above_rounding(votes)]
        if ties.undecided(named.square(), spec.rank, not spec.ordered, eps):
            found = _by_energy(pairs[i * clients : (i + 1) * clients], roots, spec, LowRank(totals[0][i], totals[1][i]))
            u[i] = torch.nn.functional.pad(found.to(u), (0, u.shape[-1] - found.shape[1]))
    return u


def _named(x: Contribution, side: Literal["columns", "rows"]) -> LowRank:
    return x.whole() if side == "columns" else x.whole().transposed()


def _by_energy(pairs: Sequence[LowRank], roots: Sequence[float], spec: ApproximationSpec, total: LowRank) -> Tensor:
    """Return the consensus (m, ≤ R) of one module where votes tie, in float64 because rounding must break no tie."""
    stacked = torch.cat([accurate_basis(x, spec.vote) * root for x, root in zip(pairs, roots, strict=True)], dim=1)
    w, s = lowrank.left_singular(stacked, stacked.shape[1])
    kind = total.b.dtype
    named = lowrank.above_rounding(s, eps=torch.finfo(kind).eps)
    w, votes = w[:, named[: w.shape[1]]], s[named].square()
    return w @ ties.settled(votes, (w.mT @ total.b.double()) @ total.a.double(), spec.rank, votes_eps(kind))


def votes_eps(kind: torch.dtype) -> float:
    """Return the rounding of votes that tie, computed from factors of that type in float64: of second order in theirs.

    One client's are 1 however its factors were rounded, and those of clients that share a space differ by the square of
    the angle between what each of them rounded it to.
    """
    return 1e-12 if kind == torch.float32 else torch.finfo(kind).eps


def _ordered(u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same U·C in the form of its SVD: orthogonal rows of C, the longest first, those of rounding zero."""
    turn, s = lowrank.left_singular(c, c.shape[-2])
    turn = _cut(turn, s)
    return u @ turn, turn.mT @ c


def arranged(u: Tensor, c: Tensor) -> LowRank:
    """Return U·C in the form of its SVD without directions of rounding, from a U (m, R) that may have zero columns."""
    turned, rows = (x[0] for x in _ordered(u[None], c[None]))
    return _first(turned, rows, int(turned.any(dim=0).sum()))


def within(spec: ApproximationSpec, x: Approximation) -> Approximation:
    """Return the fewest leading directions that leave out at most the tolerance's share of T (or all of them)."""
    if spec.tolerance is None:
        return x
    tails = x.state.a.double().square().sum(dim=1).flip(0).cumsum(0).flip(0).tolist()
    costs = [x.lost_squared + tail for tail in (*tails, 0.0)]  # of dropping the directions j, j+1, …
    allowed = spec.tolerance**2 * x.size_squared
    rank = next((j for j, cost in enumerate(costs) if cost <= allowed), len(tails))
    return Approximation(LowRank(x.state.b[:, :rank], x.state.a[:rank]), costs[rank], x.size_squared)


def procedure_for(shape: tuple[int, int], spec: ApproximationSpec, *key: object) -> ModuleProcedure:
    """Return the procedure for U·C of one module, in three or four passes."""
    return _energy(shape, spec, key) if spec.basis == "energy" else _projectors(shape, spec, key)


def _energy(shape: tuple[int, int], spec: ApproximationSpec, key: tuple[object, ...]) -> ModuleProcedure:
    m, n = shape
    width = min(spec.rank + OVERSAMPLING, m, n)
    (y,) = yield (Query("times", gaussian(n, width, *key, "range")),)
    first = _orthonormal(y)
    (z,) = yield (Query("adjoint", first),)
    (y,) = yield (Query("times", _orthonormal(z)),)
    second = beside(first, y)
    probes = gaussian(m, PROBES, *key, "probes").to(y)
    (result,) = yield (Query("adjoint", torch.cat([second, probes], dim=1)),)
    q = torch.cat([first, second], dim=1)
    c = torch.cat([z, result[:, : second.shape[1]]], dim=1).mT  # Qᵀ T
    outside = _left_out(result[:, second.shape[1] :], probes, q, c)
    turn, s = lowrank.left_singular(c, spec.rank)
    # Rounding of the factors adds no rank to C: its rows for such directions of Q stay in the row space of T.
    keep = min(turn.shape[1], lowrank.numerical_rank(s))
    u, kept = q @ turn[:, :keep], turn[:, :keep].mT @ c
    return Approximation(
        LowRank(u, kept), outside + float(_squares(s[keep:, None])), outside + float(_squares(c)), True
    )


def _projectors(shape: tuple[int, int], spec: ApproximationSpec, key: tuple[object, ...]) -> ModuleProcedure:
    sides: tuple[Literal["columns", "rows"], ...] = ("columns", "rows") if spec.both_sides else ("columns",)
    first = [first_block(size, spec.rank, *key, side) for size, side in zip(shape, sides, strict=False)]
    y_first = yield tuple(Query(side, x, spec.vote) for side, x in zip(sides, first, strict=True))
    second = [beside(x.to(y), y) for x, y in zip(first, y_first, strict=True)]
    y_second = yield tuple(Query(side, x, spec.vote) for side, x in zip(sides, second, strict=True))
    blocks = zip(first, second, y_first, y_second, strict=True)
    named = [leading(torch.cat([x.to(y), w], 1), torch.cat([y, z], 1)) for x, w, y, z in blocks]
    found = [x.settle(spec.rank, not spec.ordered) for x in named]
    u = found[0].u
    probes = gaussian(shape[0], PROBES, *key, "probes").to(u)
    asked = [Query("adjoint", torch.cat([u, probes], dim=1)), *(Query("times", x.u) for x in found[1:] if x.open)]
    result, *images = yield tuple(asked)
    u, c = found[0].chosen(result[:, : u.shape[1]].mT, spec.rank)  # C = Uᵀ T
    lost = _left_out(result[:, -PROBES:], probes, u, c)
    size = lost + float(_squares(c))
    for x in found[1:]:
        v = x.chosen(images[0].mT, spec.rank)[0] if x.open else x.u
        inside = (c @ v) @ v.mT
        lost, c = lost + float(_squares(c - inside)), inside
    return Approximation(arranged(u, c) if spec.ordered else _first(u, c, u.shape[1]), lost, size, True)


def _left_out(result: Tensor, probes: Tensor, u: Tensor, c: Tensor) -> float:
    """Return an unbiased estimate of ‖T − U Uᵀ T‖_F² from Tᵀg for Gaussian g: the mean of ‖Tᵀg − Cᵀ Uᵀ g‖²."""
    return float(_squares(result - c.mT @ (u.mT @ probes))) / probes.shape[1]


def first_block(size: int, rank: int, *key: object) -> Tensor:
    """Return Ω (size, min(R + 8, size)) with orthonormal columns, the first block of a query about projectors."""
    return _orthonormal(gaussian(size, min(rank + OVERSAMPLING, size), *key))


def beside(x: Tensor, y: Tensor) -> Tensor:
    """Return an orthonormal basis of what Y adds to the orthonormal X, as wide as Y or as there is room for."""
    # One QR of both: what is left of a Y that adds nothing is rounding, and only Householder keeps that orthogonal.
    return _orthonormal(torch.cat([x, y], dim=1))[:, x.shape[1] :]


def gaussian(rows: int, columns: int, *key: object) -> Tensor:
    """Return independent standard normal numbers (rows, columns) that depend on the key alone."""
    return torch.randn((rows, columns), generator=generator(*key))


def _orthonormal(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y)[0]
    return q


def sums_eps(kind: torch.dtype) -> float:
    """Return the rounding by which ties are told among votes from a sketch in that type: their width is eps^0.46 then.

    A narrower one would follow the rounding of the sketch, and so the clients' gauges; a wider one would mix votes that
    differ, and give another state than the exact algebra, which tells them apart.
    """
    return float(torch.finfo(kind).eps ** 1.15)


@dataclass(frozen=True, slots=True)
class Leading:
    """Leading eigenvectors of a projector sum, decreasing."""

    u: Tensor  # (m, q)
    votes: Tensor  # (q,), the eigenvalues
    open: bool = False
    """Votes tie, so that the first of them are still to be chosen, by energy."""

    def first(self, rank: int) -> Leading:
        """Return the first `rank` of them."""
        return Leading(self.u[:, :rank], self.votes[:rank])

    def settle(self, rank: int, in_order: bool = False) -> Leading:
        """Return the first `rank` of them; all, open, where ties decide which they are (or what their order is)."""
        eps = sums_eps(self.votes.dtype)
        return replace(self, open=True) if ties.undecided(self.votes, rank, in_order, eps) else self.first(rank)

    def chosen(self, image: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the chosen directions U, and Uᵀ T, from the image Wᵀ T (q, n) of all that were named."""
        if not self.open:
            return self.u, image[: self.u.shape[1]]
        v = ties.settled(self.votes, image, rank, sums_eps(self.votes.dtype)).to(self.u)
        return self.u @ v, v.mT.to(image) @ image


def leading(x: Tensor, y: Tensor) -> Leading:
    """Return the leading eigenvectors of a positive semi-definite S (m, m) of which Y = S X is known.

    All of them, where Y has fewer directions than columns: S is then Q M Qᵀ with Q a basis of Y and QᵀY = M (QᵀX).
    Otherwise those of Y (Xᵀ Y)⁺ Yᵀ ≈ S (Nyström), whose small matrix holds a direction by its eigenvalue times the
    square of what X holds of it, so that rounding hides small eigenvalues sooner.

    Parameters
    ----------
    x, y
        (m, l), X with orthonormal columns.
    """
    eps = torch.finfo(y.dtype).eps
    # Most often Y has as many directions as columns, which its triangular factor tells at a fraction of an SVD's cost.
    values = torch.linalg.svdvals(torch.linalg.qr(y.double(), mode="r")[1])
    if bool(lowrank.above_rounding(values, eps=eps).all()):
        return _nystrom(x, y)
    q, s, _ = torch.linalg.svd(y.double(), full_matrices=False)
    rank = int(lowrank.above_rounding(s, eps=eps).sum())
    q = q[:, :rank]
    # Not lstsq, whose bits differ from call to call.
    held, triangle = torch.linalg.qr(x.mT.double() @ q)
    whole = torch.linalg.solve_triangular(triangle, held.mT @ (y.mT.double() @ q), upper=True)
    votes, turn = torch.linalg.eigh((whole + whole.mT) / 2)
    return Leading((q @ turn.flip(1)).to(y), votes.flip(0).to(y))


def _nystrom(x: Tensor, y: Tensor) -> Leading:
    h = (x.mT @ y).double()
    values, vectors = torch.linalg.eigh((h + h.mT) / 2)
    # Not >=, or a sum of zeros would be divided by zero.
    kept = values > 4 * len(values) * torch.finfo(y.dtype).eps * values.max()
    half = y @ (vectors[:, kept] / values[kept].sqrt()).to(y.dtype)
    u, s = lowrank.left_singular(half, half.shape[1])
    rank = lowrank.numerical_rank(s)
    return Leading(u[:, :rank], s[:rank].square())


def run_procedure(
    procedure: ModuleProcedure, evaluate: Callable[[tuple[Query, ...]], tuple[Tensor, ...]]
) -> Approximation:
    """Run a procedure whose queries can be evaluated at once."""
    try:
        queries = next(procedure)
        while True:
            queries = procedure.send(evaluate(queries))
    except StopIteration as stop:
        approximation: Approximation = stop.value
        return approximation


def run_together(
    procedures: Mapping[str, ModuleProcedure],
) -> Generator[Queries, QueryResults, dict[str, Approximation]]:
    """Run the procedures of all modules side by side: a pass holds the next queries of each."""
    approximations: dict[str, Approximation] = {}
    results: QueryResults = {}
    while len(approximations) < len(procedures):
        queries: dict[str, tuple[Query, ...]] = {}
        for name, procedure in procedures.items():
            if name in approximations:
                continue
            try:
                queries[name] = procedure.send(results[name]) if name in results else next(procedure)
            except StopIteration as stop:
                approximations[name] = stop.value
        if queries:
            results = yield queries
    return {name: approximations[name] for name in procedures}
