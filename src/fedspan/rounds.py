"""One round of federation as a function, whoever carries the messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedspan.federation import Client
from fedspan.memory import peak_memory, reset_peak_memory
from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Exchange, Partial
from fedspan.methods.messages import Broadcast, ClientState, Request, Update
from fedspan.traffic import broadcast_bytes, partial_bytes, parts, payload_bytes, payload_tensors, state_bytes
from fedspan.train import LocalResult

WINDOW = 64
"""Clients that are told to start at once. It bounds what a round holds beside the server's own fold, however many
clients take part; within it the work is grouped, and spread over processes, as whoever does it likes."""

Work = Callable[[Sequence[tuple[Client, Broadcast]], int], Iterable[tuple[LocalResult, float]]]
"""(clients and what each starts from, round) -> what each learnt, in that order, and the busy seconds it took.

Results are taken one by one, so that a generator need not hold them all. Raises nothing for a bad update: that is
checked here."""


_Answer = tuple[Client, LocalResult, Broadcast]


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


class RoundFailed(ValueError):
    """Too few valid updates came back; the run stands where it was before the round."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What one round hands to the next."""

    state: ServerState
    client_states: Mapping[str, ClientState] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)


def run_round(
    method: Method,
    standing: Standing,
    cohort: Sequence[Client],
    work: Work,
    *,
    weighting: str = "examples",
    min_success: int = 1,
    on_client: Callable[[Client, LocalResult, int], None] | None = None,
    observe: Observe | None = None,
) -> tuple[Standing, dict[str, Any]]:
    """Broadcast, train, fold, finish, for every exchange of the round.

    Updates are folded one by one in sorted client order, so the result does not depend on who answered first. An
    update with a NaN or an infinity, or with other shapes than were sent, is left out and named in the record; one
    that is wrong before it is encoded does not leave its site.

    Returns
    -------
    tuple[Standing, dict]
        What the next round starts from, and the record of this one.

    Raises
    ------
    RoundFailed
        When fewer than `min_success` updates were valid.
    """
    run = _Round(method, work, weighting, on_client, observe is not None, standing)
    active = sorted(cohort, key=lambda c: c.client_id)
    due = [number for number, exchange in enumerate(method.exchanges) if exchange.due(run.round_num)]
    for number, following in zip(due, (*due[1:], None), strict=True):
        again = following is not None and method.exchanges[following].ask == "again"
        active = run.exchange(number, active, again)
        if len(active) < max(1, min_success):
            raise RoundFailed(_too_few(run.round_num, len(active), min_success, run.tally.rejected))
        run.finish()
    weights = {c.client_id: c.weight(weighting) for c in active}
    record = {
        "round_num": run.round_num + 1,
        "method": method.info.name,
        "num_clients": len(active),
        "train_loss": sum(run.losses[c] * w for c, w in weights.items()) / sum(weights.values()),
        "eval": None,
        **run.tally.record(),
    }
    if observe is not None:
        updates, broadcasts = zip(*run.trained, strict=True)
        record |= observe(Observation(method, run.before, run.state, updates, broadcasts, standing.client_states))
    seen = {**standing.seen, **{client.client_id: run.version for client in active}}
    return Standing(run.state, run.client_states, seen), record


