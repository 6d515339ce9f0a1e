"""The `fedspan` command: parse, call, print.

Whatever a user can get wrong ends in one line on stderr and exit code 2. Heavy libraries are imported inside
the commands, so that help, version and mistakes answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedspan.cli import flower_commands
from fedspan.cli.arguments import NearestNames, WithWeights, method_options, parse_rank, parse_weights
from fedspan.support.errors import FedspanError

if TYPE_CHECKING:
    from fedspan.runs.engine import Event
    from fedspan.runs.execution import Result

# Newer versions of typer bundle the click they build on: its errors are reached through typer alone.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


app = typer.Typer(
    cls=NearestNames,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(flower_commands.app, name="flower", short_help="Deploy a federation of real sites over Flower.")

_Config = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.toml", help="Settings; none: the embedded default.", show_default=False),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; give it as often as you like."),
]

_Engine = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cohort (many clients in one pass), sequential, or auto: the cohort where it applies and is faster; "
        "flower-simulation: sites and server as messages over Flower's simulation engine.",
    ),
]
_Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Processes that share the work; auto: one for each core, or GPU. Changes no result."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"fedspan {version('fedspan')}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune one transformer over many private datasets, with server rules that are mathematically right.

    `fedspan run` without a config shows the main job in about a minute: eight clients with different tasks
    and LoRA ranks, GLoRA on the server, and a table that compares the untouched base, a client alone and the
    federation.
    """


@app.command(short_help="Run a federation, with its controls.")
def run(
    config: _Config = None,
    settings: _Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder for the run; else runs/METHOD-TIME.")
    ] = None,
    engine: _Engine = None,
    workers: _Workers = None,
) -> None:
    """Run a federation and compare it with the untouched base and with every client alone.

    \b
    Examples:
      fedspan run                                   the embedded text task
      fedspan run --set data.task=builtin:digits    the same for images
      fedspan run --set method.name=flora --set federation.rounds=20
      fedspan run my.toml --out runs/mine           your own model and data
      fedspan run --engine sequential --workers 1   one client after the other, in one process
      fedspan run --engine flower-simulation        the same bits, as messages over Flower's simulation

    The run folder holds config.toml (fully resolved), metrics.jsonl (one object per round), summary.json,
    checkpoint/, and adapter/ in PEFT's format (model/ for methods that train full weights).
    `fedspan config` prints every setting with its value.
    """
    from fedspan.config import load

    simulated = engine == "flower-simulation"
    given = {"engine.name": "sequential" if simulated else engine, "engine.workers": workers}
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    loaded = load(
        config, [*(settings or ()), *options]
    )  # before the slow imports: a typing mistake is answered at once

    def work(on_event: Callable[[Event], None]) -> Result:
        if simulated:
            from fedspan.flower import simulation
            from fedspan.runs.execution import new_folder

            return simulation.run(loaded, new_folder(loaded, out), on_event)
        from fedspan import run as run_federation

        return run_federation(loaded, out, on_event)

    _federate(work, None)


@app.command(short_help="Go on with an interrupted run.")
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the interrupted run.")],
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Processes, where not as many as the run's own settings say.")
    ] = None,
) -> None:
    """Go on with an interrupted run, whatever ended it; the result has the same bits as an uninterrupted one.

    \b
    Example:
      fedspan resume runs/glora-20260101-120000
    """

    def work(on_event: Callable[[Event], None]) -> Result:
        from fedspan import resume as resume_federation

        return resume_federation(folder, on_event, workers)

    _federate(work, folder)


@app.command(cls=WithWeights, short_help="Merge PEFT adapters by a server rule.")
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="ADAPTER_DIR", help="PEFT LoRA adapter folders.")],
    method: Annotated[str, typer.Option(metavar="NAME", help="The server rule; see `fedspan methods`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the merged adapter.")],
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="W1 W2 …", help="What each adapter counts for, such as its examples; else all the same."),
    ] = None,
    rank: Annotated[
        str | None, typer.Option(metavar="R", help="Rank of the result; if not given, it is exact.")
    ] = None,
    settings: _Settings = None,
) -> None:
    """Apply a server rule once to PEFT adapter folders from anywhere, of any ranks and scalings.

    \b
    Examples:
      fedspan merge alice bob carol --method glora --out merged
      fedspan merge alice bob --weights 300 100 --method flexlora --rank 8 --out merged
      fedspan merge a b c --method glora --set server_rank=auto --out merged

    The result is a PEFT folder. What an exact method cannot fit in it is reported. The weights end at the
    first word that is no number; a folder whose name is a number is written ./7.
    """
    options = method_options(method, settings or ())
    numbers, limit = parse_weights(weights or ()), parse_rank(rank)
    from fedspan import create_method
    from fedspan import merge as merge_adapters

    report = merge_adapters(folders, create_method(**options), weights=numbers, rank=limit, out=out)
    for line in report.lines():
        print(line)


