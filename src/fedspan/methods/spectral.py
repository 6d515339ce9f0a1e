"""The leading part U·C of T = Σ p_k X_k: exactly, from the stacked factors, or through a few questions.

Shapes: X_k (m, n) of rank r_k, c = Σ r_k; U (m, R) orthonormal, C (R, n); l = R + 8 columns are asked about.

One rule by shape, `prefers_exact`: while c, m or n is small, or R is not small beside all three, the exact algebra of
`fedspan.algebra.lowrank` is also the cheapest, at O(c²(m+n)). Above, U comes from a block Krylov space of two blocks
(Musco and Musco 2015, 1504.05477), which costs no product more than one power step of a randomized range finder does,
since the answers about both blocks are at hand: of T and Tᵀ for the energy; of the projector sum, by a Nyström
approximation (Gittens and Mahoney 2016, 1303.1849), for the consensus. Both are conversations in sums, of O(c(m+n)l)
work and O((m+n)l) memory. What they lose is estimated, without bias, from Gaussian probes that ride in the last
question. Test matrix and probes have a key of their own, so a result does not depend on anything else that was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.algebra.subspace import column_spans
from fedspan.methods.queries import Answers, Question, Questions, Sums, weighted_pairs
from fedspan.support.seeding import generator

_OVERSAMPLING = 8
PROBES = 8
_EXACT = 192
"""Up to this min(m, n, c) the exact algebra is taken: measured, the two cross between 150 and 300."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which U·C."""

    rank: int
    """R."""
    basis: Literal["projector", "energy"]
    both_sides: bool = False
    """A consensus right basis too; an energy basis has two sides as it is."""
    vote: int | None = None
    """How many directions each client may name at most."""
    tolerance: float | None = None
    """Keep no more directions than leave out this share of ‖T‖_F; only the exact algebra can tell."""
    ordered: bool = True
    """Bring U·C into the form of its own SVD; otherwise U stays in the order of the consensus."""


@dataclass(frozen=True, slots=True)
class Found:
    """U·C, and how much of T is not in it."""

    state: LowRank
    lost_squared: float
    """‖T − U·C‖_F²."""
    size_squared: float
    """‖T‖_F²."""
    estimated: bool = False
    """The two figures come from probes."""


Dialogue = Generator[tuple[Question, ...], tuple[Tensor, ...], Found]
"""A conversation about one module."""


def prefers_exact(shape: tuple[int, int], total_rank: int, rank: int) -> bool:
    """Whether the exact algebra is chosen for this m, n, c and R: see the head of the file."""
    smallest = min(*shape, total_rank)
    return smallest <= max(_EXACT, 4 * (rank + _OVERSAMPLING))


def exactly(modules: Sequence[Sums], wanted: Wanted) -> list[Found]:
    """U·C for several modules of one shape whose clients have the same ranks."""
    pairs = [_stacked(sums) for sums in modules]
    b, a = _batch([x.b for x in pairs]), _batch([x.a for x in pairs])  # (modules, m, c), (modules, c, n)
    y = lowrank.left_coordinates(b, a)
    if wanted.basis == "energy":
        u, s = lowrank.left_singular(y, wanted.rank)
        u = _cut(u, s, (b.norm(dim=-2) * a.norm(dim=-1)).norm(dim=-1))
    else:
        u = _consensus(modules, wanted, "columns")
    c = (u.mT @ b) @ a
    lost = _squares(torch.baddbmm(y, u, u.mT @ y, alpha=-1))
    if wanted.both_sides:
        v = _consensus(modules, wanted, "rows")
        inside = (c @ v) @ v.mT
        lost, c = lost + _squares(c - inside), inside
    if wanted.ordered and wanted.basis == "projector":
        u, c = _ordered(u, c)
    ranks = u.any(dim=-2).sum(dim=-1).tolist()
    found = zip(u, c, ranks, lost.tolist(), _squares(y).tolist(), strict=True)
    return [_within(wanted, Found(_first(u, c, rank), out, size)) for u, c, rank, out, size in found]


def _stacked(sums: Sums) -> LowRank:
    pairs = weighted_pairs(sums.terms, sums.weights)
    return lowrank.stack([x for x, _ in pairs], [w for _, w in pairs])


def _squares(x: Tensor) -> Tensor:
    """‖X‖_F² of every (…, rows, columns)."""
    size: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1))
    return size.double().square()


