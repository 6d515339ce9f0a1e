"""Exchanges with clients: the questions, the answers, and the interface of whatever carries them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from fedspan.algebra.finite import is_finite
from fedspan.client.training import LocalResult
from fedspan.federation.clients import Client
from fedspan.methods.base import Method
from fedspan.methods.folds import Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Factors, Template, Update, Vector
from fedspan.privacy.sum_layout import SumLayout
from fedspan.wire.precision import Precision, rounded_update
from fedspan.wire.sizes import payload_tensors

WINDOW = 64
"""Number of clients that are asked to start at once. It bounds what a round holds beside the server's own fold, however
many clients take part; within it the executor groups the work and spreads it over processes."""

DIVERGED = "its training diverged"
"""The beginning of the problem of a client whose training gave NaN or infinity."""

NOT_FINITE = "holds NaN or infinity"

Work = Callable[[Sequence[tuple[Client, Broadcast]], int], Iterable[tuple[LocalResult, float]]]
"""(clients and what each starts from, round) -> the result of each, in that order, and the busy seconds it took.

Results are taken one by one, so that a generator need not hold them all. A bad update is no error of the work: updates
are checked here."""


@dataclass(frozen=True, slots=True)
class Question:
    """One exchange as every client is asked it; the broadcast that goes with it may differ from client to client."""

    template: Template
    round_num: int
    number: int
    """The exchange's place in the method's list."""
    exchange: Exchange
    place: tuple[int, int]
    """(i, n): this is the i-th, from 0, of the n exchanges of this round."""
    keep: bool
    """The next exchange asks about the same result of training: the client keeps it until then."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Client -> the number of finished rounds when its answer last counted, which is the age of its state."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Client -> the newest patch version that it holds."""
    version: int = 0
    """Version of the patch that is sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one client, or its problem."""

    client: Client
    update: Update | None
    """The update that left the site, with the weight that counts; none where there was a problem or a sum hides it."""
    problem: str | None = None
    """The reason why the answer is left out; none: it counts."""
    absent: bool = False
    """The problem is that nothing came, which may be the fault of the network and not of the client."""
    weight: float = 1.0
    """The client's weight before normalisation; 1 where a sum hides it."""
    train_loss: float = 0.0
    """NaN where a sum hides it."""
    seconds: float = 0.0
    """Busy seconds of the site."""
    bytes_up: int = 0
    optimizer_bytes: int = 0
    result: LocalResult | None = None
    """The result of training, where the client lives in this process."""
    started: Broadcast | None = None
    """The broadcast that training started from, where the client lives in this process."""


@dataclass(frozen=True, slots=True)
class Summed:
    """The answers to one question as their sum."""

    partial: Partial
    train_loss: float
    """The weighted mean."""
    answers: Sequence[Answer]
    """One for every client, with its problem where it was not counted."""


BroadcastFor = Callable[[Client], Broadcast]
"""Returns what a client is sent."""