@app.command(short_help="List the methods and their properties.")
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array, for programs.")] = False,
) -> None:
    """List every method with its properties, read from the methods themselves.

    \b
    Examples:
      fedspan methods
      fedspan methods --json
    """
    from fedspan.display import report

    if as_json:
        print(json.dumps(report.method_records(), indent=2, ensure_ascii=False))
        return
    console = _console()
    console.print(report.methods_table(), highlight=False)
    console.print()
    console.print(report.METHODS_LEGEND, style="dim", highlight=False, markup=False)


@app.command(short_help="Print every setting as TOML.")
def config(
    config: _Config = None,
    settings: _Settings = None,
) -> None:
    """Print the fully resolved settings as TOML: a file to start from.

    \b
    Examples:
      fedspan config > my.toml
      fedspan config my.toml --set federation.rounds=30
    """
    from fedspan.config import load, to_toml

    print(to_toml(load(config, settings or ())), end="")


@app.command(short_help="Draw learning curves of runs.")
def plot(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture: .png, .svg or .pdf.")] = Path("curves.png"),
    metric: Annotated[str | None, typer.Option(metavar="NAME", help="Metric to draw; else the summary's.")] = None,
) -> None:
    """Draw learning curves of one or more runs, against rounds and against bytes sent (needs matplotlib).

    \b
    Example:
      fedspan plot runs/glora runs/fedit --out compare.png
    """
    from fedspan.display import report

    print(report.plot(folders, out, metric))


