"""One round of federation as a function, whatever transport carries the messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedspan.client.training import LocalResult
from fedspan.federation.clients import Client
from fedspan.federation.exchange import DIVERGED, Answer, Question, Sites, Work, begin, sum_layout
from fedspan.federation.round_spool import RoundSpool
from fedspan.federation.server_step import StepFailed, take_step
from fedspan.federation.simulated import SimulatedClients
from fedspan.federation.tally import RoundTally
from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, ClientState, Request, Update
from fedspan.privacy.sum_layout import SumLayout
from fedspan.robust import Screen
from fedspan.support.errors import FedspanError, NotResumable
from fedspan.wire.sizes import broadcast_bytes


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything that the server step of a finished round can be judged by."""

    method: Method
    before: ServerState
    """The server's state that the clients were sent when they were asked to train."""
    after: ServerState
    updates: Sequence[Update]
    """The results of training, before `encode`, with the weights that count."""
    broadcasts: Sequence[Broadcast]
    """The broadcast that each of them started from."""
    client_states: Mapping[str, ClientState]
    """The states that the clients kept before the round."""


Observe = Callable[[Observation], Mapping[str, Any]]
"""Measures a finished round; what it returns joins the round's record."""

OnAnswer = Callable[[Answer, int], None]
"""Called with every valid answer to a question that trains, and the number of them so far."""


class RoundFailed(FedspanError):
    """Too few valid updates came back; the run stands where it was before the round."""