class _Round:
    """A round as it goes: what its exchanges hand to each other, and what they leave behind."""

    def __init__(
        self,
        method: Method,
        work: Work,
        weighting: str,
        on_client: Callable[[Client, LocalResult, int], None] | None,
        observed: bool,
        standing: Standing,
    ) -> None:
        self.method, self.work, self.weighting = method, work, weighting
        self.on_client, self.observed = on_client, observed
        self.state = self.before = standing.state
        self.client_states, self.seen = dict(standing.client_states), standing.seen
        self.round_num = standing.state.round_num
        self.version = 0
        """Of the patches that the clients were sent."""
        self.partial = Partial()
        self.learnt: dict[str, LocalResult] = {}
        """What is held because the next exchange asks about it again."""
        self.losses: dict[str, float] = {}
        self.trained: list[tuple[Update, Broadcast]] = []
        self.tally = _Tally()

    def exchange(self, number: int, clients: Sequence[Client], again: bool) -> list[Client]:
        """Ask everyone and fold the answers; who answered well.

        Parameters
        ----------
        again
            The next exchange asks about the same answers.
        """
        exchange = self.method.exchanges[number]
        self.state = replace(self.state, exchange=number)
        self.partial, self.version = Partial(), self.state.patches.version if self.state.patches else 0
        told = _Told(self.method, self.state, self.client_states, self.seen, self.tally)
        held, self.learnt = self.learnt, {}
        if exchange.ask == "train":
            self.before = self.state
        if exchange.ask == "again":
            answers = told.ask(clients, held)
        else:
            answers = told.work(clients, self.work, self.round_num, exchange.ask == "gradient")
        answered: list[Client] = []
        for client, result, sent in answers:
            update = self._checked(exchange, client, result, sent, len(answered))
            if update is None:
                continue
            if again:
                self.learnt[client.client_id] = result
            answered.append(client)
            with self.tally.server():
                self.partial = exchange.fold.add(self.partial, update)
        return answered

    def _checked(
        self, exchange: Exchange, client: Client, result: LocalResult, sent: Broadcast, answered: int
    ) -> Update | None:
        """What leaves the site; none where something is wrong with it, which is then noted."""
        rejected, key = self.tally.rejected, client.client_id
        if exchange.ask != "again":
            problem = _problem(result.update, _expected(self.state, sent))
            if problem is not None:
                rejected[key] = problem
                return None
            self.tally.optimizer_bytes = max(self.tally.optimizer_bytes, result.optimizer_bytes)
        if exchange.ask == "train":
            self.losses[key] = result.train_loss
            if self.on_client is not None:
                self.on_client(client, result, answered + 1)
        weight = client.weight(self.weighting)
        began = time.perf_counter()
        update, kept = self.method.encode(result.update, sent, self.client_states.get(key))
        self.tally.client_seconds += time.perf_counter() - began
        update = replace(update, num_examples=weight)
        self.tally.bytes_up += payload_bytes(update)
        if not all(bool(torch.isfinite(t).all()) for t in payload_tensors(update)):
            # What was trained is finite, but a norm or a product of it need not be.
            rejected[key] = "what it sent holds NaN or infinity"
            return None
        if self.observed and exchange.ask == "train":
            self.trained.append((replace(result.update, num_examples=weight), sent))
        if kept is not None:
            self.client_states[key] = kept
        return update

    def finish(self) -> None:
        """The server's step of this exchange."""
        with self.tally.server(), self.tally.memory(self.state, self.partial):
            self.state, diagnostics = self.method.finish(self.state, self.partial)
        self.tally.diagnostics |= diagnostics


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
class _Told:
    """One exchange with its clients: those that ask for the same thing are sent the same thing, worked out once."""

    method: Method
    state: ServerState
    client_states: Mapping[str, ClientState]
    seen: Mapping[str, int]
    tally: _Tally
    made: dict[Request, Broadcast] = field(default_factory=dict)

    def work(self, clients: Sequence[Client], work: Work, round_num: int, gradient: bool) -> Iterator[_Answer]:
        """What everyone learns from where it starts, or its gradient there, a window of clients at a time."""
        for start in range(0, len(clients), WINDOW):
            window: list[tuple[Client, Broadcast]] = []
            for client in clients[start : start + WINDOW]:
                own = self.client_states.get(client.client_id)
                sent = self.method.start(self.broadcast(client), own)
                recipe = replace(sent.recipe, gradient=gradient)
                window.append((client, sent if recipe == sent.recipe else replace(sent, recipe=recipe)))
            began = time.perf_counter()
            for (client, broadcast), (result, seconds) in zip(window, work(window, round_num), strict=True):
                self.tally.train_wall_seconds += time.perf_counter() - began
                self.tally.client_seconds += seconds
                yield client, result, broadcast
                began = time.perf_counter()

    def ask(self, clients: Sequence[Client], learnt: Mapping[str, LocalResult]) -> Iterator[_Answer]:
        """What everyone has learnt before, beside another question about it."""
        for client in clients:
            yield client, learnt[client.client_id], self.broadcast(client)

    def broadcast(self, client: Client) -> Broadcast:
        """What this client is sent."""
        request = Request(client.rank, self.seen.get(client.client_id, 0))
        if request not in self.made:
            with self.tally.server():
                self.made[request] = self.method.broadcast(self.state, request)
        broadcast = self.made[request]
        self.tally.bytes_down += broadcast_bytes(broadcast)
        return broadcast


def _too_few(round_num: int, valid: int, wanted: int, rejected: Mapping[str, str]) -> str:
    first = next((f": {client}: {reason}" for client, reason in rejected.items()), "")
    return (
        f"round {round_num + 1}: {valid} valid updates, federation.min_success = {wanted}; "
        f"{len(rejected)} rejected{first}"
    )


def _expected(state: ServerState, sent: Broadcast) -> dict[str, torch.Size]:
    """The shapes of what training, or a gradient, comes to."""
    if sent.recipe.gradient:
        return {f"{name}/gradient": torch.Size(shape) for name, shape in state.template.modules.items()}
    expected = {f"{name}/{part}": t.shape for name, f in sent.adapter.items() for part, t in parts(f)}
    return expected | {name: t.shape for name, t in sent.dense.items()}


def _problem(update: Update, expected: Mapping[str, torch.Size]) -> str | None:
    """What is wrong with an update, or none."""
    got = {f"{name}/{part}": t for name, payload in update.modules.items() for part, t in parts(payload)}
    got |= dict(update.dense)
    if got.keys() != expected.keys():
        return f"names {sorted(got.keys() ^ expected.keys())[0]}, which was not asked for or is missing"
    for name, value in got.items():
        if value.shape != expected[name]:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(expected[name])}"
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds NaN or infinity"
    return None