@app.command(short_help="Show what a run's server steps did to the updates.")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, finished or not.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the figures too: .png, .svg or .pdf (needs matplotlib).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Show a run's diagnostics by round, and say in plain words what they mean for this run.

    \b
    Examples:
      fedspan inspect runs/glora-20260101-120000
      fedspan inspect runs/mine --plot mine.png
      fedspan inspect runs/mine --json

    Distance from the ideal update, gauge sensitivity, effective rank, angles between clients, drift, confinement:
    the statements of the papers, measured. The run needs `evaluation.diagnostics`, which is on by default where
    adapters are trained and at most 64 clients take part in a round.
    """
    from fedspan import inspection

    run = inspection.read(folder)
    picture = inspection.plot(run, plot) if plot is not None else None
    if as_json:
        print(json.dumps(inspection.as_json(run), indent=2, ensure_ascii=False))
        return
    console = _console()
    console.print(inspection.table(run), highlight=False)
    console.print()
    console.print(inspection.legend(run), style="dim", highlight=False, markup=False)
    console.print()
    for line in inspection.readings(run):
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)
    if picture is not None:
        print(picture)


@app.command(short_help="Time every part beside what else does it.")
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUITE]...", help="server, clients, rounds, scaling, galore; none: all.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the figures are, or go; what is measured there is kept.")
    ] = Path("bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: about four minutes in all.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,…", help="Only cases with these values, such as d=4096,2048 or hidden=64."),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of every process.")] = 1,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again what was measured on a busy machine.")] = False,
    processes: Annotated[int, typer.Option(metavar="N", help="Processes of the arms that share their work.")] = 2,
    repeat: Annotated[int, typer.Option(metavar="N", help="Timings of every arm, in turn with the others.")] = 5,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="What one arm of one case may take; else 60, or 3 with --quick."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    flower_python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Python of an environment with Flower (rounds).")
    ] = None,
    nvflare_python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Python of an environment with NVFlare (rounds).")
    ] = None,
    peers: Annotated[
        Path, typer.Option(metavar="DIR", help="The scripts that run the experiment in other frameworks (rounds).")
    ] = Path("benchmarks/speed/peers"),
) -> None:
    """Time every part of a federated run beside what else does the same work, on this machine.

    \b
    Examples:
      fedspan bench --quick                       every suite at small sizes, about four minutes
      fedspan bench server --out bench            one suite in full; give the same folder to go on
      fedspan bench server --only d=4096 --only r=16
      fedspan bench rounds --flower-python ~/flower/bin/python

    \b
    server   one server step: every method, dense SVD, torch.svd_lowrank, PEFT's merge, plain averaging,
             and the floor (bytes over bandwidth, operations over the rate of a product); an hour
    clients  local training: a plain PyTorch loop, transformers.Trainer, one client after the other,
             many in one pass; in one process and in two; an hour
    rounds   whole experiments, start-up included: this library, Flower's and NVFlare's simulators; minutes
    scaling  time and memory of a server step from 10 to 10,000 clients, updates held or streamed; minutes
    galore   GaLore's step, refresh and state beside AdamW's; minutes

    The folder gets results.jsonl (one object per measurement, with the machine's description), table.md and
    pictures. An interrupted bench goes on where it was. Arms take turns; figures are medians; arms that must
    agree are compared before they are timed; a case during which the machine was busy is marked.
    """
    from fedspan.bench.harness import Options
    from fedspan.bench.suites import device_of, run

    options = Options(
        out=out,
        quick=quick,
        only=dict(_choice(item) for item in only or ()),
        threads=threads,
        repeat=repeat,
        device=device_of(device),
        budget=budget if budget is not None else 3.0 if quick else 60.0,
        redo=redo,
        processes=processes,
        peers=peers,
        flower_python=flower_python,
        nvflare_python=nvflare_python,
    )
    for path in run(suites or (), options, lambda line: print(line, flush=True)):
        print(path)


def _choice(item: str) -> tuple[str, frozenset[str]]:
    """`d=768,2048` as a key and its values."""
    key, separator, values = item.partition("=")
    if not (key and separator and values):
        raise FedspanError(f"--only {item!r}: expected KEY=VALUE, such as d=4096")
    return key, frozenset(values.split(","))


def _federate(work: Callable[[Callable[[Event], None]], Result], folder: Path | None) -> None:
    """Run or resume (`folder`) with a display, then say what came out and what to do with it."""
    from fedspan.display.progress import follow

    console = _console()
    began: list[str] = []
    try:
        with follow(console) as show:

            def on_event(event: Event) -> None:
                if event.kind == "start":
                    began.append(event.data["out"])
                show(event)

            result = work(on_event)
    except KeyboardInterrupt:
        stopped = began or ([] if folder is None else [str(folder)])
        raise _Interrupted("interrupted" + _go_on(stopped)) from None
    except (ValueError, OSError) as error:
        raise FedspanError(_message(error) + _go_on(began)) from error
    from fedspan.display import report

    console.print()
    console.print(report.summary_table(result.summary), highlight=False)
    console.print()
    for line in _next_steps(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _next_steps(result: Result) -> Iterator[str]:
    from fedspan.display.progress import duration

    yield f"{result.out}/  {duration(result.summary['totals']['wall_seconds'])}, metrics.jsonl, summary.json"
    if result.adapter is not None:
        yield f"load the adapter:  PeftModel.from_pretrained(base, {str(result.adapter)!r})"
    elif (result.out / "model").exists():
        yield f"load the model:  AutoModel….from_pretrained({str(result.out / 'model')!r})"


def _go_on(folders: Sequence[str]) -> str:
    """What to type next, once there is a run folder."""
    return f"; go on with: fedspan resume {folders[0]}" if folders else ""


class _Interrupted(Exception):
    """Ctrl-C, with what to say about it."""


def _console() -> Console:
    # Tables are not folded for a pipe, so that a line of the table stays a line.
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _message(error: BaseException) -> str:
    """An error in one line, as a user would say it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _quiet_libraries() -> None:
    # The libraries' own bars and advice would be written across the display.
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def main(args: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0, 2 for what a user got wrong, 130 for Ctrl-C.

    With FEDSPAN_DEBUG=1 in the environment the traceback of an error is shown.
    """
    given = list(sys.argv[1:] if args is None else args)
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without our letters is no reason to fail
    try:
        command = typer.main.get_command(app)
        code = command.main(given or ["--help"], prog_name="fedspan", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except _Interrupted as error:
        return _fail(str(error), 130)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _USAGE_ERROR as error:
        if os.environ.get("FEDSPAN_DEBUG"):
            raise
        return _fail(_usage(error), 2)
    except (ValueError, OSError) as error:
        if os.environ.get("FEDSPAN_DEBUG"):
            raise
        return _fail(_message(error), 2)
    except RuntimeError as error:
        # Torch's own class of it, told by its name so that this file does not import torch.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail("the GPU's memory is full; try a smaller local.batch_size or data.max_length, or device=cpu", 2)


def _usage(error: Exception) -> str:
    """A mistake in the command line: what is wrong, and where to read what is right."""
    text = " ".join(str(getattr(error, "format_message", lambda: error)()).split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "fedspan"
    return f"{text[:1].lower()}{text[1:]}; see `{command} --help`"


def _fail(message: str, code: int) -> int:
    print(f"fedspan: {message}", file=sys.stderr)
    return code
