"""A federation on one machine: the data, the model and the clients in memory, one checkpoint after every round."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspan.runs import checkpoint
from fedspan.client import cohort
from fedspan.support import parallel
from fedspan.runs.checkpoint import Checkpoint
from fedspan.support.files import write_bytes
from fedspan.config import Config, LocalConfig
from fedspan.server.coordinator import Coordinator
from fedspan.data import Encoded
from fedspan.data import load as load_data
from fedspan.federation.requirements import client_account
from fedspan.diagnostics.measure import measure
from fedspan.federation.clients import Client, make_clients, pooled
from fedspan.federation.sampling import ClientSampler, create_sampler
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Request
from fedspan.models import FederatedModel
from fedspan.models.quantised import base_size
from fedspan.wire.precision import Precision
from fedspan.wire.transport import Transport
from fedspan.client.setup import base_model, device_of, encoded
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.spending import Examples, secret_of
from fedspan.privacy.summing import Sum
from fedspan.robust import screen
from fedspan.federation.rounds import RunState, conduct
from fedspan.federation.exchange import WINDOW, Answer
from fedspan.federation.simulated import SimulatedClients
from fedspan.client.training import Assignment, LocalResult, num_steps
from fedspan.client.executors import Executor, EvaluationTask, WorkContext, create_executor, num_worker_processes
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for a display to show."""

    kind: str
    data: Mapping[str, Any]


OnEvent = Callable[[Event], None]


