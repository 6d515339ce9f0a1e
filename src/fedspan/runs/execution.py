"""Whole runs, started, resumed or served: the base, the federation, the control, and the folder that holds it all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedspan import methods
from fedspan.config import Config, to_toml, with_absolute_paths
from fedspan.config import load as load_config
from fedspan.federation import requirements
from fedspan.models.quantised import base_size
from fedspan.privacy.ledgers import ClientLedger
from fedspan.runs import events
from fedspan.runs.context import RunContext
from fedspan.runs.events import OnEvent
from fedspan.runs.export import export
from fedspan.runs.final import final_metrics
from fedspan.runs.loop import FEDERATION, MethodRun
from fedspan.runs.scoring import personal_metrics
from fedspan.runs.summary import Summary, summarise
from fedspan.support import standard_json
from fedspan.support.errors import FedspanError
from fedspan.support.files import StrPath, write_bytes, write_new
from fedspan.wire.transport import Transport


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a finished run."""

    out: Path
    """The run folder."""
    summary: Summary
    """The content of `summary.json`."""
    history: list[dict[str, Any]]
    """One record per round, as in `metrics.jsonl`."""
    adapter: Path | None
    """The PEFT folder; None for full-weight methods, whose model is in `out / "model"`, and for personalised ones."""


def run(
    config: Config,
    out: StrPath | None = None,
    on_event: OnEvent = events.ignore,
    transport: Transport | None = None,
    trusted: Mapping[str, bytes] | None = None,
) -> Result:
    """Run a federation into a new folder.

    Parameters
    ----------
    out
        The run folder; none: `runs/METHOD-TIME`.
    on_event
        Receives every event as it happens.
    transport
        Reaches the clients; none: they are simulated in this process.
    trusted
        Public identity keys of the clients behind the transport, which sign their keys for secure sums; none: they are
        not known here.

    Raises
    ------
    FedspanError
        For anything wrong with the configuration, the data or the model, before any training starts; or when too few
        clients answer in a round.
    """
    folder = new_folder(config, out)
    method = requirements.chosen(config, ClientLedger(folder, config.privacy, config.federation.participation))
    config = with_absolute_paths(config)
    context = RunContext.prepare(config, method, folder, on_event, transport, trusted)
    # The folder is made only after everything that can be refused has been.
    main = MethodRun.open(context, FEDERATION, method, context.clients)
    try:
        write_new(folder / "config.toml", to_toml(config).encode())
    except FileExistsError:
        raise FedspanError(f"{folder} was taken by another run meanwhile: expected a new folder") from None
    return _execute(context, main)


def new_folder(config: Config, out: StrPath | None) -> Path:
    """Return the folder of a new run: `out`, or one under `runs` that is named by the method and the time.

    Raises
    ------
    FedspanError
        When the folder has something in it.
    """
    folder = Path(out) if out else Path("runs") / f"{config.method['name']}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"; `fedspan resume {folder}` goes on with it" if (folder / "config.toml").exists() else ""
        raise FedspanError(f"{folder} exists and is not empty: expected a new folder{hint}")
    return folder


def resume(
    out: StrPath,
    on_event: OnEvent = events.ignore,
    workers: int | None = None,
    transport: Transport | None = None,
    trusted: Mapping[str, bytes] | None = None,
) -> Result:
    """Resume an interrupted run; it ends with the same bits as if it had never stopped.

    Parameters
    ----------
    workers
        Number of processes; none: as in the run's own settings.
    transport, trusted
        As of `run`.

    Raises
    ------
    FedspanError
        When `out` holds no run, or one whose clients are at real sites and no transport is given.
    """
    folder = Path(out)
    if not (folder / "config.toml").exists():
        raise FedspanError(f"{folder} holds no run (no config.toml): expected the folder of an earlier `fedspan run`")
    if transport is None and (folder / "sites.json").exists():
        raise FedspanError(f"{folder} is a federation of real sites: expected the server that started it to resume it")
    config = load_config(folder / "config.toml")
    if workers is not None:
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"workers": workers})})
    method = requirements.chosen(config, ClientLedger(folder, config.privacy, config.federation.participation))
    context = RunContext.prepare(config, method, folder, on_event, transport, trusted)
    return _execute(context, MethodRun.open(context, FEDERATION, method, context.clients))


def serve(
    config: Config,
    out: StrPath,
    on_event: OnEvent,
    transport: Transport,
    trusted: Mapping[str, bytes] | None = None,
) -> Result:
    """Lead a federation of sites that are reached through `transport`: a new one, or the one that `out` holds."""
    if (Path(out) / "config.toml").exists():
        return resume(out, on_event, transport=transport, trusted=trusted)
    return run(config, out, on_event, transport, trusted)


def _execute(context: RunContext, main: MethodRun) -> Result:
    """Do the part of the run that the folder shows to be unfinished."""
    with closing(context):
        began = time.perf_counter()
        if context.coordinator is not None:
            context.coordinator.enrol()
        main.settle_cohort_size()
        _announce(context, main)
        base = _base(context, main)
        main.advance(context.config.federation.rounds)
        local = _local_control(context)
        context.emit("phase", phase="final", total=1, done=0)
        final = final_metrics(context, main)
        adapter = export(context, main)
        wall_seconds = time.perf_counter() - began
        history = main.saved.history
        # Of the ledger, and not of the last round's record: a round that was given up has released something too.
        spent = main.budget.spent()
        summary = summarise(
            context, history, base=base, local=local, final=final, wall_seconds=wall_seconds, spent=spent
        )
        write_bytes(context.out / "summary.json", (standard_json.dumps(summary, indent=2) + "\n").encode())
        context.emit("end", summary=summary)
        return Result(context.out, summary, [dict(record) for record in history], adapter)


def _announce(context: RunContext, main: MethodRun) -> None:
    """Emit the `start` event, which describes what is about to run."""
    engine = main.engine_used()
    adapter = sum(f.a.numel() + f.b.numel() for f in context.model.adapter().values())
    dense = sum(p.numel() for p in context.model.dense_parameters.values())
    context.emit(
        "start",
        method=context.method.info.title,
        task=context.config.data.task,
        metric=context.metrics[0],
        model=context.config.model.name,
        num_clients=len(context.clients),
        ranks=[client.rank for client in context.clients],
        rounds=context.config.federation.rounds,
        out=str(context.out),
        base_parameters=base_size(context.model.model)[0],
        trained_parameters=adapter + dense,
        engine=engine.name,
        reason=engine.reason,
        notes=list(context.model.notes),
        workers=context.num_workers,
    )


def _base(context: RunContext, main: MethodRun) -> dict[str, float] | None:
    """Return the figures of the untouched base; measured once, then kept in the checkpoint."""
    context.emit("phase", phase="base", total=1, done=0)
    if "base" not in main.saved.notes and context.config.evaluation.base:
        main.note({**main.saved.notes, "base": context.evaluate([context.evaluation_task(main.initial())])[0]})
    base: dict[str, float] | None = main.saved.notes.get("base")
    return base


def _local_control(context: RunContext) -> dict[str, float] | None:
    """Train every client alone, on the same schedule, and return the mean of the clients' figures."""
    if not context.config.evaluation.local or context.method.info.alone or context.coordinator is not None:
        return None
    control = methods.create("local", trains=context.method.info.trains)
    alone = MethodRun.open(context, "local", control, context.clients)
    alone.advance(context.config.federation.rounds)
    return personal_metrics(context, control, alone.saved, alone.clients)
