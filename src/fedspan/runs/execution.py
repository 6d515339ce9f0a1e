"""A whole run: the base, the federation, the control, and the folder that holds it all."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedspan.federation import requirements
from fedspan.algebra import lowrank
from fedspan import methods
from fedspan.support.files import write_bytes
from fedspan.config import Config, to_toml, with_absolute_paths
from fedspan.config import load as load_config
from fedspan.runs.engine import Event, Federation, Job, OnEvent, mean_figures, to_json
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Broadcast, Factors, Request
from fedspan.methods.readout import received
from fedspan.data.metrics import METRICS
from fedspan.wire.transport import Port
from fedspan.privacy.spending import secret_of
from fedspan.support.errors import FedspanError

__all__ = ["Event", "OnEvent", "Result", "resume", "run"]

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves behind."""

    out: Path
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    adapter: Path | None
    """The PEFT folder; none for full-weight methods, whose model is in `out / "model"`."""


def _silent(event: Event) -> None:
    pass


def run(config: Config, out: Path | None = None, on_event: OnEvent = _silent, port: Port | None = None) -> Result:
    """Run a federation into a new folder.

    Parameters
    ----------
    out
        The run folder; none: `runs/METHOD-TIME`.
    port
        Through which the clients are reached; none: they are simulated in this process.

    Raises
    ------
    ValueError
        For anything wrong with the configuration, the data or the model, before any training starts.
    """
    folder = new_folder(config, out)
    method = requirements.chosen(config, secret_of(folder))
    config = with_absolute_paths(config)
    job = Job.prepare(config, method, folder, on_event, port)
    main = job.federation("federation", method, job.clients)  # what does not fit is refused while there is no folder
    write_bytes(folder / "config.toml", to_toml(config).encode())
    return _execute(job, main)


def new_folder(config: Config, out: Path | None) -> Path:
    """Where a new run goes: `out`, or a folder of its own under `runs`.

    Raises
    ------
    ValueError
        When there is something already.
    """
    folder = out or Path("runs") / f"{config.method['name']}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"; `fedspan resume {folder}` goes on with it" if (folder / "config.toml").exists() else ""
        raise FedspanError(f"{folder} exists and is not empty: expected a new folder{hint}")
    return folder


def resume(out: Path, on_event: OnEvent = _silent, workers: int | None = None, port: Port | None = None) -> Result:
    """Go on with an interrupted run; it ends with the same bits as if it had never stopped.

    Parameters
    ----------
    workers
        Processes, where not as many as the run's own settings say.
    port
        As `run` has it.

    Raises
    ------
    ValueError
        When `out` holds no run.
    """
    if not (out / "config.toml").exists():
        raise FedspanError(f"{out} holds no run (no config.toml): expected the folder of an earlier `fedspan run`")
    if port is None and (out / "sites.json").exists():
        raise FedspanError(f"the clients of {out} are at their sites: expected the server that led them to go on with it")
    config = load_config(out / "config.toml")
    if workers is not None:
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"workers": workers})})
    return _execute(*_prepared(config, out, on_event, port))


def _prepared(config: Config, out: Path, on_event: OnEvent, port: Port | None) -> tuple[Job, Federation]:
    job = Job.prepare(config, requirements.chosen(config, secret_of(out)), out, on_event, port)
    return job, job.federation("federation", job.method, job.clients)


def serve(config: Config, out: Path, on_event: OnEvent, port: Port) -> Result:
    """Lead a federation of sites that are reached through `port`: from the start, or from where its folder stands."""
    if (out / "config.toml").exists():
        return resume(out, on_event, port=port)
    return run(config, out, on_event, port)


def _execute(job: Job, main: Federation) -> Result:
    """Everything that is still to be done, from wherever the folder stands."""
    with closing(job):
        began = time.perf_counter()
        if job.coordinator is not None:
            job.coordinator.enrol()
        job.announce(main)
        base = _base(job, main)
        main.advance(job.config.federation.rounds)
        local = _local_control(job)
        job.emit("phase", phase="final", total=1, done=0)
        final = _final(job, main)
        adapter = _export(job, main)
        summary = _summary(job, main, base, local, final)
        summary["totals"]["wall_seconds"] = time.perf_counter() - began
        write_bytes(job.out / "summary.json", (to_json(summary, indent=2) + "\n").encode())
        job.emit("end", summary=summary)
        return Result(job.out, summary, [dict(record) for record in main.saved.history], adapter)


def _base(job: Job, main: Federation) -> Figures | None:
    """The untouched base on the test data; measured once, then kept in the checkpoint."""
    job.emit("phase", phase="base", total=1, done=0)
    if "base" not in main.saved.notes and job.config.evaluation.base:
        main.note({"base": job.evaluate([job.evaluation_task(main.initial())])[0]})
    base: Figures | None = main.saved.notes.get("base")
    return base


def _local_control(job: Job) -> Figures | None:
    """Every client alone, on the same schedule; the mean of the clients' figures."""
    if not job.config.evaluation.local or job.method.info.alone or job.coordinator is not None:
        return None
    control = methods.create("local", trains=job.method.info.trains)
    alone = job.federation("local", control, job.clients)
    alone.advance(job.config.federation.rounds)
    return alone.personal_metrics()


