"""A method's exchanges with clients whose answers are state dicts: both sides of them, on one machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedspan.algebra.finite import is_finite
from fedspan.merging.answers import checked_id, gradient_update, trained_update
from fedspan.merging.layout import Layout
from fedspan.merging.stage import Stage, stage_of
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Request, Update
from fedspan.methods.state_file import pack_state
from fedspan.support import parallel
from fedspan.support.errors import FedspanError
from fedspan.support.scalars import whole

StateDicts = Mapping[str, Mapping[str, Tensor]]
"""Client id -> its trained adapter, or its gradient."""


@dataclass(frozen=True, slots=True)
class Exchanges:
    """A method between two answers of its clients: the server's state, and what is kept for each client."""

    method: Method
    layout: Layout
    state: ServerState
    client_states: Mapping[str, ClientState] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        """The exchanges that the clients' next answers are for."""
        return stage_of(self.method, self.state)

    @property
    def label(self) -> str:
        """The round and the method, as messages name them."""
        return f"round {self.state.round_num + 1} of {self.method.info.name}"

    def broadcast(self, rank: int | None, where: str) -> Broadcast:
        """Return what a client of this rank, none: the largest, is sent next.

        Raises
        ------
        FedspanError
            When the method does not serve that rank; `where` stands in front of the message.
        """
        # Not every round begins with the method's first exchange.
        at = replace(self.state, exchange=self.stage.numbers[0])
        return self._broadcast(at, self.layout.template.rank if rank is None else rank, where)

    def start(self, rank: int | None, client_id: str | None) -> Broadcast:
        """Return what a client starts from, with what is kept for it."""
        where = "adapter" if client_id is None else f"client {checked_id(client_id)}"
        kept = None if client_id is None else self.client_states.get(client_id)
        return self.method.start(self.broadcast(rank, where), kept)

    def answered(self, state_dicts: StateDicts, counts: Mapping[str, float]) -> tuple[Exchanges, Diagnostics]:
        """Return the exchanges after the clients' answers to this stage, and the method's diagnostics.

        Raises
        ------
        FedspanError
            Naming the client and what is wrong with its answer, or when the result is not finite.
        """
        try:
            after, diagnostics = self._answered(state_dicts, counts)
            if _is_finite(after.state):
                return after, diagnostics
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of a product that overflowed
            pass
        raise FedspanError(f"{self.label} overflowed: expected smaller values in the state dicts")

    def _answered(self, state_dicts: StateDicts, counts: Mapping[str, float]) -> tuple[Exchanges, Diagnostics]:
        stage, state, kept = self.stage, self.state, dict(self.client_states)
        answers = {c: _Answer(f"client {c}", state_dicts[c], stage, self.layout) for c in counts}
        updates: dict[str, Update] = {}
        diagnostics: dict[str, Any] = {}
        for number in stage.numbers:
            state = replace(state, exchange=number)
            starts = self._starts(state, {c: answer.rank for c, answer in answers.items()})
            # The stage's further exchanges ask about the same work again.
            updates = updates or {c: x.update(c, starts[c], counts[c], self.label) for c, x in answers.items()}
            replies = [self._encoded(update, starts[client_id], kept) for client_id, update in updates.items()]
            with parallel.threads(os.cpu_count() or 1):
                state, measured = aggregate(self.method, state, replies)
            diagnostics |= measured
        if stage.following is not None:
            state = replace(state, exchange=stage.following)
        return replace(self, state=state, client_states=kept), diagnostics

    def _broadcast(self, state: ServerState, rank: int, where: str) -> Broadcast:
        info, largest = self.method.info, self.layout.template.rank
        rank = whole(f"{where}: rank", rank, 1)
        if not info.hetero_rank and rank != largest:
            raise FedspanError(f"{where}: rank = {rank}: {info.name} expected rank {largest} for every client")
        sent = self.method.broadcast(state, Request(rank))
        # Methods that keep factors have no more directions than these to give.
        if any(f.rank != rank for f in sent.adapter.values()):
            raise FedspanError(f"{where}: rank = {rank}: {info.name} expected at most {largest}, the server's max_rank")
        gradient = self.method.exchanges[state.exchange].ask == "gradient"
        return replace(sent, recipe=replace(sent.recipe, gradient=True)) if gradient else sent

    def _starts(self, state: ServerState, ranks: Mapping[str, int]) -> dict[str, Broadcast]:
        """Return what each client starts from; clients of one rank are sent the same, worked out once."""
        one_of = {rank: client_id for client_id, rank in ranks.items()}
        sent = {rank: self._broadcast(state, rank, f"client {client_id}") for rank, client_id in one_of.items()}
        return {c: self.method.start(sent[rank], self.client_states.get(c)) for c, rank in ranks.items()}

    def _encoded(self, worked: Update, start: Broadcast, kept: dict[str, ClientState]) -> Update:
        """Return what the method makes of a client's update, and put what it keeps for the client in `kept`."""
        client_id = worked.client_id
        update, after = self.method.encode(worked, start, self.client_states.get(client_id))
        if after is not None:
            kept[client_id] = after
        # What was handed over is finite, but a norm or a product of it need not be.
        for (module, part), tensor in update.named_tensors().items():
            if not is_finite(tensor):
                raise FedspanError(f"client {client_id}: {part} of {module} overflowed: expected finite values")
        return update


class _Answer:
    """One client's answer as it was read: a gradient, or a trained adapter and its rank."""

    def __init__(self, where: str, state_dict: Mapping[str, Tensor], stage: Stage, layout: Layout) -> None:
        if stage.ask == "gradient":
            self.gradient = layout.read_gradient(where, state_dict)
            # A gradient has no rank: every client is asked as one of the largest.
            self.adapter, self.rank = None, layout.template.rank
        else:
            self.adapter, self.rank = layout.read(where, state_dict)

    def update(self, client_id: str, sent: Broadcast, count: float, label: str) -> Update:
        """Return it as an update, checked against what the client was sent."""
        if self.adapter is None:
            return gradient_update(client_id, self.gradient, count)
        return trained_update(client_id, self.adapter.factors, self.adapter.dense, sent, count, label)


def _is_finite(state: ServerState) -> bool:
    tensors: dict[str, Tensor] = {}
    pack_state(state, tensors)
    return all(is_finite(tensor) for tensor in tensors.values())
