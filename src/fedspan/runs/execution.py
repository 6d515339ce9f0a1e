"""Whole runs, started, resumed or served: the base, the federation, the control, and the folder that holds it all."""

from __future__ import annotations

import math
import os
import secrets
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
from fedspan.methods.kept_optimizer import with_kept_optimizer
from fedspan.models.quantised import base_size
from fedspan.privacy.ledgers import ClientLedger
from fedspan.runs import events
from fedspan.runs.context import RunContext
from fedspan.runs.events import OnEvent
from fedspan.runs.export import export, export_best
from fedspan.runs.final import final_metrics
from fedspan.runs.folder_lock import RUNNING, is_free, locked
from fedspan.runs.loading_lines import loading_lines
from fedspan.runs.logged import logged
from fedspan.runs.loop import FEDERATION, MethodRun
from fedspan.runs.provision import Provision
from fedspan.runs.scoring import personal_metrics
from fedspan.runs.summary import Summary, summarise
from fedspan.runs.tracking import check_trackers, tracked
from fedspan.support import standard_json
from fedspan.support.activity import report
from fedspan.support.enclosing import enclosing_run
from fedspan.support.errors import FedspanError, NotResumable
from fedspan.support.files import StrPath, write_bytes, write_new
from fedspan.support.paths import lacks
from fedspan.support.scalars import whole
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
    loading: tuple[str, ...] = ()
    """Lines of Python that load the adapter (of a personalised method, its first client's) or the model."""


def run(
    config: Config,
    out: StrPath | None = None,
    on_event: OnEvent = events.ignore,
    transport: Transport | None = None,
    trusted: Mapping[str, bytes] | None = None,
    provision: Provision | None = None,
) -> Result:
    """Run a federation into a new folder.

    Parameters
    ----------
    out
        The run folder; none: `runs/METHOD-TIME-NUMBER`.
    on_event
        Receives every event as it happens.
    transport
        Reaches the clients; none: they are simulated in this process.
    trusted
        Public identity keys of the clients behind the transport, which sign their keys for secure sums; none: they are
        not known here.
    provision
        Makes the costly parts; none: for this run alone.

    Raises
    ------
    FedspanError
        For anything wrong with the configuration, the data or the model, before any training starts; or when too few
        clients answer in a round.
    """
    folder = new_folder(config, out)
    check_trackers(config)
    method = requirements.chosen(config, ClientLedger(folder, config.privacy, config.federation.participation))
    config = with_absolute_paths(config)
    context = RunContext.prepare(config, method, folder, on_event, transport, trusted, provision)
    # The folder is made only after everything that can be refused has been.
    main = MethodRun.open(context, FEDERATION, method, context.clients)
    context.ready()
    with locked(folder):
        try:
            write_new(folder / "config.toml", to_toml(config).encode())
        except FileExistsError:
            raise FedspanError(f"{folder} was taken by another run meanwhile: expected a new folder") from None
        return _execute(context, main)


def new_folder(config: Config, out: StrPath | None) -> Path:
    """Return the folder of a new run: `out`, or one under `runs` named by the method, the time and a random number.

    Raises
    ------
    FedspanError
        When the folder has something in it, or cannot be made.
    """
    name = f"{config.method['name']}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    folder = Path(out) if out else Path("runs") / name
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise FedspanError(f"{folder} cannot be made: {above} is {'not writable' if above.is_dir() else 'a file'}")
    if (folder / RUNNING).exists():
        with locked(folder):  # which names the other run, if it is still at work
            pass
    if not is_free(folder):
        hint = f"; `fedspan resume {folder}` goes on with it" if (folder / "config.toml").exists() else ""
        raise FedspanError(f"{folder} exists and is not empty: expected a new folder{hint}")
    return folder


def resume(
    out: StrPath,
    on_event: OnEvent = events.ignore,
    workers: int | None = None,
    transport: Transport | None = None,
    trusted: Mapping[str, bytes] | None = None,
    provision: Provision | None = None,
    rounds: int | None = None,
) -> Result:
    """Resume an interrupted run, or extend a finished one; it ends with the same bits as if it had never stopped.

    Parameters
    ----------
    workers
        Number of processes; none: as in the run's own settings.
    transport, trusted, provision
        As of `run`.
    rounds
        Number of rounds in all, which is then kept in the run's settings; none: as these say.

    Raises
    ------
    FedspanError
        When `out` holds no run, or one whose clients are at real sites and no transport is given; when another process
        is at work in it; when its checkpoint is damaged; for other settings (see `fedspan.runs.identity.MAY_CHANGE`),
        data, base or libraries than it began with; for fewer rounds than are finished.
    """
    folder = Path(out)
    if not (folder / "config.toml").exists():
        raise FedspanError(
            f"{lacks(folder, 'run (no config.toml)')}: expected the folder of an earlier `fedspan run`"
            f"{enclosing_run(folder)}"
        )
    if transport is None and (folder / "sites.json").exists():
        raise FedspanError(f"{folder} is a federation of real sites: expected the server that started it to resume it")
    with locked(folder):
        config = stored = _with_rounds(load_config(folder / "config.toml"), rounds)
        if workers is not None:
            config = config.model_copy(update={"engine": config.engine.model_copy(update={"workers": workers})})
        check_trackers(config)
        method = requirements.chosen(config, ClientLedger(folder, config.privacy, config.federation.participation))
        context = RunContext.prepare(config, method, folder, on_event, transport, trusted, provision)
        main = MethodRun.open(context, FEDERATION, method, context.clients)
        context.ready()
        if rounds is not None:
            _check_rounds(rounds, main.saved.state.round_num)
            write_bytes(folder / "config.toml", to_toml(stored).encode())
        return _execute(context, main)


