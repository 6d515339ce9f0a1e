"""One round of federation as a function, whoever carries the messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fedspan.client.training import LocalResult
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Answer, Question, Sites, Work, begin, unlearnt
from fedspan.federation.simulated import SimulatedClients
from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, ClientState, Request, Update
from fedspan.privacy.layout import Layout
from fedspan.robust import Screen
from fedspan.support.errors import FedspanError
from fedspan.support.peak_memory import peak_memory, reset_peak_memory
from fedspan.wire.sizes import broadcast_bytes, partial_bytes, state_bytes


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything of a finished round that its server step can be judged by."""

    method: Method
    before: ServerState
    """As the clients found it when they were told to train."""
    after: ServerState
    updates: Sequence[Update]
    """What training came to, before `encode`, with the weights that count."""
    broadcasts: Sequence[Broadcast]
    """What each of them started from."""
    client_states: Mapping[str, ClientState]
    """What the clients kept before the round."""


Observe = Callable[[Observation], Mapping[str, Any]]
"""What it measures joins the round's record."""

OnAnswer = Callable[[Answer, int], None]
"""Called with every valid answer to a question that trains, and how many there are by now."""


class RoundFailed(FedspanError):
    """Too few valid updates came back; the run stands where it was before the round."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What one round hands to the next."""

    state: ServerState
    client_states: Mapping[str, ClientState] = field(default_factory=dict)
    """Of clients that live in this process."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Client -> the newest patch version that it holds."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Client -> how many rounds were finished when its answer last counted."""


def run_round(
    method: Method,
    run_state: RunState,
    cohort: Sequence[Client],
    work: Work,
    *,
    weighting: str = "examples",
    min_success: int = 1,
    on_client: Callable[[Client, LocalResult, int], None] | None = None,
    observe: Observe | None = None,
) -> tuple[RunState, dict[str, Any]]:
    """`conduct` with clients that live in this process and whose local work is `work`."""

    def on_answer(answer: Answer, done: int) -> None:
        if on_client is not None and answer.result is not None:
            on_client(answer.client, answer.result, done)

    here = SimulatedClients(method, work, run_state.client_states, weighting=weighting)
    return conduct(method, run_state, cohort, here, min_success=min_success, on_answer=on_answer, observe=observe)


def conduct(
    method: Method,
    run_state: RunState,
    cohort: Sequence[Client],
    sites: Sites,
    *,
    min_success: int = 1,
    sums: bool = False,
    screen: Screen | None = None,
    on_answer: OnAnswer | None = None,
    observe: Observe | None = None,
) -> tuple[RunState, dict[str, Any]]:
    """Broadcast, train, fold, finish, for every exchange of the round.

    Updates are folded one by one in the order in which `sites` hands them over: sorted by client id, unless it was
    told otherwise, so that the result does not depend on who answered first. One that is wrong is left out and named
    in the record.

    Parameters
    ----------
    sums
        Learn nothing but the sum of an exchange's answers.
    screen
        What filters the answers before they are folded.

    Returns
    -------
    tuple[Standing, dict]
        What the next round starts from, and the record of this one.

    Raises
    ------
    RoundFailed
        When fewer than `min_success` updates were valid. With 0, which few methods can take, a round may be empty.
    """
    run = _Round(method, sites, sums, screen, on_answer, observe is not None, run_state)
    active = sorted(cohort, key=lambda c: c.client_id)
    due = [number for number, exchange in enumerate(method.exchanges) if exchange.due(run.round_num)]
    for place, (number, following) in enumerate(zip(due, (*due[1:], None), strict=True)):
        again = following is not None and method.exchanges[following].ask == "again"
        active = run.exchange(number, active, (place, len(due)), again)
        if len(active) < min_success:
            raise RoundFailed(_too_few(run.round_num, len(active), min_success, run.tally.rejected))
        run.finish()
    weights = {c.client_id: run.weights[c.client_id] for c in active}
    record = {
        "round_num": run.round_num + 1,
        "method": method.info.name,
        "num_clients": len(active),
        "train_loss": sum(run.losses[c] * w for c, w in weights.items()) / (sum(weights.values()) or math.nan),
        "eval": None,
        **run.tally.record(),
        **sites.costs(),
    }
    if observe is not None and run.trained:
        updates, broadcasts = zip(*run.trained, strict=True)
        record |= observe(Observation(method, run.before, run.state, updates, broadcasts, run_state.client_states))
    ids = [client.client_id for client in active]
    seen = {**run_state.seen, **dict.fromkeys(ids, run.version)}
    counted = {**run_state.counted, **dict.fromkeys(ids, run.round_num + 1)}
    return RunState(run.state, sites.states(), seen, counted), record


