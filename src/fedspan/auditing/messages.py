"""A site's first round, done again as a server sees it: the message as it is, under masks, and in the sum.

All are vectors in one layout, and what the message of a site would hold that learnt nothing is taken off: the
difference is what the site's rows put into it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedspan.auditing.sources import SiteWork
from fedspan.auditing.subject import Loaded
from fedspan.client.training import Assignment, num_steps, work_on
from fedspan.data import Encoded
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Question, begin, respond, unlearnt
from fedspan.methods.base import ServerState
from fedspan.methods.messages import Broadcast, Factors, Request, Template, Update, Vector
from fedspan.models.losses import client_losses
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.sum_layout import SumLayout
from fedspan.support.errors import FedspanError
from fedspan.wire.precision import Precision

MOST_NUMBERS = 20_000_000
"""Numbers in a message beyond which its attacks take too long to be part of an audit."""
_SMALL_STEP = 1e-2
"""Length of the step along one row's gradient, relative to what is trained."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One vector that a server sees, less that of a site that learnt nothing."""

    values: Tensor
    """(P,) float32 on the CPU."""
    places: Mapping[tuple[str, str], slice]
    """(module, part), or an empty module and the name of a dense weight -> its numbers."""
    shapes: Mapping[tuple[str, str], tuple[int, ...]]

    def part(self, key: tuple[str, str]) -> Tensor:
        """Return one tensor of it."""
        return self.values[self.places[key]].reshape(self.shapes[key])


@dataclass(slots=True)
class FirstRound:
    """The first round of some sites."""

    loaded: Loaded
    work: SiteWork
    template: Template
    state: ServerState
    question: Question

    @classmethod
    def of(cls, loaded: Loaded, work: SiteWork) -> FirstRound:
        """Return the beginning of a run's first round."""
        config, method = work.config, work.method
        rank = max(client.rank for client in work.clients)
        template = loaded.context.model.template(
            rank,
            config.adapter.alpha,
            config.adapter.rslora,
            config.seed,
            work.num_clients,
            adaptive=config.local.optimizer != "sgd",
        )
        state = method.init(template, loaded.untouched.dense)
        question = Question(template, 0, 0, method.exchanges[0], (0, len(method.exchanges)), False)
        return cls(loaded, work, template, state, question)

    def started(self, client: Client) -> Broadcast:
        """Return what a site starts from."""
        sent = self.work.method.broadcast(self.state, Request(client.rank))
        return begin(self.work.method, self.question, sent, None)

    def update(self, client: Client, rows: np.ndarray | None = None) -> Update:
        """Return what leaves a site after its work on its rows, or on these rows of the training data.

        Under example-level privacy its noise comes from a secret that is thrown away, and no ledger counts it: the
        update leaves nothing but the figures of an audit.

        Raises
        ------
        FedspanError
            When the training fails.
        """
        config, context = self.work.config, self.loaded.context
        chosen, started = client.indices if rows is None else rows, self.started(client)
        steps = num_steps(config.local, len(chosen))
        weight = client.weight(config.federation.weighting)
        job = Assignment(client.client_id, started, chosen, steps, weight, secret=secrets.randbits(256))
        result = work_on(context.model, job, context.data["train"], context.training, 0)
        wire = Precision("float32", "float32")
        response = respond(self.work.method, self.question, result, started, None, wire, weight)
        if response.update is None:
            raise FedspanError(f"{client.client_id} cannot repeat its first round: {response.problem}")
        return response.update

    def nothing(self, client: Client) -> Update:
        """Return what leaves a site that learnt nothing."""
        started = self.started(client)
        return self.work.method.encode(unlearnt(self.template, started), started, None)[0]

    def message(self, client: Client, update: Update) -> Message:
        """Return an update as a message."""
        return _message(update.named_tensors(), self.nothing(client))

    def masked(self, client: Client, updates: Mapping[str, Update]) -> tuple[Message, Message]:
        """Return what a server sees of one site in a secure sum over these updates, and what it sees of all of them.

        The protocol itself runs, and the vector is the one that arrives at the server.

        Raises
        ------
        FedspanError
            When a library of secure sums is missing.
        """
        try:
            from fedspan.privacy.secure_sum import sum_in_process
        except ImportError:
            raise FedspanError("secure sums need the extra `secure`: pip install 'fedspan[secure]'") from None
        layout = SumLayout.of(updates[client.client_id])
        point, seen = FixedPoint(self.work.config.privacy.fraction_bits), dict[str, Words]()
        words = {name: point.encode(layout.flatten(one, math.nan), len(updates)) for name, one in updates.items()}
        threshold = len(updates) // 2 + 1
        total = sum_in_process(words, max(2, threshold), b"audit", watch=lambda name, word: seen.update({name: word}))
        one, all_of_them = (layout.partial(point.decode(w), len(updates))[0] for w in (seen[client.client_id], total))
        weight = updates[client.client_id].num_examples
        # Whoever sees the masked vector may know the site's weight all the same.
        views = []
        for partial, by in ((one, weight), (all_of_them, all_of_them.weight)):
            tensors = {("", name): t / by for name, t in partial.dense.items()}
            tensors |= {(name, part): t / by for name, held in partial.sums.items() for part, t in held.items()}
            views.append(_message(tensors, self.nothing(client)))
        return views[0], views[1]

    def gradients(self, client: Client, examples: Encoded) -> Tensor:
        """Return, for each row, the direction in which it alone would move this site's message, (N, P).

        It is the change of the message after a small step against the row's gradient: of the numbers that are sent, in
        whatever form the method sends them.
        """
        started = self.started(client)
        before = _flat(self.nothing(client).named_tensors())
        rows = [self._direction(started, examples, i) - before for i in range(len(examples))]
        return torch.stack(rows)

    def _direction(self, started: Broadcast, examples: Encoded, i: int) -> Tensor:
        model = self.loaded.context.model
        model.load(started)
        model.model.eval()
        batch = {name: value.to(model.device) for name, value in examples.batch([i]).items()}
        if started.recipe.gradient:
            weights = model.target_weights()
            with model.differentiable(weights):
                torch.autograd.backward(client_losses(model, batch).sum())
                found = {name: Vector({"gradient": model.oriented(name, w)}) for name, w in weights.items()}
            moved = Update("", 1.0, found, {})
        else:
            moved = self._stepped(started, batch)
        return _flat(self.work.method.encode(moved, started, None)[0].named_tensors())

    def _stepped(self, started: Broadcast, batch: Mapping[str, Tensor]) -> Update:
        """Return the update after one small step against the gradient of a batch."""
        model = self.loaded.context.model
        chosen = model.trainable(started.recipe)
        torch.autograd.backward(client_losses(model, batch).sum())
        with torch.no_grad():
            steps = {name: _confined(started, name, p.grad) for name, p in chosen.items() if p.grad is not None}
            length = math.sqrt(sum(float(step.square().sum()) for step in steps.values()))
            size = math.sqrt(sum(float(p.square().sum()) for p in chosen.values()))
            for name, step in steps.items():
                chosen[name].sub_(step, alpha=_SMALL_STEP * max(size, 1.0) / max(length, 1e-30))
        for p in chosen.values():
            p.grad = None
        return Update("", 1.0, model.adapter(), model.dense(), rate_sum=1.0)


