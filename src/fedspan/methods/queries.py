"""What a server asks of all its clients' updates at once, when it must not hold them at once.

Every server rule here that needs each client's factors needs them only through weighted sums of small products. A
rule written as a conversation (ask, get the sums, ask again, answer) runs unchanged over updates in memory, over a
spool of files read once per pass, over a tree of servers that add up their children's sums, and over 100,000 clients.

Shapes: X_k (m, n) client k's update of one module, of rank r_k; x (n, l), y (m, l) with l small.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.algebra.subspace import Span, column_spans
from fedspan.methods.messages import Diagnostics, Tensors, Update
from fedspan.support import parallel


@dataclass(frozen=True, slots=True)
class Question:
    """One weighted sum over the clients of a round.

    ``times``: Σ p_k X_k x (m, l).  ``adjoint``: Σ p_k X_kᵀ y (n, l).  ``columns``: Σ p_k P_k y (m, l) with P_k the
    projector on the column space of X_k.  ``rows``: Σ p_k P_k x (n, l) with P_k the projector on the row space.
    """

    kind: Literal["times", "adjoint", "columns", "rows"]
    x: Tensor
    vote: int | None = None
    """For the projectors: on the so many strongest directions of each X_k at most."""


Questions = Mapping[str, tuple[Question, ...]]
"""Module -> what is asked of it in one pass."""
Answers = Mapping[str, tuple[Tensor, ...]]
"""Module -> the sums, in the order of the questions."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a conversation ends with: the modules of the next state, and what the method measured of itself."""

    modules: Mapping[str, Tensors]
    diagnostics: Diagnostics


Conversation = Generator[Questions, Answers, Outcome]
"""Yields one pass's questions, receives their answers; the same answers always lead to the same next questions."""


@dataclass(frozen=True, slots=True)
class Term:
    """X_k = scaling · B A + rest: what one client brings to the questions about one module."""

    own: LowRank
    scaling: float = 1.0
    rest: LowRank | None = None
    """The same object for all the clients that share it, so that linear questions ask it once."""

    def whole(self) -> LowRank:
        """X_k as one pair; a positive scaling of a single pair changes none of its spaces and is left out."""
        return self.own if self.rest is None else lowrank.stack([self.rest, self.own], [1.0, self.scaling])


Terms = Callable[[Update, str], Term]
"""What X_k is, by a client's update and the module's name: `Method.terms` makes it from the server's state."""


def own_terms(update: Update, module: str) -> Term:
    """X_k = s_k B_k A_k, as it came."""
    f = update.factors(module)
    return Term(LowRank(f.b, f.a), f.scaling)


def partial_sums(
    questions: Questions, updates: Sequence[Update], terms: Terms = own_terms
) -> dict[str, tuple[Tensor, ...]]:
    """Σ n_k (…) over these clients, n_k their examples: linear, so the sums over any split of the clients add up.

    One pass over a spool, or one node of a tree, is `add_sums` over blocks of any size and `shares_of` at its end.

    Parameters
    ----------
    terms
        ``method.terms(state)``.

    Returns
    -------
    dict[str, tuple[Tensor, ...]]
        Per module in the order of its questions, in the wider of the questions' and the factors' precision.
    """
    weights = [update.num_examples for update in updates]

    def answer(name: str) -> tuple[Tensor, ...]:
        return Sums([terms(update, name) for update in updates], weights)(questions[name])

    return dict(zip(questions, parallel.ordered_map(answer, questions), strict=True))


def weighted_pairs(terms: Sequence[Term], weights: Sequence[float]) -> list[tuple[LowRank, float]]:
    """(B A, w) with Σ w_k X_k = Σ w B A, what several clients share once."""
    shared: dict[int, tuple[LowRank, float]] = {}
    for term, w in zip(terms, weights, strict=True):
        if term.rest is not None:
            shared[id(term.rest)] = (term.rest, w + (shared[id(term.rest)][1] if id(term.rest) in shared else 0.0))
    return [*shared.values(), *((x.own, w * x.scaling) for x, w in zip(terms, weights, strict=True))]


def add_sums(x: Answers, y: Answers) -> dict[str, tuple[Tensor, ...]]:
    """The sums over two disjoint sets of clients as the sums over both."""
    return {name: tuple(a + b for a, b in zip(x[name], y[name], strict=True)) for name in x}


def shares_of(sums: Answers, weight: float) -> dict[str, tuple[Tensor, ...]]:
    """Σ p_k (…) from Σ n_k (…) and Σ n_k: what a conversation is sent."""
    return {name: tuple(value / weight for value in values) for name, values in sums.items()}


class Sums:
    """The answers of some clients about one module. Their bases, once made, are kept for the next pass.

    Clients are walked one by one: at the shapes of transformers two small products per client run as fast as one
    large one over stacked factors, and nothing is copied.
    """

    def __init__(self, terms: Sequence[Term], weights: Sequence[float]) -> None:
        self.terms = terms
        self.weights = weights
        self.spans: dict[tuple[str, int | None], list[Span]] = {}
        self.ranks = tuple((x.own.rank, x.rest.rank if x.rest else 0) for x in terms)
        self.dtype = functools.reduce(torch.promote_types, {x.own.b.dtype for x in terms}, torch.float32)

    @property
    def total_rank(self) -> int:
        """c, what several clients share counted once."""
        return sum(pair.rank for pair, _ in weighted_pairs(self.terms, self.weights))

    def __call__(self, questions: Sequence[Question]) -> tuple[Tensor, ...]:
        """Σ w_k (…), one for each question."""
        return tuple(self._answer(question) for question in questions)

    def _answer(self, question: Question) -> Tensor:
        own = self.terms[0].own
        x = question.x.to(own.b.device, torch.promote_types(question.x.dtype, self.dtype))
        if question.kind in ("columns", "rows"):
            spans = self._spans(question.kind, question.vote)
            y = torch.zeros_like(x)
            for span, w in zip(spans, self.weights, strict=True):
                b, z = span.b.to(x.dtype), span.z.to(x.dtype)
                y.addmm_(b, z @ (z.mT @ (b.mT @ x)), alpha=w)
            return y
        adjoint = question.kind == "adjoint"
        y = x.new_zeros((own.shape[1 if adjoint else 0], x.shape[1]))
        for pair, w in weighted_pairs(self.terms, self.weights):
            asked = pair.transposed() if adjoint else pair
            y.addmm_(asked.b.to(x.dtype), asked.a.to(x.dtype) @ x, alpha=w)
        return y

    def _spans(self, kind: str, vote: int | None) -> list[Span]:
        if (kind, vote) not in self.spans:
            pairs = [term.whole() for term in self.terms]
            if kind == "rows":
                pairs = [x.transposed() for x in pairs]
            self.spans[kind, vote] = column_spans(pairs, vote)
        return self.spans[kind, vote]