class TrainingDiverged(RoundFailed, NotResumable):
    """Too few updates came back because the clients' own training diverged, as it would again."""


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a federation that one round hands to the next."""

    state: ServerState
    client_states: Mapping[str, ClientState] = field(default_factory=dict)
    """Client -> what it keeps, for clients that live in this process."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Client -> the newest patch version that it holds."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Client -> the number of finished rounds when its answer last counted."""


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
    spool: RoundSpool | None = None,
) -> tuple[RunState, dict[str, Any]]:
    """Conduct a round with clients that live in this process and whose local work is `work`; see `conduct`."""

    def on_answer(answer: Answer, done: int) -> None:
        if on_client is not None and answer.result is not None:
            on_client(answer.client, answer.result, done)

    simulated = SimulatedClients(method, work, run_state.client_states, weighting=weighting)
    return conduct(
        method,
        run_state,
        cohort,
        simulated,
        min_success=min_success,
        on_answer=on_answer,
        observe=observe,
        spool=spool,
    )


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
    spool: RoundSpool | None = None,
) -> tuple[RunState, dict[str, Any]]:
    """Broadcast, train, fold and finish, for every exchange of the round.

    Updates are folded one by one, in the order in which `sites` yields them: sorted by client id unless the settings
    say otherwise, so that the result does not depend on which client answered first. A wrong answer is left out and
    named in the record.

    Parameters
    ----------
    sums
        Learn nothing but the sum of an exchange's answers.
    screen
        Filters the answers before they are folded.
    spool
        Holds the updates that memory does not, where the method needs all of them at once; none: memory does.

    Returns
    -------
    tuple[RunState, dict]
        What the next round starts from, and the record of this one.

    Raises
    ------
    RoundFailed
        When fewer than `min_success` updates were valid. With 0, which few methods can take, a round may be empty.
    """
    # Everything that a round changes is held in `_Round`: where it fails, the caller's state is as before.
    run = _Round(method, sites, sums, screen, on_answer, observe is not None, run_state, spool)
    active = sorted(cohort, key=lambda c: c.client_id)
    due = [number for number, exchange in enumerate(method.exchanges) if exchange.due(run.round_num)]
    for place, (number, following) in enumerate(zip(due, (*due[1:], None), strict=True)):
        # A client trains once: where the next exchange asks about the same result, the client must still have it.
        again = following is not None and method.exchanges[following].ask == "again"
        # A client that failed one exchange is not asked again: later exchanges build on what all of them answered.
        active = run.exchange(number, active, (place, len(due)), again)
        if len(active) < min_success:
            raise _too_few(run.round_num, len(active), min_success, run.tally.rejected)
        run.finish()
    record = run.record(active)
    if observe is not None and run.trained:
        updates, broadcasts = zip(*run.trained, strict=True)
        record |= observe(Observation(method, run.before, run.state, updates, broadcasts, run_state.client_states))
    return run.outcome(active), record


class _Round:
    """A round in progress: what its exchanges hand to each other, and what they leave behind."""

    def __init__(
        self,
        method: Method,
        sites: Sites,
        sums: bool,
        screen: Screen | None,
        on_answer: OnAnswer | None,
        observed: bool,
        run_state: RunState,
        spool: RoundSpool | None,
    ) -> None:
        self.method, self.sites, self.sums, self.screen = method, sites, sums, screen
        self.on_answer, self.observed, self.spool = on_answer, observed, spool
        self.state = self.before = run_state.state
        self.run_state = run_state
        self.round_num = run_state.state.round_num
        self.version = 0
        """Version of the patches that the clients were sent."""
        self.partial = Partial()
        self.losses: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.trained: list[tuple[Update, Broadcast]] = []
        """Results of training and what they started from; filled only where the round is observed."""
        self.started: Broadcast | None = None
        """The broadcast that the client of largest rank would have started training from, for the layout of sums."""
        self.unused: set[str] = set()
        """Clients whose valid answer a filter did not choose."""
        self.tally = RoundTally()

    def exchange(self, number: int, clients: Sequence[Client], place: tuple[int, int], again: bool) -> list[Client]:
        """Ask the clients, fold their answers, and return the clients whose answers were valid.

        Parameters
        ----------
        place
            (i, n): this is the i-th, from 0, of the n exchanges of this round.
        again
            The next exchange asks about the same answers.
        """
        exchange = self.method.exchanges[number]
        self.state = replace(self.state, exchange=number)
        # Read again for every exchange: the server's step of an earlier one may have made a new version.
        self.partial, self.version = Partial(), self.state.patches.version if self.state.patches else 0
        if exchange.ask == "train":
            # Clients train from this state, so a measurement of the round compares with it. The state at the start of
            # the round may be another one, where a sketch or a gradient was asked for first.
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
            # Let go of what the client held, so that memory does not grow with the number of clients. The update
            # goes too, once it is folded; a filter compares all updates, so it has to keep them until the end.
            answer = replace(answer, result=None, started=None)
            if self.screen is None:
                self._fold(question, answer.update)
                answer = replace(answer, update=None)
            answered.append(answer)
        if self.screen is not None:
            answered = self._screened(question, self.screen, answered, broadcasts)
        return [answer.client for answer in answered]

    def finish(self) -> None:
        """Take the server's step of this exchange."""
        with self.tally.server(), self.tally.memory(self.state, self.partial):
            try:
                self.state, diagnostics = take_step(self.method, self.state, self.partial)
            except StepFailed as error:
                raise RoundFailed(f"round {self.round_num + 1}: {error}") from None
        self.tally.diagnostics |= diagnostics

    def record(self, active: Sequence[Client]) -> dict[str, Any]:
        """Return the round's record, with the mean loss of the clients that answered every exchange."""
        weights = {client.client_id: self.weights[client.client_id] for client in active}
        return {
            "round_num": self.round_num + 1,
            "method": self.method.info.name,
            "num_clients": len(active),
            "train_loss": sum(self.losses[c] * w for c, w in weights.items()) / (sum(weights.values()) or math.nan),
            "eval": None,
            **self.tally.record(),
            **self.sites.costs(),
        }

    def outcome(self, active: Sequence[Client]) -> RunState:
        """Return what the next round starts from."""
        ids = [client.client_id for client in active]
        # Only clients that got to the end certainly hold the patches; the others are sent them once more. A site that
        # does hold that version recognises it by its number, and adds nothing twice.
        seen = {**self.run_state.seen, **dict.fromkeys(ids, self.version)}
        # An answer that was not counted changed nothing, on its client neither: a control variate that the server never
        # added would pull the client away for good. Sites go back to the state of the round that last counted, too.
        ids = [client_id for client_id in ids if client_id not in self.unused]
        counted = {**self.run_state.counted, **dict.fromkeys(ids, self.round_num + 1)}
        kept = self.sites.states()
        states = {**self.run_state.client_states, **{client: kept[client] for client in ids if client in kept}}
        return RunState(self.state, states, seen, counted)

    def _waited(self, answers: Iterator[Answer]) -> Iterator[Answer]:
        """Yield the answers, adding the time spent waiting for them to the tally."""
        while True:
            began, busy = time.perf_counter(), self.tally.server_seconds
            answer = next(answers, None)
            # Asking for an answer may have the server work out a broadcast: that is its own time, counted already.
            served = self.tally.server_seconds - busy
            self.tally.train_wall_seconds += time.perf_counter() - began - served
            if answer is None:
                return
            yield answer
            del answer  # it is not held while the next one comes

    def _counts(self, question: Question, answer: Answer, answered: int) -> bool:
        """Return whether the answer is valid, and enter it, or its problem, in the tally."""
        tally, client_id = self.tally, answer.client.client_id
        # An answer that is left out was worked for and sent all the same.
        tally.client_seconds += answer.seconds
        tally.bytes_up += answer.bytes_up
        if answer.problem is not None:
            tally.rejected[client_id] = answer.problem
            tally.bad += not answer.absent
            return False
        tally.optimizer_bytes = max(tally.optimizer_bytes, answer.optimizer_bytes)
        if question.exchange.ask == "train":
            self.losses[client_id] = answer.train_loss
            if self.on_answer is not None:
                self.on_answer(answer, answered + 1)
            if self.observed and answer.result is not None and answer.started is not None:
                self.trained.append((replace(answer.result.update, num_examples=answer.weight), answer.started))
        self.weights[client_id] = answer.weight
        return True

    def _fold(self, question: Question, update: Update | None) -> None:
        if update is not None:
            with self.tally.server():
                # The partial was begun by this exchange, and nothing else holds it.
                self.partial = question.exchange.fold.add_in_place(self.partial, update)
                if self.spool is not None:
                    self.partial = self.spool.shed(self.partial)

    def _screened(
        self, question: Question, screen: Screen, answers: list[Answer], broadcasts: _Broadcasts
    ) -> list[Answer]:
        """Fold the updates that pass the filter, as it returns them, and return their answers."""
        updates = [answer.update for answer in answers if answer.update is not None]
        if not updates:
            return []
        with self.tally.server():
            sent = [broadcasts.made_for(answer.client) for answer in answers]
            # Clients whose answers were wrong are out already: the filter expects fewer attackers among the rest.
            screened = screen(updates, sent, ask=question.exchange.ask, bad=self.tally.bad)
        self.tally.rejected |= screened.rejected
        self.tally.bad += len(screened.rejected)
        self.tally.diagnostics |= screened.diagnostics
        for update in screened.updates:
            self._fold(question, update)
        self.unused |= {update.client_id for update in updates} - {update.client_id for update in screened.updates}
        return [replace(a, update=None) for a in answers if a.client.client_id not in screened.rejected]

    def _summed(self, question: Question, clients: Sequence[Client], broadcasts: _Broadcasts) -> list[Client]:
        """Do the exchange from the sum of the answers alone."""
        if not clients:
            return []
        layout = self._layout(question, clients, broadcasts)
        began = time.perf_counter()
        summed = self.sites.sum(question, clients, broadcasts.broadcast, layout)
        self.tally.train_wall_seconds += time.perf_counter() - began
        # The clients' vectors were added up on the way: what comes back is the fold of all of them.
        self.partial = summed.partial
        valid = [a for number, a in enumerate(summed.answers) if self._counts(question, a, number)]
        if question.exchange.ask == "train":
            # The sum hides the clients' own losses: their mean stands for each.
            self.losses = dict.fromkeys(self.losses, summed.train_loss)
        return [answer.client for answer in valid]

    def _layout(self, question: Question, clients: Sequence[Client], broadcasts: _Broadcasts) -> SumLayout:
        """Return the layout that all clients' updates share, found by encoding an update that learnt nothing.

        The client of largest rank is taken: the others' updates fit into the layout of its own.
        """
        largest = max(clients, key=lambda c: c.rank)
        started = begin(self.method, question, broadcasts.made_for(largest), None)
        if question.exchange.ask != "again":
            # With `again`, the answer is about what was trained from the broadcast before, not from this one.
            self.started = started
        return sum_layout(self.method, self.state.template, started, self.started)