def _batch(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _first(u: Tensor, c: Tensor, rank: int) -> LowRank:
    return LowRank(u[:, :rank].contiguous(), c[:rank].contiguous())


def _cut(u: Tensor, s: Tensor, size: float | Tensor = 0.0) -> Tensor:
    """U (modules, m, R) with the columns zeroed that are made of rounding; they are its last."""
    return u * lowrank.above_rounding(s, size)[..., None, : u.shape[-1]]


def _consensus(modules: Sequence[Sums], wanted: Wanted, side: Literal["columns", "rows"]) -> Tensor:
    """`subspace.consensus` of every module: U (modules, m, R), zero where fewer directions were named."""
    pairs = [x.whole() if side == "columns" else x.whole().transposed() for sums in modules for x in sums.terms]
    bases = [span.basis for span in column_spans(pairs, wanted.vote)]
    roots = [w**0.5 for w in modules[0].weights]
    clients = len(roots)
    stacked = []
    for k, root in enumerate(roots):
        own = bases[k::clients]
        widest = max(q.shape[1] for q in own)
        # A column of zeros names no direction.
        own = [q if q.shape[1] == widest else torch.nn.functional.pad(q, (0, widest - q.shape[1])) for q in own]
        stacked.append(_batch(own) * root)
    u, s = lowrank.left_singular(torch.cat(stacked, dim=-1), wanted.rank)
    return _cut(u, s)


def _ordered(u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The same U·C in the form of its SVD: the rows of C orthogonal, the longest first, those of rounding zero."""
    turn, s = lowrank.left_singular(c, c.shape[-2])
    turn = _cut(turn, s)
    return u @ turn, turn.mT @ c


def arranged(u: Tensor, c: Tensor) -> LowRank:
    """U·C in the form of its SVD without directions of rounding, U (m, R) orthonormal or with columns of zeros."""
    turned, rows = (x[0] for x in _ordered(u[None], c[None]))
    return _first(turned, rows, int(turned.any(dim=0).sum()))


def _within(wanted: Wanted, found: Found) -> Found:
    """The fewest leading directions that leave out at most the tolerance's share of T (or all of them)."""
    if wanted.tolerance is None:
        return found
    tails = found.state.a.double().square().sum(dim=1).flip(0).cumsum(0).flip(0).tolist()
    costs = [found.lost_squared + tail for tail in (*tails, 0.0)]  # of dropping the directions j, j+1, …
    allowed = wanted.tolerance**2 * found.size_squared
    rank = next((j for j, cost in enumerate(costs) if cost <= allowed), len(tails))
    return Found(LowRank(found.state.b[:, :rank], found.state.a[:rank]), costs[rank], found.size_squared)


def dialogue(shape: tuple[int, int], wanted: Wanted, *key: object) -> Dialogue:
    """U·C of one module through questions, in three or four passes."""
    return _energy(shape, wanted, key) if wanted.basis == "energy" else _projectors(shape, wanted, key)


def _energy(shape: tuple[int, int], wanted: Wanted, key: tuple[object, ...]) -> Dialogue:
    m, n = shape
    width = min(wanted.rank + _OVERSAMPLING, m, n)
    (y,) = yield (Question("times", gaussian(n, width, *key, "range")),)
    first = _orthonormal(y)
    (z,) = yield (Question("adjoint", first),)
    (y,) = yield (Question("times", _orthonormal(z)),)
    second = beside(first, y)
    probes = gaussian(m, PROBES, *key, "probes").to(y)
    (answer,) = yield (Question("adjoint", torch.cat([second, probes], dim=1)),)
    q = torch.cat([first, second], dim=1)
    c = torch.cat([z, answer[:, : second.shape[1]]], dim=1).mT  # Qᵀ T
    outside = _left_out(answer[:, second.shape[1] :], probes, q, c)
    turn, s = lowrank.left_singular(c, wanted.rank)
    # Rounding of the factors adds no rank to C: its rows for such directions of Q stay in the row space of T.
    keep = min(turn.shape[1], lowrank.numerical_rank(s))
    u, kept = q @ turn[:, :keep], turn[:, :keep].mT @ c
    return Found(LowRank(u, kept), outside + float(_squares(s[keep:, None])), outside + float(_squares(c)), True)


def _projectors(shape: tuple[int, int], wanted: Wanted, key: tuple[object, ...]) -> Dialogue:
    sides: tuple[Literal["columns", "rows"], ...] = ("columns", "rows") if wanted.both_sides else ("columns",)
    first = [first_block(size, wanted.rank, *key, side) for size, side in zip(shape, sides, strict=False)]
    seen = yield tuple(Question(side, x, wanted.vote) for side, x in zip(sides, first, strict=True))
    second = [beside(x.to(y), y) for x, y in zip(first, seen, strict=True)]
    again = yield tuple(Question(side, x, wanted.vote) for side, x in zip(sides, second, strict=True))
    blocks = zip(first, second, seen, again, strict=True)
    u, *rest = (nystrom(torch.cat([x.to(y), w], 1), torch.cat([y, z], 1), wanted.rank) for x, w, y, z in blocks)
    probes = gaussian(shape[0], PROBES, *key, "probes").to(u)
    (answer,) = yield (Question("adjoint", torch.cat([u, probes], dim=1)),)
    c = answer[:, : u.shape[1]].mT  # Uᵀ T
    lost = _left_out(answer[:, u.shape[1] :], probes, u, c)
    size = lost + float(_squares(c))
    for v in rest:
        inside = (c @ v) @ v.mT
        lost, c = lost + float(_squares(c - inside)), inside
    return Found(arranged(u, c) if wanted.ordered else _first(u, c, u.shape[1]), lost, size, True)


def _left_out(seen: Tensor, probes: Tensor, u: Tensor, c: Tensor) -> float:
    """An unbiased estimate of ‖T − U Uᵀ T‖_F² from Tᵀg for Gaussian g: the mean of ‖Tᵀg − Cᵀ Uᵀ g‖²."""
    return float(_squares(seen - c.mT @ (u.mT @ probes))) / probes.shape[1]


def first_block(size: int, rank: int, *key: object) -> Tensor:
    """Ω (size, min(R + 8, size)) with orthonormal columns: what a projector sum is asked about first."""
    return _orthonormal(gaussian(size, min(rank + _OVERSAMPLING, size), *key))


def beside(x: Tensor, y: Tensor) -> Tensor:
    """An orthonormal basis of what Y adds to the orthonormal X, as wide as Y or as there is room for."""
    # One QR of both: what is left of a Y that adds nothing is rounding, and only Householder keeps that orthogonal.
    return _orthonormal(torch.cat([x, y], dim=1))[:, x.shape[1] :]


def gaussian(rows: int, columns: int, *key: object) -> Tensor:
    """Independent standard normal numbers (rows, columns) that depend on nothing but the key."""
    return torch.randn((rows, columns), generator=generator(*key))


def _orthonormal(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y)[0]
    return q


def nystrom(x: Tensor, y: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors (m, ≤ rank) of a positive semi-definite S, by S ≈ Y (Xᵀ Y)⁺ Yᵀ with Y = S X."""
    h = (x.mT @ y).double()
    values, vectors = torch.linalg.eigh((h + h.mT) / 2)
    # Not >=, or a sum of zeros would be divided by zero.
    kept = values > 4 * len(values) * torch.finfo(y.dtype).eps * values.max()
    half = y @ (vectors[:, kept] / values[kept].sqrt()).to(y.dtype)
    u, s = lowrank.left_singular(half, rank)
    return u[:, : lowrank.numerical_rank(s)]


def answered(talk: Dialogue, answer: Callable[[tuple[Question, ...]], tuple[Tensor, ...]]) -> Found:
    """What a dialogue comes to when every question is answered at once."""
    try:
        questions = next(talk)
        while True:
            questions = talk.send(answer(questions))
    except StopIteration as stop:
        found: Found = stop.value
        return found


def together(talks: Mapping[str, Dialogue]) -> Generator[Questions, Answers, dict[str, Found]]:
    """The dialogues of all modules as one: every pass asks what each of them asks next."""
    asked: dict[str, tuple[Question, ...]] = {}
    found: dict[str, Found] = {}
    answers: Answers = {}
    while len(found) < len(talks):
        asked = {}
        for name, talk in talks.items():
            if name in found:
                continue
            try:
                asked[name] = talk.send(answers[name]) if name in answers else next(talk)
            except StopIteration as stop:
                found[name] = stop.value
        if asked:
            answers = yield asked
    return {name: found[name] for name in talks}
