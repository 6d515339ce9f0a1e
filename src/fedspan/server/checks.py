"""The checks that an answer must pass before the round loop sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedspan.algebra.galore import moment_shape
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Answer, Question, begin, unlearnt
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Recipe, Request, Tensors, Update
from fedspan.privacy.fixed_point import Words
from fedspan.server import magnitudes
from fedspan.server.requests import Problem, Reply
from fedspan.wire import protocol
from fedspan.wire.precision import Kind, packed_bytes
from fedspan.wire.protocol import DAMAGED

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Expected:
    """The form of the answers to one broadcast."""

    shapes: _Shapes
    types: Mapping[str, torch.dtype]
    scalings: Mapping[str, float]
    """Of the modules that are sent as a pair of factors; every other one is a vector."""
    recipe: Recipe
    """As the clients were sent it."""


@dataclass(slots=True)
class AnswerChecks:
    """The checks of one exchange's answers, made from what was sent."""

    method: Method
    question: Question
    initial: Tensors
    """Heads and trained weights of the untouched base."""
    results: dict[int, Update]
    """By rank, an update of the shapes of the last training result, or gradient. Shared by the exchanges of a round,
    since a later one may ask about the same result in another form."""
    weighting: str
    """`federation.weighting`."""
    kind: Kind
    """The type in which updates travel."""
    _derived: dict[int, Broadcast] = field(default_factory=dict)
    _expected: dict[str, _Expected] = field(default_factory=dict)
    _by_broadcast: dict[int, tuple[Broadcast, _Expected]] = field(default_factory=dict)

    def derived(self, rank: int) -> Broadcast:
        """Return the broadcast that a site of this rank works out by itself."""
        if rank not in self._derived:
            q, method = self.question, self.method
            state = replace(method.init(q.template, self.initial), round_num=q.round_num)
            self._derived[rank] = method.broadcast(state, Request(rank))
        return self._derived[rank]

    def expect(self, client: Client, sent: Broadcast) -> None:
        """Expect an answer to this broadcast from the client.

        Its form is found by encoding the update of a client that learnt nothing, so that every method has this check.
        """
        # By identity, since clients that ask for the same thing are sent the very same object; the broadcast is kept
        # beside the result, so that its id cannot be given to another one.
        key = id(sent)
        if key not in self._by_broadcast:
            q, method = self.question, self.method
            started = begin(method, q, sent, None)
            if q.exchange.ask != "again":
                self.results[client.rank] = unlearnt(q.template, started)
            update = method.encode(self.results[client.rank], started, None)[0]
            forms = protocol.shapes(update), protocol.types(update), update.scalings()
            self._by_broadcast[key] = (sent, _Expected(*forms, started.recipe))
        self._expected[client.client_id] = self._by_broadcast[key][1]

    def answer_bytes(self, client_id: str) -> int:
        """Return the bytes of the update that is expected from a client, in the types in which it is computed."""
        expected = self._expected[client_id]
        return sum(math.prod(shape) * expected.types[name].itemsize for name, shape in expected.shapes.items())

    def answer(self, client: Client, reply: Reply | Problem) -> Answer:
        """Return a client's reply as an answer, or the problem with it."""
        return self.update(client, reply) if isinstance(reply, Reply) else unusable(client, reply)

    def update(self, client: Client, reply: Reply) -> Answer:
        """Return one client's update as an answer, or the problem with it."""
        header = reply.header
        try:
            update = protocol.get_update(header["update"], reply.tensors, client.client_id)
            loss, seconds, optimizer_bytes = header["train_loss"], header["seconds"], header["optimizer_bytes"]
        except DAMAGED as error:
            return unusable(client, Problem(f"sent a damaged update ({type(error).__name__}: {error})"))
        reason = self._reason_against(client, update)
        if reason is not None:
            return unusable(client, Problem(reason))
        return Answer(
            client,
            update,
            weight=update.num_examples,
            train_loss=math.nan if loss is None else loss,
            seconds=seconds,
            bytes_up=packed_bytes(update, self.kind),
            optimizer_bytes=optimizer_bytes,
        )

    def words(self, client: Client, num_words: int, reply: Reply) -> tuple[Words, Answer] | Problem:
        """Return one client's part of a sum with its answer, or the problem with it.

        Only type and length can be checked: under masks every vector of words looks like noise.
        """
        header = reply.header
        try:
            vector = reply.tensors[header["words"]]
            seconds, optimizer_bytes = header["seconds"], header["optimizer_bytes"]
        except DAMAGED as error:
            return Problem(f"sent a damaged vector ({type(error).__name__}: {error})")
        if vector.dtype != torch.int64 or tuple(vector.shape) != (num_words,):
            return Problem(
                f"sent a vector of {vector.dtype} in shape {tuple(vector.shape)}: expected {num_words} words"
            )
        answer = Answer(
            client, None, train_loss=math.nan, seconds=seconds, bytes_up=8 * num_words, optimizer_bytes=optimizer_bytes
        )
        return vector.contiguous().numpy().view(np.uint64), answer

    def _reason_against(self, client: Client, update: Update) -> str | None:
        """Return the first reason not to use an update, or None."""
        expected = self._expected[client.client_id]
        return (
            _scaling_problem(update.scalings(), expected.scalings)
            or _shape_problem(protocol.shapes(update), expected.shapes, self.method.prunes)
            or self._moment_problem(update, expected)
            or _type_problem(protocol.types(update), expected.types)
            or self._weight_problem(client, update)
            or magnitudes.problem(update, self.method.info.gauge_invariant)
        )

    def _moment_problem(self, update: Update, expected: _Expected) -> str | None:
        """Return the first reason why the second moments are not those of the optimizer that was asked for, or None.

        Which weights have some is not known here: one on which no loss depends has none.
        """
        for name, moment in update.moments.items():
            weight, options = self.question.template.modules.get(name), expected.recipe.galore
            wanted = None if weight is None or options is None else moment_shape(weight, options.rank, options.side)
            if tuple(moment.shape) != wanted:
                what = "no second moments of it" if wanted is None else str(wanted)
                return f"moments/{name} has shape {tuple(moment.shape)}: expected {what}"
        return None

    def _weight_problem(self, client: Client, update: Update) -> str | None:
        # Otherwise a site could take over the average by counting as more examples than it said it has.
        weight = client.weight(self.weighting)
        if update.num_examples == weight:
            return None
        return f"counts as {update.num_examples:g} examples: it said {weight:g} when it came"


