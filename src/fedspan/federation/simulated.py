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
from fedspan.privacy.running_sum import SumSettings
from fedspan.privacy.sum_layout import SumLayout
from fedspan.wire.precision import EXACT, Precision, rounded_broadcast


class SimulatedClients:
    """Simulated clients: their states are held here, and `work` does their training.

    Parameters
    ----------
    work
        Trains clients, a window of them at a time.
    client_states
        Client -> what it keeps between rounds. The mapping is not changed: the new states are in `states`.
    weighting
        `federation.weighting`.
    precision
        The types in which tensors would travel.
    total
        How sums are taken; needed by `sum` alone.
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
        self._before = client_states
        """Client -> the state that its exchanges of this round start from, as on a site."""
        self._states = dict(client_states)
        self._learnt: dict[str, Answer] = {}
        """Client -> its answer, kept because the next exchange asks about it again."""
        self._arrived: dict[int, tuple[Broadcast, Broadcast]] = {}
        """Identity of a broadcast -> the broadcast, and it as it arrives; clients of one rank share both. The broadcast
        is held so that its identity is not given to another one."""

    def ask(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """Yield the answers in the clients' order, each before the next one is encoded."""
        learnt, self._learnt = self._learnt, {}
        self._arrived = {}
        again = question.exchange.ask == "again"
        for answer in (
            self._again(clients, broadcast_for, learnt) if again else self._working(question, clients, broadcast_for)
        ):
            encoded = self._encoded(question, answer)
            if encoded.problem is None and question.keep:
                # As it was trained: the next exchange encodes the same result again, in its own form.
                self._learnt[answer.client.client_id] = answer
            yield encoded

    def sum(
        self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor, layout: SumLayout
    ) -> Summed:
        """Return the sum of the answers in fixed point; each is flattened, added and forgotten."""
        if self.total is None:
            raise TypeError("SimulatedClients.sum without `total`: expected SumSettings")
        answers: list[Answer] = []
        adding = self.total.begin(layout, len(clients))
        for answer in self.ask(question, clients, broadcast_for):
            if answer.update is not None:
                problem = adding.add(answer.update, answer.train_loss)
                # Weight and loss are in the sum only, as they would be between real sites.
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
        """Return what the clients keep if their answers count."""
        return self._states

    def costs(self) -> Mapping[str, Any]:
        """Return nothing: no message was sent."""
        return {}

    def _working(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """Yield each client's result of training, or its gradient, working on a window of clients at a time."""
        for start in range(0, len(clients), WINDOW):
            window: list[tuple[Client, Broadcast]] = []
            for client in clients[start : start + WINDOW]:
                sent = self._arrives(broadcast_for(client))
                window.append((client, begin(self.method, question, sent, self._before.get(client.client_id))))
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
        self, clients: Sequence[Client], broadcast_for: BroadcastFor, learnt: Mapping[str, Answer]
    ) -> Iterator[Answer]:
        """Yield each client's earlier result, which this exchange asks another question about."""
        for client in clients:
            sent = self._arrives(broadcast_for(client))
            # The seconds of its training were counted in the exchange before.
            yield replace(learnt[client.client_id], started=sent, seconds=0.0)

    def _arrives(self, sent: Broadcast) -> Broadcast:
        """Return a broadcast as it arrives, rounded to the type in which it would travel."""
        if id(sent) not in self._arrived:
            self._arrived[id(sent)] = (sent, rounded_broadcast(sent, self.precision.down))
        return self._arrived[id(sent)][1]

    def _encoded(self, question: Question, answer: Answer) -> Answer:
        """Return the answer with what would leave the site, and store what the client keeps."""
        assert answer.result is not None
        assert answer.started is not None  # both generators above set it
        client_id = answer.client.client_id
        began = time.perf_counter()
        response = respond(
            self.method,
            question,
            answer.result,
            answer.started,
            self._before.get(client_id),
            self.precision,
            answer.weight,
        )
        seconds = answer.seconds + time.perf_counter() - began
        if response.problem is None and response.kept is not None:
            self._states[client_id] = response.kept
        return replace(
            answer, update=response.update, problem=response.problem, seconds=seconds, bytes_up=response.num_bytes
        )