class _Round:
    """A round as it goes: what its exchanges hand to each other, and what they leave behind."""

    def __init__(
        self,
        method: Method,
        sites: Sites,
        sums: bool,
        screen: Screen | None,
        on_answer: OnAnswer | None,
        observed: bool,
        run_state: RunState,
    ) -> None:
        self.method, self.sites, self.sums, self.screen = method, sites, sums, screen
        self.on_answer, self.observed = on_answer, observed
        self.state = self.before = run_state.state
        self.run_state = run_state
        self.round_num = run_state.state.round_num
        self.version = 0
        """Of the patches that the clients were sent."""
        self.partial = Partial()
        self.losses: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.trained: list[tuple[Update, Broadcast]] = []
        self.started: Broadcast | None = None
        """What the client of largest rank would have started training from, for the layout of sums."""
        self.tally = _Tally()

    def exchange(self, number: int, clients: Sequence[Client], place: tuple[int, int], again: bool) -> list[Client]:
        """Ask everyone and fold the answers; who answered well.

        Parameters
        ----------
        place
            Which of how many exchanges of this round it is.
        again
            The next exchange asks about the same answers.
        """
        exchange = self.method.exchanges[number]
        self.state = replace(self.state, exchange=number)
        self.partial, self.version = Partial(), self.state.patches.version if self.state.patches else 0
        if exchange.ask == "train":
            self.before = self.state
        question = Question(
            self.state.template,
            self.round_num,
            number,
            exchange,
            place,
            again,
            self.run_state.counted,
            self.run_state.seen,
            self.version,
        )
        broadcasts = _Broadcasts(self.method, self.state, self.run_state.seen, self.tally)
        if self.sums:
            return self._summed(question, clients, broadcasts)
        answered: list[Answer] = []
        for answer in self._waited(self.sites.ask(question, clients, broadcasts.broadcast)):
            if not self._counts(question, answer, len(answered)):
                continue
            answer = replace(answer, result=None, started=None)
            if self.screen is None:
                self._fold(question, answer.update)
                answer = replace(answer, update=None)
            answered.append(answer)
        if self.screen is not None:
            answered = self._screened(question, self.screen, answered, broadcasts)
        return [answer.client for answer in answered]

    def finish(self) -> None:
        """The server's step of this exchange."""
        with self.tally.server(), self.tally.memory(self.state, self.partial):
            self.state, diagnostics = self.method.finish(self.state, self.partial)
        self.tally.diagnostics |= diagnostics

    def _waited(self, answers: Iterator[Answer]) -> Iterator[Answer]:
        """The answers, with the time that they were waited for on the tally."""
        while True:
            began, busy = time.perf_counter(), self.tally.server_seconds
            answer = next(answers, None)
            # What the server does while it is asked what to send is its own time.
            served = self.tally.server_seconds - busy
            self.tally.train_wall_seconds += time.perf_counter() - began - served
            if answer is None:
                return
            yield answer

    def _counts(self, question: Question, answer: Answer, answered: int) -> bool:
        """Whether the answer is one; what is wrong with it is noted."""
        tally, key = self.tally, answer.client.client_id
        tally.client_seconds += answer.seconds
        tally.bytes_up += answer.bytes_up
        if answer.problem is not None:
            tally.rejected[key] = answer.problem
            tally.bad += not answer.absent
            return False
        tally.optimizer_bytes = max(tally.optimizer_bytes, answer.optimizer_bytes)
        if question.exchange.ask == "train":
            self.losses[key] = answer.train_loss
            if self.on_answer is not None:
                self.on_answer(answer, answered + 1)
            if self.observed and answer.result is not None and answer.started is not None:
                self.trained.append((replace(answer.result.update, num_examples=answer.weight), answer.started))
        self.weights[key] = answer.weight
        return True

    def _fold(self, question: Question, update: Update | None) -> None:
        if update is not None:
            with self.tally.server():
                self.partial = question.exchange.fold.add(self.partial, update)

    def _screened(
        self, question: Question, screen: Screen, answers: list[Answer], broadcasts: _Broadcasts
    ) -> list[Answer]:
        """The answers that the filter lets pass, folded as it gives them."""
        updates = [answer.update for answer in answers if answer.update is not None]
        if not updates:
            return []
        with self.tally.server():
            sent = [broadcasts.made_for(answer.client) for answer in answers]
            found = screen(updates, sent, ask=question.exchange.ask, bad=self.tally.bad)
        self.tally.rejected |= found.rejected
        self.tally.bad += len(found.rejected)
        self.tally.diagnostics |= found.diagnostics
        for update in found.updates:
            self._fold(question, update)
        return [replace(a, update=None) for a in answers if a.client.client_id not in found.rejected]

    def _summed(self, question: Question, clients: Sequence[Client], broadcasts: _Broadcasts) -> list[Client]:
        """The same from the sum of the answers alone."""
        if not clients:
            return []
        layout = self._layout(question, clients, broadcasts)
        began = time.perf_counter()
        found = self.sites.sum(question, clients, broadcasts.broadcast, layout)
        self.tally.train_wall_seconds += time.perf_counter() - began
        self.partial = found.partial
        valid = [a for number, a in enumerate(found.answers) if self._counts(question, a, number)]
        if question.exchange.ask == "train":
            # Of the clients' own losses nothing is known: the mean stands for each.
            self.losses = dict.fromkeys(self.losses, found.train_loss)
        return [answer.client for answer in valid]

    def _layout(self, question: Question, clients: Sequence[Client], broadcasts: _Broadcasts) -> Layout:
        """The layout of what the client of largest rank sends, found by having it learn nothing."""
        largest = max(clients, key=lambda c: c.rank)
        started = begin(self.method, question, broadcasts.made_for(largest), None)
        if question.exchange.ask != "again":
            self.started = started
        learnt = unlearnt(self.state.template, self.started or started)
        return Layout.of(self.method.encode(learnt, started, None)[0])


