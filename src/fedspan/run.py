"""A whole run: the base, the federation, the control, and the folder that holds it all."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedspan import checkpoint, lowrank, methods
from fedspan.checkpoint import Checkpoint, write_bytes
from fedspan.config import Config, to_toml
from fedspan.config import load as load_config
from fedspan.data import Encoded, encode
from fedspan.data import load as load_data
from fedspan.evaluate import evaluate
from fedspan.federation import Client, make_clients, participants, pooled
from fedspan.lowrank import LowRank
from fedspan.methods.base import Broadcast, Factors, Method, Request, ServerState
from fedspan.metrics import METRICS
from fedspan.models import FederatedModel, build, load_processor, make_template
from fedspan.rounds import Standing, run_round
from fedspan.train import LocalResult, num_steps, train


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for a display to show."""

    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves behind."""

    out: Path
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    adapter: Path | None
    """The PEFT folder; none for full-weight methods, whose model is in `out / "model"`."""


OnEvent = Callable[[Event], None]


def _silent(event: Event) -> None:
    pass


def run(config: Config, out: Path | None = None, on_event: OnEvent = _silent) -> Result:
    """Run a federation into a new folder.

    Parameters
    ----------
    out
        The run folder; none: `runs/METHOD-TIME`.

    Raises
    ------
    ValueError
        For anything wrong with the configuration, the data or the model, before any training starts.
    """
    method = methods.create(config.method)
    folder = out or Path("runs") / f"{method.info.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"; `fedspan resume {folder}` goes on with it" if (folder / "config.toml").exists() else ""
        raise ValueError(f"{folder} exists and is not empty: expected a new folder{hint}")
    job = _Job.prepare(config, method, folder, on_event)
    write_bytes(folder / "config.toml", to_toml(config).encode())
    return job.execute()


def resume(out: Path, on_event: OnEvent = _silent) -> Result:
    """Go on with an interrupted run; it ends with the same bits as if it had never stopped.

    Raises
    ------
    ValueError
        When `out` holds no run.
    """
    if not (out / "config.toml").exists():
        raise ValueError(f"{out} holds no run (no config.toml): expected the folder of an earlier `fedspan run`")
    config = load_config(out / "config.toml")
    return _Job.prepare(config, methods.create(config.method), out, on_event).execute()


@dataclass(slots=True)
class _Job:
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
    train_data: Encoded
    test_data: Encoded
    unseen_data: Encoded | None
    metrics: tuple[str, ...]

    @classmethod
    def prepare(cls, config: Config, method: Method, out: Path, on_event: OnEvent) -> _Job:
        torch.set_num_threads(config.threads)
        corpus = load_data(config.data, config.seed)
        clients = make_clients(config, corpus)
        ranks = {client.rank for client in clients}
        if not method.info.hetero_rank and not method.info.pooled and len(ranks) > 1:
            able = [n for n in methods.METHODS if methods.METHODS[n]().info.hetero_rank]
            raise ValueError(
                f"{method.info.name} needs one rank for all clients, but federation.ranks gives {sorted(ranks)}; "
                f"methods that take mixed ranks: {', '.join(able)}"
            )
        processor = load_processor(config.model.name, corpus.kind)
        model = build(
            config.model.name,
            corpus.kind,
            trains=method.info.trains,
            num_labels=corpus.num_labels,
            target_modules=config.adapter.target_modules,
            max_rank=max(ranks),
            rslora=config.adapter.rslora,
            dropout=config.adapter.dropout,
            dtype=config.model.dtype,
            device=_device(config.device),
            seed=config.seed,
            label_names=corpus.label_names,
            regression=corpus.num_labels == 1,
        )
        return cls(
            config,
            method,
            out,
            on_event,
            clients,
            model,
            model.dense(),
            processor,
            encode(corpus.train, processor, config.data),
            encode(corpus.test, processor, config.data),
            encode(corpus.unseen, processor, config.data) if corpus.unseen is not None else None,
            corpus.metrics,
        )

    def execute(self) -> Result:
        """Everything that is still to be done, from wherever the folder stands."""
        began = time.perf_counter()
        self._announce()
        main = self._federation("federation", self.method, self.clients)
        notes = dict(main.saved.notes)
        if "base" not in notes:
            self._emit("phase", phase="base", total=1, done=0)
            if self.config.evaluation.base:
                notes["base"] = self._evaluate(main.initial(), whole=True)
                main.note(notes)
        main.advance(self.config.federation.rounds)
        local_metrics = self._local_control()
        self._emit("phase", phase="final", total=1, done=0)
        final = self._final(main)
        path = self._export(main.saved.state)
        summary = self._summary(main, notes.get("base"), local_metrics, final, time.perf_counter() - began)
        write_bytes(self.out / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
        self._emit("end", summary=summary)
        history = [dict(record) for record in main.saved.history]
        return Result(self.out, summary, history, path)

    def _emit(self, kind: str, **data: Any) -> None:
        self.on_event(Event(kind, data))

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.model.parameters())
        adapter = sum(f.a.numel() + f.b.numel() for f in self.model.adapter().values())
        dense = sum(p.numel() for p in self.model.dense_parameters.values())
        self._emit(
            "start",
            method=self.method.info.title,
            task=self.config.data.task,
            model=self.config.model.name,
            num_clients=len(self.clients),
            ranks=[client.rank for client in self.clients],
            rounds=self.config.federation.rounds,
            out=str(self.out),
            base_parameters=parameters - adapter,
            trained_parameters=adapter + dense,
        )

    def _federation(self, phase: str, method: Method, clients: list[Client]) -> _Federation:
        rank = max(client.rank for client in clients)
        c = self.config
        template = make_template(self.model, rank, c.adapter.alpha, c.adapter.rslora, c.seed)
        if method.info.trains != "adapter":
            template = replace(template, modules={})
        initial = Checkpoint(method.init(template, self.initial_dense))
        path = self.out / "checkpoint" / f"{phase}.safetensors"
        saved = checkpoint.read(path) if path.exists() else initial
        return _Federation(self, phase, method, clients, path, initial, saved)

    def _local_control(self) -> dict[str, float] | None:
        """Every client alone, on the same schedule; the mean of the clients' figures."""
        if not self.config.evaluation.local or self.method.info.personalised:
            return None
        control = methods.create({"name": "local", "trains": self.method.info.trains})
        local = self._federation("local", control, self.clients)
        local.advance(self.config.federation.rounds)
        return local.personal_metrics()

    def _evaluate(self, broadcast: Broadcast, whole: bool, data: Encoded | None = None) -> dict[str, float]:
        e = self.config.evaluation
        self.model.load(broadcast)
        examples = self.test_data if data is None else data
        if not whole and e.max_examples is not None and e.max_examples < len(examples):
            # Spread over the data, which may be sorted by task.
            step = len(examples) / e.max_examples
            examples = examples.subset([int(i * step) for i in range(e.max_examples)])
        return evaluate(
            self.model,
            examples,
            self.metrics,
            self.processor,
            batch_size=e.batch_size,
            max_new_tokens=e.max_new_tokens,
        )

    def _final(self, main: _Federation) -> dict[str, Any]:
        """What the clients end with, measured on the whole test data and on unseen data."""
        state, method = main.saved.state, self.method
        if method.info.personalised:
            return {"clients": main.personal_metrics()}
        found: dict[str, Any] = {}
        server = method.broadcast(state, Request(None))
        found["server"] = self._evaluate(server, whole=True)
        if self.unseen_data is not None:
            found["unseen"] = self._evaluate(server, whole=True, data=self.unseen_data)
        by_rank: dict[int, dict[str, float]] = {}
        ranks = sorted({client.rank for client in self.clients})
        if method.info.trains == "adapter" and not method.info.pooled and self.config.evaluation.per_rank:
            for rank in ranks:
                by_rank[rank] = self._evaluate(method.broadcast(state, Request(rank)), whole=True)
        if by_rank:
            found["per_rank"] = by_rank
            found["clients"] = _mean([by_rank[client.rank] for client in self.clients])
        else:
            found["clients"] = found["server"]
        own = [client for client in self.clients if len(client.holdout)]
        if own:
            found["own_data"] = _mean(
                [
                    self._evaluate(
                        method.broadcast(state, Request(c.rank)), whole=True, data=self.train_data.subset(c.holdout)
                    )
                    for c in own
                ]
            )
        return found

    def _export(self, state: ServerState) -> Path | None:
        """The result as other libraries read it: a PEFT adapter folder, or a whole model."""
        if self.method.info.personalised:
            return None
        broadcast = self.method.broadcast(state, Request(None))
        if self.method.info.trains != "adapter":
            self.model.load(broadcast)
            self.model.save_weights(self.out / "model", self.processor)
            return None
        path = self.out / "adapter"
        if not path.exists():
            self.model.save_adapter(path, merged_adapter(broadcast), broadcast.dense)
        return path

    def _summary(
        self,
        main: _Federation,
        base: Mapping[str, float] | None,
        local: Mapping[str, float] | None,
        final: Mapping[str, Any],
        wall: float,
    ) -> dict[str, Any]:
        metric = self.metrics[0]
        history = main.saved.history

        def headline(values: Mapping[str, float] | None) -> float | None:
            return None if values is None else values[metric]

        totals = {
            key: sum(record[key] for record in history)
            for key in ("bytes_up", "bytes_down", "server_seconds", "client_seconds")
        }
        return {
            "method": self.method.info.name,
            "options": {k: v for k, v in self.config.method.items() if k != "name"},
            "metric": metric,
            "higher_is_better": METRICS[metric].higher_is_better,
            "base": headline(base),
            "local": headline(local) if not self.method.info.personalised else headline(final["clients"]),
            "federated": headline(final["clients"]),
            "server": headline(final.get("server")),
            "unseen": headline(final.get("unseen")),
            "per_rank": {str(rank): values[metric] for rank, values in final.get("per_rank", {}).items()},
            "metrics": {"base": base, "local": local, **final},
            "totals": {
                **totals,
                "peak_server_bytes": max((r["peak_server_bytes"] for r in history), default=0),
                "rejected": sum(len(r["rejected"]) for r in history),
                "rounds": len(history),
                "wall_seconds": wall,
            },
            "clients": [
                {"client_id": c.client_id, "rank": c.rank, "num_examples": len(c.indices)} for c in self.clients
            ],
            "seed": self.config.seed,
            "versions": _versions(),
        }