@dataclass(slots=True)
class _Broadcasts:
    """The broadcasts of one exchange; clients with equal requests share one, worked out once."""

    method: Method
    state: ServerState
    seen: Mapping[str, int]
    tally: RoundTally
    made: dict[Request, Broadcast] = field(default_factory=dict)

    def broadcast(self, client: Client) -> Broadcast:
        """Return what this client is sent, and count its bytes."""
        broadcast = self.made_for(client)
        self.tally.bytes_down += broadcast_bytes(broadcast)
        return broadcast

    def made_for(self, client: Client) -> Broadcast:
        """Return what this client is sent, without sending it."""
        request = Request(client.rank, self.seen.get(client.client_id, 0))
        # Clients with equal requests get one object: what packs or checks broadcasts recognises it by identity and does
        # its work once.
        if request not in self.made:
            with self.tally.server():
                self.made[request] = self.method.broadcast(self.state, request)
        return self.made[request]


def _too_few(round_num: int, valid: int, wanted: int, rejected: Mapping[str, str]) -> RoundFailed:
    first = next((f": {client}: {reason}" for client, reason in rejected.items()), "")
    diverged = bool(rejected) and all(reason.startswith(DIVERGED) for reason in rejected.values())
    return (TrainingDiverged if diverged else RoundFailed)(
        f"round {round_num + 1}: {valid} valid updates, federation.min_success = {wanted}; "
        f"{len(rejected)} rejected{first}"
    )