class Sites(Protocol):
    """The carrier of questions to clients and of answers back: a transport to real sites, or simulated clients."""

    def ask(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """Yield every client's answer, or its problem, in the order in which they are to be folded."""

    def sum(
        self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor, layout: SumLayout
    ) -> Summed:
        """Return the sum of the answers, without the answers: by secure sums, or by their arithmetic."""

    def states(self) -> Mapping[str, ClientState]:
        """Return what the clients keep if their answers count, where this process keeps it for them."""

    def costs(self) -> Mapping[str, Any]:
        """Return what the round cost this transport, for the round's record."""


@dataclass(frozen=True, slots=True)
class Response:
    """A site's response to one question, and what the client keeps between rounds."""

    update: Update | None
    kept: ClientState | None = None
    problem: str | None = None
    num_bytes: int = 0


def begin(method: Method, question: Question, sent: Broadcast, state: ClientState | None) -> Broadcast:
    """Return what a client starts from; called on the site, before it works.

    Parameters
    ----------
    sent
        The broadcast as it arrived.
    state
        What the client keeps between rounds.
    """
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
    """Return what leaves the site and what the client keeps, or what is wrong; called on the site, after it worked.

    An update with a NaN or an infinity, or with other shapes than were sent, does not leave the site.

    Parameters
    ----------
    started
        What `begin` returned.
    weight
        What the client counts for.
    """
    if question.exchange.ask != "again":  # which asks about a result that was checked before
        problem = shapes_problem(result.update, expected(question.template, started))
        if problem is not None and problem.endswith(NOT_FINITE) and not started.recipe.gradient:
            # The base and what was sent are finite: the steps were too large.
            problem = f"{DIVERGED}: {problem}; expected a smaller local.learning_rate"
        if problem is not None:
            return Response(None, problem=problem)
    update, kept = method.encode(result.update, started, state)
    if not all(is_finite(t) for t in payload_tensors(update)):
        # What was trained is finite, but norms and products of it need not be.
        return Response(None, problem="its encoded update holds NaN or infinity")
    update, num_bytes = rounded_update(replace(update, num_examples=weight), precision.up)
    return Response(update, kept, None, num_bytes)


def unlearnt(template: Template, started: Broadcast) -> Update:
    """Return an update with the shapes of a real one, from a client that learnt nothing."""
    if started.recipe.gradient:
        zero = {n: Vector({"gradient": torch.zeros(s)}) for n, s in template.modules.items()}
        return Update("", 1.0, zero, {})
    return Update("", 1.0, started.adapter, started.dense, rate_sum=1.0)


def sum_layout(method: Method, template: Template, started: Broadcast, trained: Broadcast | None = None) -> SumLayout:
    """Return the layout of a sum, found by encoding an update that learnt nothing.

    Parameters
    ----------
    started
        What a client starts from, as `begin` returns it for one that keeps nothing.
    trained
        What it started training from, where this exchange asks about that result again.
    """
    return SumLayout.of(method.encode(unlearnt(template, trained or started), started, None)[0])


def widened(sent: Broadcast, template: Template, own_rank: int, rank: int) -> Broadcast:
    """Return a broadcast to a client of rank `own_rank` in the shapes of one to a client of a larger rank."""
    if own_rank == rank:
        return sent
    adapter: dict[str, Factors] = {}
    for name, f in sent.adapter.items():
        more = max(0, rank - f.rank)
        b, a = torch.nn.functional.pad(f.b, (0, more)), torch.nn.functional.pad(f.a, (0, 0, 0, more))
        adapter[name] = Factors(b, a, template.scaling(rank))
    return replace(sent, adapter=adapter)


def expected(template: Template, sent: Broadcast) -> dict[str, torch.Size]:
    """Return the shapes of the result of training, or of the gradient where that is asked for."""
    if sent.recipe.gradient:
        return {f"{name}/gradient": torch.Size(shape) for name, shape in template.modules.items()}
    shapes = {f"{name}/{part}": t.shape for name, f in sent.adapter.items() for part, t in f.tensors().items()}
    return shapes | {name: t.shape for name, t in sent.dense.items()}


def shapes_problem(update: Update, expected_shapes: Mapping[str, torch.Size]) -> str | None:
    """Return what is wrong with an update; none: it has the expected names and shapes, and is finite."""
    tensors = {f"{name}/{part}": t for name, payload in update.modules.items() for part, t in payload.tensors().items()}
    tensors |= dict(update.dense)
    if tensors.keys() != expected_shapes.keys():
        return f"names {sorted(tensors.keys() ^ expected_shapes.keys())[0]}, which was not asked for or is missing"
    for name, value in tensors.items():
        if value.shape != expected_shapes[name]:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(expected_shapes[name])}"
        if not is_finite(value):
            return f"{name} {NOT_FINITE}"
    return None
