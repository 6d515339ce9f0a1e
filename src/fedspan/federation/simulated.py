"""Clients that live in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedspan.federation.clients import Client
from fedspan.federation.exchange import WINDOW, Answer, BroadcastFor, Question, Summed, Work, begin, respond
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, ClientState
from fedspan.privacy.layout import Layout
from fedspan.privacy.running_sum import SumSettings
from fedspan.support.errors import FedspanError
from fedspan.wire.precision import EXACT, Precision, rounded_broadcast


class SimulatedClients:
    """Simulated clients: their states are held here, and `work` does what they do.

    Parameters
    ----------
    client_states
        Left as they are: what the round changes is in `states`.
    narrow
        The types in which tensors would travel.
    """

    def __init__(
        self,
        method: Method,
        work: Work,
        client_states: Mapping[str, ClientState],
        *,
        weighting: str = "examples",
        precision: Precision = EXACT,
        total: SumSettings | None = None,
    ) -> None:
        self.method, self.work, self.weighting, self.precision, self.total = method, work, weighting, precision, total
        self._states = dict(client_states)
        self._learnt: dict[str, Answer] = {}
        """What is held because the next exchange asks about it again."""
        self._arrived: dict[int, tuple[Broadcast, Broadcast]] = {}
        """What was sent, and what of it arrives, by the identity of the first: clients share it."""

    def ask(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """The answers in the clients' order, each taken before the next one is worked out."""
        held, self._learnt = self._learnt, {}
        self._arrived = {}
        again = question.exchange.ask == "again"
        for answer in (
            self._again(clients, broadcast_for, held) if again else self._working(question, clients, broadcast_for)
        ):
            done = self._encoded(question, answer)
            if done.problem is None and question.keep:
                self._learnt[answer.client.client_id] = answer
            yield done

    def sum(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor, layout: Layout) -> Summed:
        """The same answers, flattened, summed in fixed point and forgotten."""
        if self.total is None:
            raise FedspanError("sums were not prepared for: expected SumSettings")
        answers: list[Answer] = []
        adding = self.total.begin(layout, len(clients))
        for answer in self.ask(question, clients, broadcast_for):
            if answer.update is not None:
                problem = adding.add(answer.update, answer.train_loss)
                answer = replace(
                    answer,
                    update=None,
                    problem=problem,
                    weight=1.0,
                    train_loss=math.nan,
                    bytes_up=8 * layout.num_words,
                )
            answers.append(answer)
        partial, loss = adding.partial(question.round_num, question.number)
        return Summed(partial, loss, answers)

    def states(self) -> Mapping[str, ClientState]:
        """What the clients keep now."""
        return self._states

    def costs(self) -> Mapping[str, Any]:
        """Nothing was sent."""
        return {}

    def _working(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """What everyone learns from where it starts, or its gradient there, a window of clients at a time."""
        for start in range(0, len(clients), WINDOW):
            window: list[tuple[Client, Broadcast]] = []
            for client in clients[start : start + WINDOW]:
                sent = self._arrives(broadcast_for(client))
                window.append((client, begin(self.method, question, sent, self._states.get(client.client_id))))
            results = self.work(window, question.round_num)
            for (client, sent), (result, seconds) in zip(window, results, strict=True):
                weight = client.weight(self.weighting)
                yield Answer(
                    client,
                    None,
                    weight=weight,
                    train_loss=result.train_loss,
                    seconds=seconds,
                    optimizer_bytes=result.optimizer_bytes,
                    result=result,
                    started=sent,
                )

    def _again(
        self, clients: Sequence[Client], broadcast_for: BroadcastFor, held: Mapping[str, Answer]
    ) -> Iterator[Answer]:
        """What everyone has learnt before, beside another question about it."""
        for client in clients:
            sent = self._arrives(broadcast_for(client))
            yield replace(held[client.client_id], started=sent, seconds=0.0)

    def _arrives(self, sent: Broadcast) -> Broadcast:
        if id(sent) not in self._arrived:
            self._arrived[id(sent)] = (sent, rounded_broadcast(sent, self.precision.down))
        return self._arrived[id(sent)][1]

    def _encoded(self, question: Question, answer: Answer) -> Answer:
        assert answer.result is not None
        assert answer.started is not None  # as both generators above make it
        key = answer.client.client_id
        began = time.perf_counter()
        response = respond(
            self.method, question, answer.result, answer.started, self._states.get(key), self.precision, answer.weight
        )
        seconds = answer.seconds + time.perf_counter() - began
        if response.problem is None and response.kept is not None:
            self._states[key] = response.kept
        return replace(
            answer, update=response.update, problem=response.problem, seconds=seconds, bytes_up=response.num_bytes
        )
