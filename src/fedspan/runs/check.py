"""Facts about a run before it trains: data, clients, model, traffic, memory, and a time from timed steps.

Everything that a run refuses from settings, data and base is refused here by the same code. Then one round is conducted
with the first client of every rank, a single step each, in a folder that is removed again: its messages are as large as
those of a real round, and a second piece of work with more steps tells the time of a step from that of a start.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.client.executors import num_worker_processes
from fedspan.client.grouping import plan
from fedspan.client.training import Assignment, LocalResult
from fedspan.config import Config, with_absolute_paths
from fedspan.federation import requirements
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Answer, BroadcastFor, Question, Summed
from fedspan.federation.rounds import RunState, conduct
from fedspan.federation.simulated import SimulatedClients
from fedspan.methods.messages import Broadcast, ClientState
from fedspan.models.quantised import base_size
from fedspan.privacy.ledgers import ClientLedger
from fedspan.privacy.sum_layout import SumLayout
from fedspan.runs import events
from fedspan.runs.context import RunContext
from fedspan.runs.execution import new_folder
from fedspan.runs.loop import FEDERATION, MethodRun
from fedspan.runs.simulated_work import SimulatedWork, steps_of
from fedspan.runs.tracking import check_trackers
from fedspan.support.activity import report
from fedspan.support.files import StrPath
from fedspan.support.peak_memory import peak_memory, reset_peak_memory
from fedspan.wire.precision import Precision
from fedspan.wire.sizes import broadcast_bytes

_MOST_RANKS = 8
"""Clients in the round that is tried."""
_MORE_STEPS = 3


@dataclass(frozen=True, slots=True)
class RunCheck:
    """A run as it would be. Sizes in bytes, times in seconds; those of one round are of the expected number of clients.

    Times are estimates from this machine as busy as it is now, and from one process; `workers` share them at best.
    """

    data: Mapping[str, Any]
    """The rows of every split and the classes."""
    clients: tuple[tuple[str, int, int], ...]
    """Name, rank and training examples of every client."""
    clients_a_round: float
    """Expected number of clients that take part in a round."""
    rounds: int
    method: str
    model: str
    base_parameters: int
    trained_parameters: int
    """Of the client of largest rank."""
    engine: str
    reason: str | None
    """The reason for the engine, where there is one."""
    workers: int
    device: str
    """The device of the local work, or all those that the base's layers lie on."""
    bytes_up: float
    """In the first round, from all of its clients to the server."""
    bytes_down: float
    client_memory: int
    """Of one process: the base, and what a step of the tried clients added at its peak."""
    server_memory: int
    """Of the server's step, beside the base; grows with the number of clients where the method collects updates."""
    client_steps: float
    """Optimizer steps of all clients in all rounds, with those of the control that trains every client alone."""
    step_seconds: float
    """Time of one client's step, in a pass as wide as the run's."""
    evaluation_seconds: float
    """Time of all evaluations on the test data."""
    server_seconds: float
    """Time of the server's steps of all rounds."""
    notes: tuple[str, ...]
    """Lines on how base and data were read where that may surprise."""

    @property
    def seconds(self) -> float:
        """Return the estimated time of the whole run."""
        shared = self.client_steps * self.step_seconds + self.evaluation_seconds
        return shared / max(1, self.workers) + self.server_seconds


def check(config: Config, out: StrPath | None = None) -> RunCheck:
    """Return what can be known of a run before it trains; nothing is left on the disk.

    Parameters
    ----------
    out
        The run folder that would be made; none: a new one under `runs`.

    Raises
    ------
    FedspanError
        For everything that `fedspan.run` would refuse before any training, and for a first step that fails.
    """
    new_folder(config, out)
    check_trackers(config)
    config = with_absolute_paths(config)
    requirements.chosen(config)  # the settings as they are: below, the number of processes is another
    # Here the work is done in this process, which can be timed and measured.
    here = config.model_copy(update={"engine": config.engine.model_copy(update={"workers": 1})})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        method = requirements.chosen(here, ClientLedger(folder, config.privacy, config.federation.participation))
        context = RunContext.prepare(here, method, folder, events.ignore)
        with closing(context):
            return _Trial(context, MethodRun.open(context, FEDERATION, method, context.clients), config).checked()