@dataclass(slots=True)
class Job:
    """A run's data, model and clients in memory. The folder alone says how far it has come."""

    config: Config
    method: Method
    out: Path
    on_event: OnEvent
    clients: list[Client]
    model: FederatedModel
    initial_dense: Mapping[str, torch.Tensor]
    """Heads and trained weights of the untouched base."""
    processor: Any
    data: Mapping[str, Encoded]
    """`train`, `test`, and `unseen` where there is any."""
    metrics: tuple[str, ...]
    executor: Executor
    sampler: ClientSampler
    num_workers: int
    coordinator: Coordinator | None = None
    """Of a federation whose clients are elsewhere."""
    total: Sum | None = None
    """How sums are taken, where nothing but sums may be known."""
    secret: Callable[[], int] | None = None
    """The server's, which noise and coins are drawn from."""
    examples: Examples | None = None
    """What simulated clients have spent of their examples' privacy."""

    @classmethod
    def prepare(cls, config: Config, method: Method, out: Path, on_event: OnEvent, transport: Transport | None = None) -> Job:
        """Read everything that a run needs.

        Parameters
        ----------
        transport
            Through which the clients are reached; none: they are simulated here.

        Raises
        ------
        ValueError
            For anything that can be known to be wrong before training.
        """
        torch.set_num_threads(config.threads)
        corpus = load_data(config.data, config.seed)
        coordinator = None
        if transport is None:
            clients = make_clients(config, corpus)
        else:
            coordinator = Coordinator(transport, config, method, out, lambda line: on_event(Event("site", {"line": line})))
            clients = coordinator.gather()
        secret = secret_of(out)
        sampler = create_sampler(config.federation, config.seed, config.privacy.dp, secret)
        drawn = max(1, round(sampler.expected_size(len(clients))))
        if config.federation.min_success > drawn and not method.info.pooled:
            raise FedspanError(
                f"federation.min_success = {config.federation.min_success}, but only {drawn} clients are sampled per round"
            )
        processor, data = encoded(config, corpus)
        device = device_of(config.device)
        num_workers = num_worker_processes(config, device, max(drawn, -(-len(data["test"]) // config.evaluation.batch_size)))
        model = base_model(
            config,
            method,
            corpus,
            data,
            max_rank=max(client.rank for client in clients),
            device=device if num_workers == 1 else torch.device("cpu"),
        )
        initial = model.dense()
        if coordinator is not None:
            shapes = {name: list(shape) for name, shape in model.modules().items()}
            shapes |= {f"dense {name}": list(t.shape) for name, t in initial.items()}
            clients = coordinator.agree(model.digest(), shapes, initial, clients)
        return cls(
            config=config,
            method=method,
            out=out,
            on_event=on_event,
            clients=clients,
            model=model,
            initial_dense=initial,
            processor=processor,
            data=data,
            metrics=corpus.metrics,
            executor=create_executor(WorkContext(config, model, data, processor, corpus.metrics), num_workers, device),
            num_workers=num_workers,
            coordinator=coordinator,
            total=_total(config),
            sampler=sampler,
            secret=secret,
            examples=Examples(config, out) if config.privacy.dp == "example" and transport is None else None,
        )

    def emit(self, kind: str, **data: Any) -> None:
        """Tell the display."""
        self.on_event(Event(kind, data))

    def announce(self, main: Federation) -> None:
        """The `start` event: what is about to run."""
        engine, reason = main.engine_used()
        adapter = sum(f.a.numel() + f.b.numel() for f in self.model.adapter().values())
        dense = sum(p.numel() for p in self.model.dense_parameters.values())
        self.emit(
            "start",
            method=self.method.info.title,
            task=self.config.data.task,
            metric=self.metrics[0],
            model=self.config.model.name,
            num_clients=len(self.clients),
            ranks=[client.rank for client in self.clients],
            rounds=self.config.federation.rounds,
            out=str(self.out),
            base_parameters=base_size(self.model.model)[0],
            trained_parameters=adapter + dense,
            engine=engine,
            reason=reason,
            workers=self.num_workers,
        )

    def federation(self, phase: str, method: Method, clients: list[Client]) -> Federation:
        """`method` over `clients`, from its checkpoint where there is one.

        Raises
        ------
        ValueError
            When the method does not fit the model, or the engine that was asked for does not fit the method.
        """
        rank = max(client.rank for client in clients)
        c = self.config
        template = self.model.template(rank, c.adapter.alpha, c.adapter.rslora, c.seed, len(self.clients))
        initial = Checkpoint(method.init(template, self.initial_dense))
        recipe = method.broadcast(initial.state, Request(None)).recipe
        self.model.check(recipe)
        engine, reason = c.engine.name if self.coordinator is None else "sites", None
        if engine not in ("sequential", "sites"):
            reason = cohort.applies(self.model, self.data["train"], recipe, c)
        if reason is not None:
            if engine == "cohort":
                raise FedspanError(f"engine.name = 'cohort': {reason}; expected auto or sequential")
            engine = "sequential"
        path = self.out / "checkpoint" / f"{phase}.safetensors"
        saved = checkpoint.read(path) if path.exists() else initial
        return Federation(self, phase, method, clients, path, initial, saved, engine, reason)

    def evaluation_task(
        self, broadcast: Broadcast, whole: bool = True, split: str = "test", rows: np.ndarray | None = None
    ) -> EvaluationTask:
        """What judges a broadcast: the test data, unless told otherwise.

        Parameters
        ----------
        whole
            All of it, not the part that `evaluation.max_examples` allows between rounds.
        """
        most = self.config.evaluation.max_examples
        if not whole and most is not None:
            given = np.arange(len(self.data[split])) if rows is None else rows
            if most < len(given):
                # Spread over the data, which may be sorted by task.
                rows = given[[int(i * len(given) / most) for i in range(most)]]
        return EvaluationTask(broadcast, split, rows)

    def evaluate(self, evaluation_tasks: Iterable[EvaluationTask]) -> list[dict[str, float]]:
        """The loss and metrics of every exam."""
        return self.executor.evaluate(list(evaluation_tasks))

    def close(self) -> None:
        """End every process that was started."""
        self.executor.close()


@dataclass(slots=True)
class Federation:
    """One method over one set of clients, checkpointed after every round."""

    job: Job
    phase: str
    method: Method
    clients: list[Client]
    path: Path
    start: Checkpoint
    saved: Checkpoint
    engine: str
    """What the local work is done by: `auto`, which is the cohort where it is faster, `cohort`, `sequential`, or
    `sites`, which do it themselves."""
    reason: str | None
    """Why it is not the cohort, where that was not wished."""

    def initial(self) -> Broadcast:
        """What the untouched base is to this method: the state before the first round."""
        return self.method.broadcast(self.start.state, Request(None))

    def engine_used(self) -> tuple[str, str | None]:
        """`cohort`, `sequential` or `sites` as the first round will have it, and why not the cohort where it was not
        refused."""
        if self.engine in ("sequential", "sites"):
            return self.engine, self.reason
        config, data = self.job.config, self.job.data["train"]
        drawn = pooled(self.clients) if self.method.info.pooled else self._drawn(0)
        sent = {rank: self.method.broadcast(self.start.state, Request(rank)) for rank in {c.rank for c in drawn}}
        work = [
            Assignment(c.client_id, sent[c.rank], c.indices, num_steps(config.local, len(c.indices)), 1.0)
            for c in drawn
        ]
        if self.engine == "cohort" or any(len(group) > 1 for group in cohort.plan(self.job.model, data, work, config)):
            return "cohort", None
        return "sequential", "one client takes part" if len(drawn) == 1 else "one client fills a pass over this model"

    def note(self, notes: Mapping[str, Any]) -> None:
        """Keep what was measured outside the rounds."""
        self.saved = replace(self.saved, notes=notes)
        checkpoint.write(self.path, self.saved)

    def advance(self, rounds: int) -> None:
        """The rounds that are still missing."""
        done = self.saved.state.round_num
        self.job.emit("phase", phase=self.phase, total=rounds, done=done)
        self._write_history()
        for round_num in range(done, rounds):
            spent = self._overspent(round_num)
            if spent is not None:
                self.job.emit("budget", line=spent)
                break
            self._one_round(round_num, last=round_num + 1 == rounds)

    def _one_round(self, round_num: int, last: bool) -> None:
        job, config = self.job, self.job.config
        cohort = self._cohort(round_num)

        def on_answer(answer: Answer, done: int) -> None:
            job.emit(
                "client",
                phase=self.phase,
                round_num=round_num + 1,
                client_id=answer.client.client_id,
                done=done,
                cohort=len(cohort),
                train_loss=None if math.isnan(answer.train_loss) else answer.train_loss,
            )

        saved = self.saved
        wanted = config.evaluation.diagnostics
        if wanted == "auto":
            hidden = job.total is not None or config.privacy.dp != "none"  # it looks at every client's own update
            wanted = self.method.info.trains == "adapter" and len(cohort) <= WINDOW and not hidden
        observed = wanted and self.phase == "federation" and job.coordinator is None
        controlled = self.method.info.pooled or self.method.info.alone
        # The workers have nothing to do while the server works.
        with parallel.threads(job.num_workers * config.threads):
            run_state, record = conduct(
                self.method,
                RunState(saved.state, saved.client_states, saved.seen, saved.counted),
                cohort,
                job.coordinator or self._here(cohort),
                min_success=self._fewest(),
                sums=job.total is not None and not controlled,
                screen=screen(config, self.method),
                on_answer=on_answer,
                observe=partial(measure, base=job.initial_dense) if observed else None,
            )
        self.saved = replace(
            saved,
            state=run_state.state,
            client_states=run_state.client_states,
            seen=run_state.seen,
            counted=run_state.counted,
        )
        record |= self._spent(round_num + 1)
        every = config.evaluation.every
        due = self.phase == "federation" and (last or (round_num + 1) % every == 0)
        if due and self.method.info.personalised:
            record["eval"] = self.personal_metrics() if last and job.coordinator is None else None
        else:
            full = self.method.broadcast(run_state.state, Request(None)) if due else None
            record["eval"] = job.evaluate([job.evaluation_task(full, whole=False)])[0] if full is not None else None
        self.saved = replace(self.saved, history=(*saved.history, record))
        checkpoint.write(self.path, self.saved)
        self._write_history()
        job.emit("round", phase=self.phase, record=record)

    def _cohort(self, round_num: int) -> list[Client]:
        """Who takes part in a round."""
        if self.method.info.pooled:
            return pooled(self.clients)
        drawn = self._drawn(round_num)
        if self.job.coordinator is not None:
            return self.job.coordinator.draw(drawn, self.clients, round_num)
        if self.job.examples is None or self.phase != "federation":
            return drawn
        local = self.job.config.local
        able = [c for c in drawn if self.job.examples.allows(c.client_id, *_amount(c, local))]
        if len(able) < len(drawn):
            self.job.emit("budget", line=f"{len(drawn) - len(able)} clients have spent their privacy budget")
        return able

    def _drawn(self, round_num: int) -> list[Client]:
        return [self.clients[i] for i in self.job.sampler.draw(len(self.clients), round_num)]

    def _fewest(self) -> int:
        """Valid answers that a round needs."""
        config = self.job.config
        if self.method.info.pooled:
            return 1
        # How many came must not decide anything where it is nobody's business who is in a round.
        return 0 if config.privacy.dp == "client" and self.phase == "federation" else config.federation.min_success

    def _overspent(self, round_num: int) -> str | None:
        """Why a round may not begin, where the clients' privacy does not allow it."""
        privacy = self.job.config.privacy
        if self.phase != "federation" or privacy.epsilon is None:
            return None
        if privacy.dp == "client":
            account = client_account(self.method, self.job.config)
            if account.allows(round_num):
                return None
            return f"the privacy budget of {privacy.epsilon:g} is spent after {round_num} rounds"
        if self.job.examples is None or self._cohort(round_num):
            return None
        return f"all clients of round {round_num + 1} have spent their privacy budget of {privacy.epsilon:g}"

    def _spent(self, rounds: int) -> dict[str, float]:
        """What the run has cost of its clients' privacy by now, for a round's record."""
        if self.phase != "federation" or self.job.config.privacy.dp == "none":
            return {}
        if self.job.examples is not None:
            return {"epsilon": self.job.examples.spent()}
        if self.job.config.privacy.dp == "example":
            return {}  # the sites keep their own ledgers
        return {"epsilon": client_account(self.method, self.job.config).spent(rounds)}

    def _here(self, cohort: Sequence[Client]) -> SimulatedClients:
        """The clients of this process."""
        job, config = self.job, self.job.config
        steps = {c.client_id: num_steps(config.local, len(c.indices)) for c in cohort}
        if self.method.info.pooled:
            drawn = self._drawn(self.saved.state.round_num)
            steps = {cohort[0].client_id: sum(num_steps(config.local, len(c.indices)) for c in drawn)}

        def work(window: Sequence[tuple[Client, Broadcast]], number: int) -> Iterable[tuple[LocalResult, float]]:
            assignments = [
                Assignment(
                    c.client_id,
                    sent,
                    c.indices,
                    steps[c.client_id],
                    c.weight(config.federation.weighting),
                    self._charged(c, steps[c.client_id]),
                )
                for c, sent in window
            ]
            return job.executor.train(assignments, number, self.engine)

        return SimulatedClients(
            self.method,
            work,
            self.saved.client_states,
            weighting=config.federation.weighting,
            precision=Precision("float32" if job.total else config.wire.up, config.wire.down),
            total=job.total,
        )

    def _charged(self, client: Client, steps: int) -> int | None:
        """The secret of a client that trains by DP-SGD, whose ledger counts the work first; the controls release
        nothing that anybody sees."""
        if self.job.examples is None:
            return None
        if self.phase != "federation":
            return 0
        return self.job.examples.charge(client.client_id, len(client.indices), steps)

    def personal_metrics(self, own_data: bool = False) -> dict[str, float]:
        """The mean over the clients of what each one's own model scores on everybody's test data.

        Parameters
        ----------
        own_data
            On the client's own held-out data instead, over the clients that have some.
        """
        kept, sent = self.saved.client_states, {}
        figures: list[dict[str, float]] = []
        clients = [client for client in self.clients if len(client.holdout) or not own_data]
        for start in range(0, len(clients), WINDOW):
            evaluation_tasks: list[EvaluationTask] = []
            for client in clients[start : start + WINDOW]:
                if client.rank not in sent:
                    sent[client.rank] = self.method.broadcast(self.saved.state, Request(client.rank))
                own = self.method.start(sent[client.rank], kept.get(client.client_id))
                split, rows = ("train", client.holdout) if own_data else ("test", None)
                evaluation_tasks.append(self.job.evaluation_task(own, whole=own_data, split=split, rows=rows))
            figures += self.job.evaluate(evaluation_tasks)
        return mean_figures(figures)

    def _write_history(self) -> None:
        if self.phase == "federation":
            lines = [to_json(record) + "\n" for record in self.saved.history]
            write_bytes(self.job.out / "metrics.jsonl", "".join(lines).encode())


def _amount(client: Client, local: LocalConfig) -> tuple[int, int]:
    """Examples, and steps of a round."""
    return len(client.indices), num_steps(local, len(client.indices))


def _total(config: Config) -> Sum | None:
    """How this run takes its sums; none: updates are folded as they are."""
    p = config.privacy
    if not p.secure_sums and not p.fixed_point:
        return None
    return Sum(FixedPoint(p.fraction_bits), p.secure_sums, p.threshold, str(config.seed))


def to_json(value: object, indent: int | None = None) -> str:
    """Standard JSON, which has no word for NaN or infinity: a diverged run's figures are written as null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), indent=indent)


def mean_figures(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The plain mean of every metric."""
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}
