"""Queries about a round's updates that a server need not hold at once: weighted sums of small products.

Every server rule here that needs each client's factors needs them only through such sums. A rule that is written as a
procedure (yield queries, receive their results, yield more, return) runs unchanged over updates in memory, over a
spool of files read once per pass, over a tree of servers that add up their children's sums, and over 100,000 clients.

Shapes: X_k (m, n) client k's update of one module, of rank r_k; x (n, l), y (m, l) with l small.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.algebra.subspace import Span, column_spans
from fedspan.methods.messages import Diagnostics, Tensors, Update
from fedspan.support import parallel


@dataclass(frozen=True, slots=True)
class Query:
    """One weighted sum over the clients of a round.

    ``times``: Σ p_k X_k x (m, l).  ``adjoint``: Σ p_k X_kᵀ y (n, l).  ``columns``: Σ p_k P_k y (m, l) with P_k the
    projector on the column space of X_k.  ``rows``: Σ p_k P_k x (n, l) with P_k the projector on the row space.
    """

    kind: Literal["times", "adjoint", "columns", "rows"]
    x: Tensor
    vote: int | None = None
    """For the projectors: the number of each X_k's strongest directions that count, at most; none: all."""


Queries = Mapping[str, tuple[Query, ...]]
"""Module -> its queries of one pass."""
QueryResults = Mapping[str, tuple[Tensor, ...]]
"""Module -> the sums, in the order of its queries."""


@dataclass(frozen=True, slots=True)
class ServerStep:
    """The result of a server's rule: the modules of the next state, and the method's diagnostics."""

    modules: Mapping[str, Tensors]
    diagnostics: Diagnostics


QueryProcedure = Generator[Queries, QueryResults, ServerStep]
"""Yields one pass's queries and receives their results; the same results always lead to the same next queries."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """X_k = scaling · B A + rest: one client's contribution to the queries about one module.

    Both pairs are near ordinary size, their powers of two in the scalings (`lowrank.normalised`).
    """

    own: LowRank
    scaling: float = 1.0
    rest: LowRank | None = None
    """The same object for all the clients that share it, so that linear queries multiply by it once."""
    rest_scaling: float = 1.0
    grams: lowrank.Grams | None = None
    """Those of `own`, where they are known."""

    def whole(self) -> LowRank:
        """Return X_k as one pair, but for a positive factor, which changes none of its spaces."""
        if self.rest is None:
            return self.own
        scalings = [self.rest_scaling, self.scaling]
        by = ordinary_shift(scalings)
        return lowrank.stack([self.rest, self.own], [math.ldexp(s, -by) for s in scalings])


_ORDINARY = 24
"""Factors between 2^−24 and 2^24 on normalised pairs leave float32 room for squares."""


def ordinary_shift(weights: Sequence[float]) -> int:
    """Return the exponent of the largest weight of some normalised pairs where it is far from 1, else 0."""
    _, e = math.frexp(max((abs(w) for w in weights), default=0.0))
    return 0 if abs(e) <= _ORDINARY else e


ContributionOf = Callable[[Update, str], Contribution]
"""X_k by a client's update and the module's name: `Method.contributions` makes it from the server's state."""


def own_contribution(update: Update, module: str) -> Contribution:
    """Return X_k = s_k B_k A_k, as it came."""
    f = update.factors(module)
    pair, e, grams = lowrank.prepared(LowRank(f.b, f.a))
    return Contribution(pair, math.ldexp(f.scaling, e), grams=grams)


def partial_sums(
    queries: Queries, updates: Sequence[Update], contribution_of: ContributionOf = own_contribution
) -> dict[str, tuple[Tensor, ...]]:
    """Return Σ n_k (…) over these clients, n_k their examples: the sums over any split of the clients add up.

    One pass over a spool, or one node of a tree, is `add_sums` over blocks of any size and `means_of` at its end.

    Parameters
    ----------
    contribution_of
        ``method.contributions(state)``.

    Returns
    -------
    dict[str, tuple[Tensor, ...]]
        Per module in the order of its queries, in the wider of the queries' and the factors' precision.
    """
    weights = [update.num_examples for update in updates]

    def results(name: str) -> tuple[Tensor, ...]:
        return Sums([contribution_of(update, name) for update in updates], weights)(queries[name])

    return dict(zip(queries, parallel.ordered_map(results, queries), strict=True))