@dataclass(slots=True)
class _Trial:
    """A run that is tried for one step in this process."""

    context: RunContext
    main: MethodRun
    config: Config
    """The settings of the run itself."""

    def checked(self) -> RunCheck:
        """Try one round and time a few steps."""
        context, config = self.context, self.config
        cohort = self.main.first_cohort() or context.clients
        report("trying one round with a client of every rank")
        before = reset_peak_memory()
        record, watched = self._tried(self._one_of_each_rank(cohort if context.method.info.pooled else context.clients))
        stepped = max(0, peak_memory() - before)
        report("timing a few steps")
        step_seconds = self._step_seconds(cohort, watched.started)
        evaluations = self._evaluations()
        engine, rounds = self.main.engine_used(), config.federation.rounds
        expected = len(cohort) if context.method.info.pooled else context.sampler.expected_size(len(context.clients))
        share = expected / len(context.clients)
        num_tasks = max(math.ceil(expected), -(-len(context.data["test"]) // config.evaluation.batch_size))
        workers = num_worker_processes(config.engine, config.threads, context.device, num_tasks)
        devices = dict.fromkeys(context.model.places.values()) or [context.device]
        return RunCheck(
            data=context.described,
            clients=tuple((c.client_id, c.rank, len(c.indices)) for c in context.clients),
            clients_a_round=expected,
            rounds=rounds,
            method=context.method.info.title,
            model=config.model.name,
            base_parameters=base_size(context.model.model)[0],
            trained_parameters=self._trained_parameters(),
            engine=engine.name,
            reason=engine.reason,
            workers=workers,
            device=" and ".join(map(str, devices)),
            bytes_up=share * watched.of_all(watched.up, context.clients),
            bytes_down=share * watched.of_all(watched.down, context.clients),
            client_memory=_held(context) + stepped,
            server_memory=int(record["peak_server_bytes"]),
            client_steps=self._client_steps(expected),
            step_seconds=step_seconds,
            evaluation_seconds=evaluations * self._evaluation_seconds(),
            server_seconds=float(record["server_seconds"]) * rounds,
            notes=context.notes,
        )

    def _one_of_each_rank(self, cohort: Sequence[Client]) -> list[Client]:
        """Return the first client of every rank (of many, of some between the extremes), and as many as a sum needs."""
        first = {client.rank: client for client in reversed(cohort)}
        ranks = sorted(first)
        places = np.linspace(0, len(ranks) - 1, min(len(ranks), _MOST_RANKS)).astype(int)
        chosen = [first[ranks[place]] for place in places]
        rest = [client for client in cohort if client not in chosen]
        total = self.context.total
        least = total.least if total is not None and total.masked else 1
        return chosen + rest[: max(0, least - len(chosen))]

    def _work(self, steps: Mapping[str, int]) -> SimulatedWork:
        weighting = self.config.federation.weighting
        return SimulatedWork(self.context.executor, self.main.engine.name, weighting, steps, self.main.budget)

    def _tried(self, chosen: Sequence[Client]) -> tuple[Mapping[str, Any], _Watched]:
        """Conduct a round of one step; return its record, and the sizes of its messages."""
        context, config = self.context, self.config
        work = self._work({client.client_id: 1 for client in chosen})
        precision = Precision("float32" if context.total else config.wire.up, config.wire.down)
        weighting = config.federation.weighting
        sites = _Watched(
            SimulatedClients(context.method, work, {}, weighting=weighting, precision=precision, total=context.total)
        )
        state = RunState(self.main.start.state)
        sums = context.total is not None and not (context.method.info.pooled or context.method.info.alone)
        _, record = conduct(context.method, state, chosen, sites, sums=sums)
        return record, sites

    def _trained_parameters(self) -> int:
        model = self.context.model
        adapter = sum(f.a.numel() + f.b.numel() for f in model.adapter().values())
        return adapter + sum(p.numel() for p in model.dense_parameters.values())

    def _client_steps(self, expected: float) -> float:
        """Return the steps of all rounds: the federation's, and those of the control that trains everyone alone."""
        context, config = self.context, self.config
        steps = steps_of(config.local, context.clients)
        mean = sum(steps.values()) / len(steps)
        controls = config.evaluation.local and not context.method.info.alone
        # The control is on the same schedule, so as many clients take part in its rounds.
        in_round = context.sampler.expected_size(len(context.clients)) if context.method.info.pooled else expected
        return config.federation.rounds * mean * in_round * (2 if controls else 1)

    def _step_seconds(self, cohort: Sequence[Client], started: Mapping[int, Broadcast]) -> float:
        """Return the seconds of one client's step in the first group of clients that share a pass."""
        context = self.context
        training = context.executor.context.training.with_engine(self.main.engine.name)
        cohort = [client for client in cohort if client.rank in started]
        works = [Assignment(c.client_id, started[c.rank], c.indices, _MORE_STEPS, 1.0) for c in cohort]
        chosen = [cohort[i] for i in plan(context.model, context.data["train"], works, training)[0]]

        def seconds(steps: int) -> float:
            work = self._work({client.client_id: steps for client in chosen})
            began = time.perf_counter()
            list(work([(client, started[client.rank]) for client in chosen], 0))
            return time.perf_counter() - began

        if context.executor.context.training.privacy.dp == "example":
            return seconds(1) / len(chosen)  # a second piece of work about the same rows would be another release
        seconds(1)  # The first steps of a process take longer.
        few, many = seconds(1), seconds(1 + _MORE_STEPS)
        return max(many - few, 0.0) / _MORE_STEPS / len(chosen)

    def _evaluations(self) -> float:
        """Return how many times as many rows as in the test data are evaluated: for the base, after rounds (with all
        validation rows), at the end, and for the clients that trained alone."""
        config, context = self.config, self.context
        most = config.evaluation.max_examples
        num_rows = len(context.data["test"])
        part = 1.0 if most is None else min(1.0, most / num_rows)
        alone = len(context.clients) if config.evaluation.local and not context.method.info.alone else 0
        validation = 0 if context.method.info.personalised else len(context.data.get("validation", ()))
        between = config.federation.rounds // config.evaluation.every * (part + validation / num_rows)
        return float(config.evaluation.base) + between + 1 + alone

    def _evaluation_seconds(self) -> float:
        """Return the seconds of an evaluation on all test rows, from one batch of them."""
        num_rows = len(self.context.data["test"])
        tried = np.linspace(0, num_rows - 1, min(num_rows, self.config.evaluation.batch_size)).astype(int)
        # The first evaluation of a process takes longer, whatever its size.
        self.context.evaluate([self.context.evaluation_task(self.main.initial(), rows=tried[:1])])
        task = self.context.evaluation_task(self.main.initial(), rows=tried)
        began = time.perf_counter()
        self.context.evaluate([task])
        return (time.perf_counter() - began) * num_rows / len(tried)


class _Watched:
    """Clients of which the sizes of all messages are noted, and what they started to train from."""

    def __init__(self, sites: SimulatedClients) -> None:
        self.sites, self.work = sites, sites.work
        sites.work = self._training
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()
        self.started: dict[int, Broadcast] = {}
        """By rank."""
        self.ranks: dict[str, int] = {}

    def ask(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """Yield the answers, noting their sizes."""
        for answer in self.sites.ask(question, clients, self._noted(broadcast_for)):
            self.up[answer.client.client_id] += answer.bytes_up
            yield answer

    def sum(
        self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor, layout: SumLayout
    ) -> Summed:
        """Return the sum, noting the sizes of its parts."""
        summed = self.sites.sum(question, clients, self._noted(broadcast_for), layout)
        self.up.update({answer.client.client_id: answer.bytes_up for answer in summed.answers})
        return summed

    def states(self) -> Mapping[str, ClientState]:
        """Return the clients' states."""
        return self.sites.states()

    def costs(self) -> Mapping[str, Any]:
        """Return nothing: no message was sent."""
        return {}

    def of_all(self, sizes: Mapping[str, int], clients: Sequence[Client]) -> float:
        """Return the bytes of all these clients; those of ranks that were not tried lie between those that were."""
        known = {rank: sizes[client_id] for client_id, rank in self.ranks.items()}
        ranks = sorted(known)
        return float(np.interp([c.rank for c in clients], ranks, [known[rank] for rank in ranks]).sum())

    def _noted(self, broadcast_for: BroadcastFor) -> BroadcastFor:
        def noted(client: Client) -> Broadcast:
            sent = broadcast_for(client)
            self.ranks[client.client_id] = client.rank
            self.down[client.client_id] += broadcast_bytes(sent)
            return sent

        return noted

    def _training(
        self, window: Sequence[tuple[Client, Broadcast]], round_num: int
    ) -> Iterable[tuple[LocalResult, float]]:
        self.started |= {client.rank: sent for client, sent in window}
        return self.work(window, round_num)


def _held(context: RunContext) -> int:
    """Return the bytes of the base and its adapters in memory."""
    return sum(p.numel() * p.element_size() for p in context.model.model.parameters())