def _confined(started: Broadcast, name: str, gradient: Tensor) -> Tensor:
    """Return the part of a gradient along which the tensor may move."""
    space = started.subspaces.get(name)
    if space is None:
        return gradient
    space = replace(space, basis=space.basis.to(gradient))
    return space.expand(space.coordinates(gradient))


def _flat(tensors: Mapping[tuple[str, str], Tensor]) -> Tensor:
    return torch.cat([tensors[key].detach().cpu().float().flatten() for key in sorted(tensors)])


def _message(tensors: Mapping[tuple[str, str], Tensor], nothing: Update) -> Message:
    """Return tensors less those of a site that learnt nothing, by the names in their order."""
    places, shapes, start = {}, {}, 0
    for key in sorted(tensors):
        shapes[key] = tuple(tensors[key].shape)
        places[key] = slice(start, start + tensors[key].numel())
        start += tensors[key].numel()
    return Message(_flat(tensors) - _flat(nothing.named_tensors()), places, shapes)


def num_numbers(update: Update) -> int:
    """Return P, the numbers in an update."""
    return sum(t.numel() for t in update.named_tensors().values())


def largest(clients: Sequence[Client]) -> Client:
    """Return the site whose message is attacked: of those with the largest rank, the one with the fewest rows.

    Few rows show most clearly in an update, and the layout of a sum is that of the largest rank.
    """
    return min(clients, key=lambda c: (-c.rank, c.num_examples, c.client_id))


def with_factors(update: Update) -> bool:
    """Return whether an update holds factor pairs, which cannot be summed."""
    return any(isinstance(payload, Factors) for payload in update.modules.values())