def _scaling_problem(scalings: Mapping[str, float], expected: Mapping[str, float]) -> str | None:
    for name, scaling in scalings.items():
        if scaling != expected.get(name):
            return f"scales its factors of {name} by {scaling:g}: expected {expected.get(name, 1.0):g}"
    # A vector whose parts are called a and b has the shapes of a pair.
    lacking = expected.keys() - scalings.keys()
    return f"sent {min(lacking)} as a vector: expected a pair of factors" if lacking else None


def _shape_problem(shapes: _Shapes, expected: _Shapes, prunes: bool) -> str | None:
    own, wanted = _without_moments(shapes), _without_moments(expected)
    if own.keys() != wanted.keys():
        return f"names {sorted(own.keys() ^ wanted.keys())[0]}, which was not asked for or is missing"
    for name, shape in own.items():
        # What a client has pruned counts as zero in the sum, whose leading part the rest is.
        smaller = prunes and name.startswith("modules/") and _is_leading(shape, wanted[name])
        if shape != wanted[name] and not smaller:
            return f"{name} has shape {shape}, expected {wanted[name]}"
    return None


def _is_leading(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Return whether a tensor of that shape, not an empty one, is the leading part of a whole one."""
    return len(shape) == len(whole) and all(0 < x <= y for x, y in zip(shape, whole, strict=True))


def _without_moments(shapes: _Shapes) -> _Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith("moments/")}


def _type_problem(types: Mapping[str, torch.dtype], expected: Mapping[str, torch.dtype]) -> str | None:
    for name, dtype in types.items():
        wanted = expected.get(name, torch.float32)  # of a moment
        if dtype != wanted:
            return f"{name} is of {dtype}: expected {wanted}"
    return None


def unusable(client: Client, problem: Problem) -> Answer:
    """Return the answer of a client whose answer cannot be used."""
    return Answer(client, None, problem.reason, problem.absent, 0.0)