@dataclass(slots=True)
class _Tally:
    """What the round costs, added up as it goes."""

    bytes_up: int = 0
    bytes_down: int = 0
    server_seconds: float = 0.0
    client_seconds: float = 0.0
    train_wall_seconds: float = 0.0
    peak_server_bytes: int = 0
    optimizer_bytes: int = 0
    """The largest that a client's local optimizer held."""
    bad: int = 0
    """Clients that answered, and wrongly."""
    rejected: dict[str, str] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def server(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.server_seconds += time.perf_counter() - began

    @contextmanager
    def memory(self, state: ServerState, partial: Partial) -> Iterator[None]:
        held = state_bytes(state) + partial_bytes(partial)
        before = reset_peak_memory()
        yield
        self.peak_server_bytes = max(self.peak_server_bytes, held + peak_memory() - before)

    def record(self) -> dict[str, Any]:
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "server_seconds": self.server_seconds,
            "client_seconds": self.client_seconds,
            "train_wall_seconds": self.train_wall_seconds,
            "peak_server_bytes": self.peak_server_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "rejected": self.rejected,
            **self.diagnostics,
        }


@dataclass(slots=True)
class _Broadcasts:
    """One exchange with its clients: those that ask for the same thing are sent the same thing, worked out once."""

    method: Method
    state: ServerState
    seen: Mapping[str, int]
    tally: _Tally
    made: dict[Request, Broadcast] = field(default_factory=dict)

    def broadcast(self, client: Client) -> Broadcast:
        """What this client is sent."""
        broadcast = self.made_for(client)
        self.tally.bytes_down += broadcast_bytes(broadcast)
        return broadcast

    def made_for(self, client: Client) -> Broadcast:
        """The same, looked at and not sent."""
        request = Request(client.rank, self.seen.get(client.client_id, 0))
        if request not in self.made:
            with self.tally.server():
                self.made[request] = self.method.broadcast(self.state, request)
        return self.made[request]


def _too_few(round_num: int, valid: int, wanted: int, rejected: Mapping[str, str]) -> str:
    first = next((f": {client}: {reason}" for client, reason in rejected.items()), "")
    return (
        f"round {round_num + 1}: {valid} valid updates, federation.min_success = {wanted}; "
        f"{len(rejected)} rejected{first}"
    )