@dataclass(slots=True)
class _Federation:
    """One method over one set of clients, checkpointed after every round."""

    job: _Job
    phase: str
    method: Method
    clients: list[Client]
    path: Path
    _initial: Checkpoint
    saved: Checkpoint

    def initial(self) -> Broadcast:
        """What the untouched base is to this method: the state before the first round."""
        return self.method.broadcast(self._initial.state, Request(None))

    def note(self, notes: Mapping[str, Any]) -> None:
        """Keep what was measured outside the rounds."""
        self.saved = replace(self.saved, notes=notes)
        checkpoint.write(self.path, self.saved)

    def advance(self, rounds: int) -> None:
        """The rounds that are still missing."""
        done = self.saved.state.round_num
        self.job._emit("phase", phase=self.phase, total=rounds, done=done)
        self._write_history()
        for round_num in range(done, rounds):
            self._one_round(round_num, last=round_num + 1 == rounds)

    def _one_round(self, round_num: int, last: bool) -> None:
        job, config = self.job, self.job.config
        drawn = participants(config, self.clients, round_num)
        steps = {c.client_id: num_steps(config.local, len(c.indices)) for c in drawn}
        cohort = drawn
        if self.method.info.pooled:
            cohort = pooled(self.clients)
            steps = {cohort[0].client_id: sum(steps.values())}

        def work(client: Client, broadcast: Broadcast, number: int) -> LocalResult:
            return train(
                job.model,
                broadcast,
                job.train_data.subset(client.indices),
                config.local,
                steps=steps[client.client_id],
                client_id=client.client_id,
                weight=client.weight(config.federation.weighting),
                key=(config.seed, number),
            )

        def on_client(client: Client, result: LocalResult, done: int) -> None:
            job._emit(
                "client",
                phase=self.phase,
                round_num=round_num + 1,
                client_id=client.client_id,
                done=done,
                cohort=len(cohort),
                train_loss=result.train_loss,
            )

        saved = self.saved
        standing, record = run_round(
            self.method,
            Standing(saved.state, saved.client_states, saved.seen),
            cohort,
            work,
            weighting=config.federation.weighting,
            min_success=1 if self.method.info.pooled else config.federation.min_success,
            on_client=on_client,
        )
        self.saved = replace(saved, state=standing.state, client_states=standing.client_states, seen=standing.seen)
        every = config.evaluation.every
        due = self.phase == "federation" and (last or (round_num + 1) % every == 0)
        if due and self.method.info.personalised:
            record["eval"] = self.personal_metrics() if last else None
        else:
            full = self.method.broadcast(standing.state, Request(None)) if due else None
            record["eval"] = job._evaluate(full, whole=False) if full is not None else None
        self.saved = replace(self.saved, history=(*saved.history, record))
        checkpoint.write(self.path, self.saved)
        self._write_history()
        job._emit("round", phase=self.phase, record=record)

    def personal_metrics(self) -> dict[str, float]:
        """The mean over the clients of what each one's own model scores on everybody's test data."""
        figures = []
        for client in self.clients:
            sent = self.method.broadcast(self.saved.state, Request(client.rank))
            own = self.method.start(sent, self.saved.client_states.get(client.client_id))
            figures.append(self.job._evaluate(own, whole=True))
        return _mean(figures)

    def _write_history(self) -> None:
        if self.phase == "federation":
            lines = [json.dumps(record) + "\n" for record in self.saved.history]
            write_bytes(self.job.out / "metrics.jsonl", "".join(lines).encode())


def merged_adapter(broadcast: Broadcast) -> dict[str, Factors]:
    """Adapter and patch as one adapter with scaling 1: exactly what a client runs, for the untouched base."""
    merged: dict[str, Factors] = {}
    for name, factors in broadcast.adapter.items():
        total = factors.delta()
        patch = broadcast.patch.get(name)
        if patch is not None:
            if not isinstance(patch, LowRank):
                patch = lowrank.LowRank(patch, torch.eye(patch.shape[1]))
            total = lowrank.stack([total, patch])
            f = lowrank.svd(total)
            keep = max(1, lowrank.numerical_rank(f.s))
            total = LowRank(f.u[:, :keep] * f.s[:keep], f.vh[:keep])
        merged[name] = Factors(total.b, total.a, 1.0)
    return merged


def _mean(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device = {name!r} cannot be used here ({str(error).splitlines()[0]})") from None
    return device


def _versions() -> dict[str, str]:
    packages = ("fedspan", "torch", "transformers", "peft", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