def _with_rounds(config: Config, rounds: int | None) -> Config:
    if rounds is None:
        return config
    rounds = whole("rounds", rounds, 1)
    return config.model_copy(update={"federation": config.federation.model_copy(update={"rounds": rounds})})


def _check_rounds(rounds: int, done: int) -> None:
    if rounds < done:
        raise FedspanError(f"rounds = {rounds}, but {done} are finished: expected at least as many")


def serve(
    config: Config,
    out: StrPath,
    on_event: OnEvent,
    transport: Transport,
    trusted: Mapping[str, bytes] | None = None,
    keys: Mapping[str, str] | None = None,
) -> Result:
    """Lead a federation of sites that are reached through `transport`: a new one, or the one that `out` holds.

    Every message and every decision is written into `events.jsonl` of the run's folder (`fedspan.events`).

    Parameters
    ----------
    keys
        Fingerprints of the deployment's keys and certificates by name, for that log.
    """
    on_event, transport = logged(Path(out), config, on_event, transport, trusted, keys)
    if (Path(out) / "config.toml").exists():
        return resume(out, on_event, transport=transport, trusted=trusted)
    return run(config, out, on_event, transport, trusted)


def _execute(context: RunContext, main: MethodRun) -> Result:
    """Do the part of the run that the folder shows to be unfinished."""
    with closing(context), tracked(context.config, context.out, context.on_event) as context.on_event:
        began = time.perf_counter()
        if context.coordinator is not None:
            context.coordinator.enrol()
        report("preparing the first round")
        precision = main.settle_precision()
        main.settle_cohort_size()
        _announce(context, main, precision)
        base = _base(context, main)
        main.on_best = lambda run: export_best(context, run)
        main.advance(context.config.federation.rounds)
        local = _local_control(context, main)
        context.emit("phase", phase="final", total=1, done=0)
        final = final_metrics(context, main)
        adapter = export(context, main)
        wall_seconds = time.perf_counter() - began
        history = main.saved.history
        # Of the ledger, and not of the last round's record: a round that was given up has released something too.
        spent = main.budget.spent()
        summary = summarise(
            context,
            history,
            base=base,
            base_rows=main.saved.notes.get("base_rows") or 0,
            local=local,
            final=final.metrics,
            rows=final.rows,
            each=final.clients,
            classes=final.classes,
            by_clients=final.by_clients,
            stopped_early=main.saved.state.round_num < context.config.federation.rounds and main.stopped_early(),
            wall_seconds=wall_seconds,
            spent=spent,
        )
        write_bytes(context.out / "summary.json", (standard_json.dumps(summary, indent=2) + "\n").encode())
        context.emit("end", summary=summary)
        records = [dict(record) for record in history]
        return Result(context.out, summary, records, adapter, loading_lines(context))


def _announce(context: RunContext, main: MethodRun, precision: str | None) -> None:
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
        precision=precision,
        workers=context.num_workers,
        data=context.described,
    )
    for note in context.notes:
        context.emit("note", line=note)


def _base(context: RunContext, main: MethodRun) -> dict[str, float] | None:
    """Return the figures of the untouched base; measured once, then kept in the checkpoint."""
    context.emit("phase", phase="base", total=1, done=0)
    if "base" not in main.saved.notes and context.config.evaluation.base:
        main.note({**main.saved.notes, **_measured_base(context, main)})
    base: dict[str, float] | None = main.saved.notes.get("base")
    bounded = context.held_out is not None and not context.held_out.layout.with_loss
    if base is not None and not bounded and not math.isfinite(base["loss"]):
        raise NotResumable(
            f"model.name = {context.config.model.name!r}: the loss of the untouched base is {base['loss']} with "
            f"model.dtype = {context.config.model.dtype!r}; expected a base and a type whose loss is finite"
        )
    return base


def _measured_base(context: RunContext, main: MethodRun) -> dict[str, Any]:
    """Return the untouched base's figures and the rows that they are of, as notes for the checkpoint."""
    if context.config.evaluation.where != "clients":
        return {"base": context.evaluate([context.evaluation_task(main.initial())])[0]}
    found = main.evaluated_by_clients(saved=main.start) if main.saved.state.round_num == 0 else None
    return {"base": None, "base_rows": 0} if found is None else {"base": found["figures"], "base_rows": found["rows"]}


def _local_control(context: RunContext, main: MethodRun) -> dict[str, float] | None:
    """Train every client alone, on the same schedule, and return the mean of the clients' figures."""
    if not context.config.evaluation.local or context.method.info.alone or context.coordinator is not None:
        return None
    by_clients = context.config.evaluation.where == "clients"
    if by_clients and context.config.privacy.dp != "none":
        return None  # its models are under no noise, and neither would their figures on the clients' rows be
    control = methods.create("local", trains=context.method.info.trains)
    if context.config.local.keep_optimizer:
        control = with_kept_optimizer(control)
    alone = MethodRun.open(context, "local", control, context.clients)
    alone.advance(main.saved.state.round_num if main.stopped_early() else context.config.federation.rounds)
    if by_clients:
        found = alone.evaluated_by_clients()
        return None if found is None else found["figures"]
    return personal_metrics(context, control, alone.saved, alone.clients)
