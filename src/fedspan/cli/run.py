"""`fedspan run` and `fedspan resume`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedspan.cli.arguments import ConfigFile, Settings, parse_count
from fedspan.cli.failures import Bug, Interrupted, is_out_of_memory, is_users, message
from fedspan.distributed.environment import place
from fedspan.support.errors import FedspanError, NotResumable

if TYPE_CHECKING:
    from fedspan.config import Config
    from fedspan.runs.events import Event, OnEvent
    from fedspan.runs.execution import Result
    from fedspan.runs.provision import Provision


def run(
    config: ConfigFile = None,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="A new folder for the run; if not given, one under runs."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="cohort (many clients in one pass), sequential, or auto (the cohort where the method allows it and it "
            "is faster); flower-simulation: server and sites exchange messages over Flower's simulation engine.",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Number of processes that share the work; auto: one per core or GPU. Changes no result.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Do not run: print what would be run on what, and what it would send, take and last, or the reason "
            "why it would be refused.",
        ),
    ] = False,
) -> None:
    """Run a federation and compare it with the untouched base and with every client alone.

    \b
    Examples:
      fedspan run                                   the embedded text task
      fedspan run --set data.task=builtin:digits    the same for images
      fedspan run --set method.name=flora --set federation.rounds=20
      fedspan run my.toml --out runs/mine           your own model and data
      fedspan run --engine sequential --workers 1   one client after the other
      fedspan run --engine flower-simulation        as messages over Flower
      fedspan run my.toml --check                   what it would do

    The run folder holds config.toml (every setting), metrics.jsonl (one object per round), summary.json,
    checkpoint/, and adapter/ in PEFT's format (model/ for methods that train full weights).
    `fedspan config` prints every setting with its value and explanation.
    """
    from fedspan.config import load

    simulated = engine == "flower-simulation"
    given = {"engine.name": "sequential" if simulated else engine, "engine.workers": workers}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    # Before the slow imports, so that a typing mistake is answered at once.
    loaded = load(config, [*(settings or ()), *overrides], must_exist=True)
    if simulated and place() is not None:
        raise FedspanError(
            "--engine flower-simulation in processes of torchrun: expected one process, or another engine"
        )
    if check:
        _check(loaded, out)
        return

    def work(on_event: OnEvent) -> Result:
        from fedspan.runs import execution

        if simulated:
            from fedspan.flower import simulation

            return simulation.run(loaded, execution.new_folder(loaded, out), on_event)
        return execution.run(loaded, out, on_event, provision=_provision())

    _federate(work, None)


def _check(config: Config, out: Path | None) -> None:
    """Print what a run would be."""
    from fedspan.display.console import command_console
    from fedspan.display.progress import follow
    from fedspan.support.activity import report

    console = command_console()
    with follow(console):
        report("loading the libraries")
        from fedspan.display.check import check_lines
        from fedspan.runs.check import check

        found = check(config, out)
    for line in check_lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the run.")],
    rounds: Annotated[
        str | None,
        typer.Option(
            "--rounds",
            metavar="N",
            help="Number of rounds in all, to extend a finished run; if not given, as the run was set up.",
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option("--workers", metavar="N", help="Number of processes; if not given, as the run was set up."),
    ] = None,
) -> None:
    """Continue an interrupted run, or extend a finished one; the result has the same bits as if it had never stopped.

    \b
    Examples:
      fedspan resume runs/mine
      fedspan resume runs/mine --rounds 20     eight more after twelve

    Settings, data, base and libraries must be those that the run began with. docs/runs.md lists the settings that may
    change, which is done in the run's config.toml.
    """

    num_workers, num_rounds = parse_count("--workers", workers, "resume"), parse_count("--rounds", rounds, "resume")

    def work(on_event: OnEvent) -> Result:
        from fedspan.runs import execution

        return execution.resume(folder, on_event, num_workers, provision=_provision(), rounds=num_rounds)

    _federate(work, folder)


def _provision() -> Provision | None:
    """Return what makes the costly parts of a run where torchrun has started several processes for it."""
    where = place()
    if where is None:
        return None
    from fedspan.distributed.leader import leader_of
    from fedspan.runs.distributed import DistributedProvision

    return DistributedProvision(leader_of(where))


def _federate(work: Callable[[OnEvent], Result], folder: Path | None) -> None:
    """Run a federation, or resume the one in `folder`, under a display; then print what to do with the result."""
    from fedspan.display.console import command_console
    from fedspan.display.session import watch

    console = command_console()
    started: list[Path] = []

    def note_folder(event: Event) -> None:
        if event.kind == "start":
            started.append(Path(event.data["out"]))

    def observed(show: OnEvent) -> Result:
        def on_event(event: Event) -> None:
            note_folder(event)
            show(event)

        return work(on_event)

    try:
        result = watch(observed, console)
    except BaseException as error:
        explained = _explained(error, started, folder)
        if explained is error:
            raise
        raise explained from error
    for line in _next_steps(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _explained(error: BaseException, started: list[Path], folder: Path | None) -> BaseException:
    """Return the error to show for one that ended a run: what happened, and how to go on."""
    if isinstance(error, KeyboardInterrupt):
        # A resumed run can be resumed even where it had not started to work.
        return Interrupted("interrupted" + _how_to_resume(started or ([] if folder is None else [folder])))
    if type(error).__name__ == "Ended":  # of `fedspan.distributed`, recognised by its name as torch is not imported
        return FedspanError(f"{error}{_how_to_resume(started or ([] if folder is None else [folder]))}")
    if not isinstance(error, Exception) or is_out_of_memory(error):
        return error
    if is_users(error):
        advice = "" if isinstance(error, NotResumable) else _how_to_resume(started)
        return FedspanError(message(error) + advice)
    return Bug(started[0] if started else folder)


def _next_steps(result: Result) -> Iterator[str]:
    from fedspan.display.progress import duration

    yield f"{result.out}/  {duration(result.summary['totals']['wall_seconds'])}, metrics.jsonl, summary.json"
    if result.loading:
        yield "load it in Python:"
        yield from result.loading


def _how_to_resume(folders: list[Path]) -> str:
    """Return the command to type next, once there is a run folder."""
    return f"; continue with: fedspan resume {folders[0]}" if folders else ""
