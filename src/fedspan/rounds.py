"""One round of federation as a function, whoever carries the messages."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedspan.federation import Client
from fedspan.lowrank import LowRank
from fedspan.methods.base import Method, ServerState
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, ClientState, Factors, Request, Update, Vector
from fedspan.methods.patches import Patch
from fedspan.train import LocalResult

WINDOW = 64
"""Clients that are told to start at once. It bounds what a round holds beside the server's own fold, however many
clients take part; within it the work is grouped, and spread over processes, as whoever does it likes."""

Work = Callable[[Sequence[tuple[Client, Broadcast]], int], Iterable[tuple[LocalResult, float]]]
"""(clients and what each starts from, round) -> what each learnt, in that order, and the busy seconds it took.

Results are taken one by one, so that a generator need not hold them all. Raises nothing for a bad update: that is
checked here."""


_Answer = tuple[Client, LocalResult, Broadcast]


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
    state, round_num = standing.state, standing.state.round_num
    client_states, seen = dict(standing.client_states), dict(standing.seen)
    tally = _Tally()
    losses: dict[str, float] = {}
    learnt: dict[str, LocalResult] = {}
    active = sorted(cohort, key=lambda c: c.client_id)
    for number, exchange in enumerate(method.exchanges):
        # What a client learnt is held for as long as the round has something more to ask of it.
        again = any(not later.train for later in method.exchanges[number + 1 : number + 2])
        partial = Partial()
        answered: list[Client] = []
        told = _Told(method, state, client_states, seen, tally)
        answers = told.train(active, work, round_num) if exchange.train else told.ask(active, learnt)
        learnt = {}
        for client, result, broadcast in answers:
            if exchange.train:
                problem = _problem(result.update, broadcast)
                if problem is not None:
                    tally.rejected[client.client_id] = problem
                    continue
                losses[client.client_id] = result.train_loss
                if on_client is not None:
                    on_client(client, result, len(answered) + 1)
            began = time.perf_counter()
            update, kept = method.encode(result.update, broadcast, client_states.get(client.client_id))
            tally.client_seconds += time.perf_counter() - began
            update = replace(update, num_examples=client.weight(weighting))
            tally.bytes_up += _payload_bytes(update)
            if not all(bool(torch.isfinite(t).all()) for t in _payload_tensors(update)):
                # What was trained is finite, but a norm or a product of it need not be.
                tally.rejected[client.client_id] = "what it sent holds NaN or infinity"
                continue
            if kept is not None:
                client_states[client.client_id] = kept
            if again:
                learnt[client.client_id] = result
            answered.append(client)
            with tally.server():
                partial = exchange.fold.add(partial, update)
        active = answered
        if len(active) < max(1, min_success):
            raise RoundFailed(_too_few(round_num, len(active), min_success, tally.rejected))
        with tally.server(), tally.memory(state, partial):
            version = state.patches.version if state.patches else 0
            state, diagnostics = method.finish(state, partial)
            tally.diagnostics |= diagnostics
    seen |= {client.client_id: version for client in active}
    weights = {c.client_id: c.weight(weighting) for c in active}
    record = {
        "round_num": round_num + 1,
        "method": method.info.name,
        "num_clients": len(active),
        "train_loss": sum(losses[c] * w for c, w in weights.items()) / sum(weights.values()),
        "eval": None,
        **tally.record(),
    }
    return Standing(state, client_states, seen), record


@dataclass(slots=True)
class _Tally:
    """What the round costs, added up as it goes."""

    bytes_up: int = 0
    bytes_down: int = 0
    server_seconds: float = 0.0
    client_seconds: float = 0.0
    train_wall_seconds: float = 0.0
    peak_server_bytes: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def server(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.server_seconds += time.perf_counter() - began

    @contextmanager
    def memory(self, state: ServerState, partial: Partial) -> Iterator[None]:
        held = _state_bytes(state) + _partial_bytes(partial)
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

    def train(self, clients: Sequence[Client], work: Work, round_num: int) -> Iterator[_Answer]:
        """What everyone learns from where it starts, a window of clients at a time."""
        for start in range(0, len(clients), WINDOW):
            window: list[tuple[Client, Broadcast]] = []
            for client in clients[start : start + WINDOW]:
                own = self.client_states.get(client.client_id)
                window.append((client, self.method.start(self.broadcast(client), own)))
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


def _problem(update: Update, started: Broadcast) -> str | None:
    """What is wrong with an update, or none."""
    expected = {f"{name}/{part}": t for name, f in started.adapter.items() for part, t in (("a", f.a), ("b", f.b))}
    expected |= {name: t for name, t in started.dense.items()}
    got = {f"{name}/{part}": t for name in update.modules for part, t in _parts(update.factors(name))}
    got |= dict(update.dense)
    if got.keys() != expected.keys():
        return f"names {sorted(got.keys() ^ expected.keys())[0]}, which was not asked for or is missing"
    for name, value in got.items():
        if value.shape != expected[name].shape:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds NaN or infinity"
    return None


def _parts(f: Factors) -> tuple[tuple[str, torch.Tensor], ...]:
    return ("a", f.a), ("b", f.b)


def _bytes(tensors: Iterator[torch.Tensor] | Sequence[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _payload_tensors(update: Update) -> list[torch.Tensor]:
    tensors = list(update.dense.values())
    for payload in update.modules.values():
        tensors += list(payload.values.values()) if isinstance(payload, Vector) else [payload.a, payload.b]
    return tensors


def _payload_bytes(update: Update) -> int:
    return _bytes(_payload_tensors(update))


def broadcast_bytes(broadcast: Broadcast) -> int:
    """Bytes of the tensors that travel to one client: what it can derive from the seed or holds already does not."""
    total = 0 if "dense" in broadcast.seeded else _bytes(list(broadcast.dense.values()))
    for factors in broadcast.adapter.values():
        total += _bytes([t for part, t in _parts(factors) if part not in broadcast.seeded])
    return total + sum(_patch_bytes(patch) for patch in broadcast.news)


def _patch_bytes(patch: Mapping[str, Patch]) -> int:
    return sum(_bytes([p.b, p.a] if isinstance(p, LowRank) else [p]) for p in patch.values())


def _state_bytes(state: ServerState) -> int:
    total = _bytes(list(state.dense.values())) + sum(_bytes(list(t.values())) for t in state.modules.values())
    if state.patches:
        total += _patch_bytes(state.patches.total) + sum(_patch_bytes(x) for x in state.patches.increments)
    return total


def _partial_bytes(partial: Partial) -> int:
    total = _bytes(list(partial.dense.values())) + sum(_bytes(list(t.values())) for t in partial.sums.values())
    return total + sum(_payload_bytes(update) for update in partial.collected)


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> int:
    """Start a new measurement of the process's peak resident memory; its value now, in bytes."""
    if _CLEAR.exists() and os.access(_CLEAR, os.W_OK):
        # Memory that glibc's allocator only hoards would hide what is taken anew.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        _CLEAR.write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Peak resident memory since the last reset, in bytes; 0 on systems that do not tell."""
    if not _STATUS.exists():
        return 0
    line = next((x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024