def weighted_pairs(contributions: Sequence[Contribution], weights: Sequence[float]) -> list[tuple[LowRank, float]]:
    """Return pairs (B A, w) with Σ w_k X_k = Σ w B A, in which a rest that several clients share occurs once."""
    shared: dict[int, tuple[LowRank, float]] = {}
    for x, w in zip(contributions, weights, strict=True):
        if x.rest is not None:
            before = shared[id(x.rest)][1] if id(x.rest) in shared else 0.0
            shared[id(x.rest)] = (x.rest, w * x.rest_scaling + before)
    return [*shared.values(), *((x.own, w * x.scaling) for x, w in zip(contributions, weights, strict=True))]


def add_sums(x: QueryResults, y: QueryResults) -> dict[str, tuple[Tensor, ...]]:
    """Return the sums over the union of two disjoint sets of clients."""
    return {name: tuple(a + b for a, b in zip(x[name], y[name], strict=True)) for name in x}


def means_of(sums: QueryResults, weight: float) -> dict[str, tuple[Tensor, ...]]:
    """Return Σ p_k (…) from Σ n_k (…) and Σ n_k: the results that a procedure receives."""
    return {name: tuple(value / weight for value in values) for name, values in sums.items()}


class Sums:
    """The query results of some clients about one module. Their bases, once made, are kept for the next pass.

    Clients are processed one by one: at the shapes of transformers two small products per client run as fast as one
    large one over stacked factors, and nothing is copied.
    """

    def __init__(self, contributions: Sequence[Contribution], weights: Sequence[float]) -> None:
        self.contributions = contributions
        self.weights = weights
        self.spans: dict[tuple[str, int | None], list[Span]] = {}
        self.ranks = tuple((x.own.rank, x.rest.rank if x.rest else 0) for x in contributions)
        self.dtype = functools.reduce(torch.promote_types, {x.own.b.dtype for x in contributions}, torch.float32)

    @property
    def total_rank(self) -> int:
        """c, a rest that several clients share counted once."""
        return sum(pair.rank for pair, _ in weighted_pairs(self.contributions, self.weights))

    def __call__(self, queries: Sequence[Query]) -> tuple[Tensor, ...]:
        """Return Σ w_k (…) for each query."""
        return tuple(self._result(query) for query in queries)

    def _result(self, query: Query) -> Tensor:
        own = self.contributions[0].own
        x = query.x.to(own.b.device, torch.promote_types(query.x.dtype, self.dtype))
        if query.kind in ("columns", "rows"):
            spans = zip(self._spans(query.kind, query.vote), self.weights, strict=True)
            return _in_blocks(torch.zeros_like(x), spans, functools.partial(_project, x=x))
        adjoint = query.kind == "adjoint"
        pairs = weighted_pairs(self.contributions, self.weights)
        zero = x.new_zeros((own.shape[1 if adjoint else 0], x.shape[1]))
        return _in_blocks(
            zero, ((p.transposed() if adjoint else p, w) for p, w in pairs), functools.partial(_apply, x=x)
        )

    def _spans(self, kind: str, vote: int | None) -> list[Span]:
        if (kind, vote) not in self.spans:
            pairs = [x.whole() for x in self.contributions]
            grams = [x.grams if x.rest is None else None for x in self.contributions]
            if kind == "rows":
                pairs = [x.transposed() for x in pairs]
                grams = [known and known[::-1] for known in grams]
            self.spans[kind, vote] = column_spans(pairs, vote, grams)
        return self.spans[kind, vote]


_BLOCK = 32
"""Terms that are added up in the precision of the products, before their sum is added in float64."""

_Term = TypeVar("_Term")


def _in_blocks(
    zero: Tensor, terms: Iterable[tuple[_Term, float]], add: Callable[[Tensor, _Term, float], object]
) -> Tensor:
    """Return Σ w · term, in the type of `zero`.

    Parameters
    ----------
    add
        (y, term, w): adds w · term to y in place.
    """
    waiting, total = iter(terms), None
    block = list(itertools.islice(waiting, _BLOCK))
    while True:
        y = torch.zeros_like(zero)
        for term, w in block:
            add(y, term, w)
        block = list(itertools.islice(waiting, _BLOCK))
        if not block and total is None:
            return y
        total = y.double() if total is None else total.add_(y)
        if not block:
            return total.to(zero.dtype)


def _project(y: Tensor, span: Span, weight: float, x: Tensor) -> None:
    b, z = span.b.to(x.dtype), span.z.to(x.dtype)
    y.addmm_(b, z @ (z.mT @ (b.mT @ x)), alpha=weight)


def _apply(y: Tensor, factor: LowRank, weight: float, x: Tensor) -> None:
    y.addmm_(factor.b.to(x.dtype), factor.a.to(x.dtype) @ x, alpha=weight)