def _final(job: Job, main: Federation) -> dict[str, Any]:
    """What the clients end with, and the server's full state, on the whole test data and on unseen data."""
    state, method = main.saved.state, job.method
    if method.info.personalised and job.coordinator is not None:
        return {}  # the clients' own models are at the sites
    if method.info.personalised:
        personal = {"clients": main.personal_metrics()}
        if any(len(client.holdout) for client in job.clients):
            personal["own_data"] = main.personal_metrics(own_data=True)
        return personal
    server = method.broadcast(state, Request(None))
    # All at once, so that processes that share the work are not kept waiting in between.
    evaluation_tasks = {"server": job.evaluation_task(server)}
    if "unseen" in job.data:
        evaluation_tasks["unseen"] = job.evaluation_task(server, split="unseen")
    ranks = sorted({client.rank for client in job.clients})
    per_rank = method.info.trains == "adapter" and not method.info.pooled and job.config.evaluation.per_rank
    if per_rank:
        readouts = {rank: method.broadcast(state, Request(rank)) for rank in ranks}
        evaluation_tasks |= {f"rank {rank}": job.evaluation_task(x) for rank, x in readouts.items() if not _same_adapter(x, server)}
    own = [client for client in job.clients if len(client.holdout)]
    # The pooled control has one adapter, at the largest rank.
    sent = {rank: server if method.info.pooled else method.broadcast(state, Request(rank)) for rank in ranks}
    evaluation_tasks |= {f"own {c.client_id}": job.evaluation_task(sent[c.rank], split="train", rows=c.holdout) for c in own}
    figures = dict(zip(evaluation_tasks, job.evaluate(evaluation_tasks.values()), strict=True))

    found: dict[str, Any] = {name: figures[name] for name in ("server", "unseen") if name in figures}
    found["clients"] = found["server"]
    if per_rank:
        by_rank = {rank: figures.get(f"rank {rank}", found["server"]) for rank in ranks}
        found["per_rank"] = by_rank
        found["clients"] = mean_figures([by_rank[client.rank] for client in job.clients])
    if own:
        found["own_data"] = mean_figures([figures[f"own {c.client_id}"] for c in own])
    return found


def _same_adapter(x: Broadcast, y: Broadcast) -> bool:
    """Whether two readouts of one state are the same adapter: then they need not be measured twice."""
    return all(
        f.scaling == y.adapter[name].scaling
        and torch.equal(f.b, y.adapter[name].b)
        and torch.equal(f.a, y.adapter[name].a)
        for name, f in x.adapter.items()
    )


def _export(job: Job, main: Federation) -> Path | None:
    """The result as other libraries read it: a PEFT adapter folder, one for every client, or a whole model."""
    info = job.method.info
    if info.personalised:
        if info.trains == "adapter" and not info.alone and job.coordinator is None:
            _export_personal(job, main)
        return None
    broadcast = job.method.broadcast(main.saved.state, Request(None))
    if job.method.info.trains != "adapter":
        job.model.load(broadcast)
        job.model.save_weights(job.out / "model", job.processor)
        return None
    path = job.out / "adapter"
    if not path.exists():  # a resumed run may have come this far before
        job.model.save_adapter(path, merged_adapter(broadcast), broadcast.dense)
    return path


def _export_personal(job: Job, main: Federation) -> None:
    """Every client's own adapter, for the untouched base."""
    for client in job.clients:
        path = job.out / "adapters" / client.client_id
        if not path.exists():
            sent = job.method.broadcast(main.saved.state, Request(client.rank))
            own = job.method.start(sent, main.saved.client_states.get(client.client_id))
            job.model.save_adapter(path, merged_adapter(own), own.dense)


def merged_adapter(broadcast: Broadcast) -> dict[str, Factors]:
    """Adapter and patch as one adapter with scaling 1: exactly what a client runs, for the untouched base."""
    merged: dict[str, Factors] = {}
    for name, factors in broadcast.adapter.items():
        total = factors.delta()
        if name in broadcast.patch:
            f = lowrank.svd(received(broadcast, name))
            keep = max(1, lowrank.numerical_rank(f.s))
            total = LowRank(f.u[:, :keep] * f.s[:keep], f.vh[:keep])
        merged[name] = Factors(total.b, total.a, 1.0)
    return merged


def _summary(
    job: Job, main: Federation, base: Figures | None, local: Figures | None, final: Mapping[str, Any]
) -> dict[str, Any]:
    metric, history = job.metrics[0], main.saved.history

    def headline(values: Figures | None) -> float | None:
        return None if values is None else values[metric]

    totals: dict[str, Any] = {
        key: sum(record[key] for record in history)
        for key in ("bytes_up", "bytes_down", "server_seconds", "client_seconds", "train_wall_seconds")
    }
    totals["peak_server_bytes"] = max((record["peak_server_bytes"] for record in history), default=0)
    totals["optimizer_bytes"] = max((record["optimizer_bytes"] for record in history), default=0)
    totals["rejected"] = sum(len(record["rejected"]) for record in history)
    totals["rounds"] = len(history)
    return {
        "method": job.method.info.name,
        "options": {key: value for key, value in job.config.method.items() if key != "name"},
        "metric": metric,
        "higher_is_better": METRICS[metric].higher_is_better,
        "base": headline(base),
        "local": headline(final.get("clients") if job.method.info.alone else local),
        "federated": headline(final.get("clients")),
        "server": headline(final.get("server")),
        "unseen": headline(final.get("unseen")),
        "per_rank": {str(rank): values[metric] for rank, values in final.get("per_rank", {}).items()},
        "metrics": {"base": base, "local": local, **final},
        "totals": totals,
        "clients": [{"client_id": c.client_id, "rank": c.rank, "num_examples": c.num_examples} for c in job.clients],
        "seed": job.config.seed,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("fedspan", "torch", "transformers", "peft", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
