"""Where clients are: what a round asks of them, what comes back, and the clients that live in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from fedspan.client.training import LocalResult
from fedspan.federation.clients import Client
from fedspan.methods.base import Method
from fedspan.methods.folds import Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Template, Update, Vector
from fedspan.privacy.layout import Layout
from fedspan.wire.precision import Precision, rounded_update
from fedspan.wire.sizes import payload_tensors

WINDOW = 64
"""Clients that are told to start at once. It bounds what a round holds beside the server's own fold, however many
clients take part; within it the work is grouped, and spread over processes, as whoever does it likes."""

Work = Callable[[Sequence[tuple[Client, Broadcast]], int], Iterable[tuple[LocalResult, float]]]
"""(clients and what each starts from, round) -> what each learnt, in that order, and the busy seconds it took.

Results are taken one by one, so that a generator need not hold them all. Raises nothing for a bad update: that is
checked here."""


@dataclass(frozen=True, slots=True)
class Question:
    """What one exchange asks of every client."""

    template: Template
    round_num: int
    number: int
    """Of the exchange, in the method's list."""
    exchange: Exchange
    place: tuple[int, int]
    """(i, n): it is the i-th, from 0, of the n exchanges of this round."""
    keep: bool
    """The next exchange asks about the same answers: what was learnt is kept until then."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Client -> how many rounds were finished when its answer last counted: its state is the one of then."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Client -> the newest patch version that it holds."""
    version: int = 0
    """Of the patch that is sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one client answered."""

    client: Client
    update: Update | None
    """What left the site, with the weight that counts; none where there was a problem, or a sum alone is known."""
    problem: str | None = None
    absent: bool = False
    """The problem is that nothing came, which speaks of the line and not of the client."""
    weight: float = 1.0
    """What it counts for; 1 where a sum hides it."""
    train_loss: float = 0.0
    """NaN where a sum hides it."""
    seconds: float = 0.0
    """Busy seconds of the site."""
    bytes_up: int = 0
    optimizer_bytes: int = 0
    result: LocalResult | None = None
    """What training came to, where the client lives in this process."""
    started: Broadcast | None = None
    """What it started from, likewise."""


@dataclass(frozen=True, slots=True)
class Summed:
    """The answers to one question as their sum."""

    partial: Partial
    train_loss: float
    """The weighted mean."""
    answers: Sequence[Answer]
    """Who was counted, and who was not and why."""


BroadcastFor = Callable[[Client], Broadcast]
"""What a client is sent."""


class Sites(Protocol):
    """Whoever carries a question to clients and their answers back."""

    def ask(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """Every client's answer, or its problem, in the order in which they are to be folded."""

    def sum(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor, layout: Layout) -> Summed:
        """The sum of the answers without the answers: what secure sums, or their arithmetic, come to."""

    def states(self) -> Mapping[str, ClientState]:
        """What the clients keep, where this process keeps it for them."""

    def costs(self) -> Mapping[str, Any]:
        """What the round cost this transport, for its record."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a site says to one question, and what it keeps."""

    update: Update | None
    kept: ClientState | None = None
    problem: str | None = None
    num_bytes: int = 0


def begin(method: Method, question: Question, sent: Broadcast, state: ClientState | None) -> Broadcast:
    """On the site, before it works: what it starts from."""
    started = method.start(sent, state)
    gradient = question.exchange.ask == "gradient"
    if started.recipe.gradient == gradient:
        return started
    return replace(started, recipe=replace(started.recipe, gradient=gradient))


def respond(
    method: Method,
    question: Question,
    result: LocalResult,
    started: Broadcast,
    state: ClientState | None,
    precision: Precision,
    weight: float,
) -> Response:
    """On the site, after it worked: what leaves it and what it keeps, or what is wrong.

    An update with a NaN or an infinity, or with other shapes than were sent, does not leave the site.
    """
    if question.exchange.ask != "again":
        problem = shapes_problem(result.update, expected(question.template, started))
        if problem is not None:
            return Response(None, problem=problem)
    update, kept = method.encode(result.update, started, state)
    if not all(bool(torch.isfinite(t).all()) for t in payload_tensors(update)):
        # What was trained is finite, but a norm or a product of it need not be.
        return Response(None, problem="what it sent holds NaN or infinity")
    update, num_bytes = rounded_update(replace(update, num_examples=weight), precision.up)
    return Response(update, kept, None, num_bytes)


def unlearnt(template: Template, started: Broadcast) -> Update:
    """An update of the shapes of a real one, from a client that learnt nothing."""
    if started.recipe.gradient:
        zero = {n: Vector({"gradient": torch.zeros(s)}) for n, s in template.modules.items()}
        return Update("", 1.0, zero, {})
    return Update("", 1.0, started.adapter, started.dense, rate_sum=1.0)


def expected(template: Template, sent: Broadcast) -> dict[str, torch.Size]:
    """The shapes of what training, or a gradient, comes to."""
    if sent.recipe.gradient:
        return {f"{name}/gradient": torch.Size(shape) for name, shape in template.modules.items()}
    shapes = {f"{name}/{part}": t.shape for name, f in sent.adapter.items() for part, t in f.tensors().items()}
    return shapes | {name: t.shape for name, t in sent.dense.items()}


def shapes_problem(update: Update, wanted: Mapping[str, torch.Size]) -> str | None:
    """What is wrong with an update, or none."""
    got = {f"{name}/{part}": t for name, payload in update.modules.items() for part, t in payload.tensors().items()}
    got |= dict(update.dense)
    if got.keys() != wanted.keys():
        return f"names {sorted(got.keys() ^ wanted.keys())[0]}, which was not asked for or is missing"
    for name, value in got.items():
        if value.shape != wanted[name]:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(wanted[name])}"
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds NaN or infinity"
    return None
