"""The `fedspan` command: parse, call, print.

A mistake of the user ends in one line on stderr and exit code 2, a bug of ours in one line that names the file with
its traceback and exit code 1. Heavy libraries are imported inside the commands, so that help, version and mistakes
answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fedspan.cli import flower, log
from fedspan.cli.arguments import PlainCommand, WithWeights, new_app
from fedspan.cli.audit import audit, canaries
from fedspan.cli.bench import bench
from fedspan.cli.compare import compare
from fedspan.cli.config import config
from fedspan.cli.evaluate import evaluate
from fedspan.cli.failures import USAGE_ERROR, Bug, Interrupted, is_out_of_memory, is_users, message, report, usage
from fedspan.cli.inspect import inspect
from fedspan.cli.merge import merge
from fedspan.cli.methods import methods
from fedspan.cli.plot import plot
from fedspan.cli.predict import predict
from fedspan.cli.report import report as write_report
from fedspan.cli.run import resume, run
from fedspan.cli.watch import watch
from fedspan.distributed.environment import Place, place
from fedspan.support import tokenizer_threads
from fedspan.support.errors import FedspanError


def _version(wanted: bool) -> None:
    if wanted:
        from fedspan.support.versions import installed_version

        print(f"fedspan {installed_version('fedspan')}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune one transformer over many private datasets, with aggregation rules whose exactness is stated and
    tested.

    `fedspan run` without a config shows the whole in under a minute on two cores: eight clients with different tasks
    and LoRA ranks, GLoRA on the server, and a table that compares the untouched base, a client alone and the
    federation.
    """


app = new_app(add_completion=True)
app.callback()(_top)
app.command(cls=PlainCommand, short_help="Run a federation, with its controls.")(run)
app.command(cls=PlainCommand, short_help="Continue an interrupted run, or extend one.")(resume)
app.command(cls=PlainCommand, short_help="Evaluate a run or an adapter on new data.")(evaluate)
app.command(cls=PlainCommand, short_help="Write a run's or an adapter's predictions for new data.")(predict)
app.command(cls=PlainCommand, short_help="Compare arms over seeds, tuned, with verdicts.")(compare)
app.command(cls=WithWeights, short_help="Merge PEFT adapters by an aggregation rule.")(merge)
app.command(cls=PlainCommand, short_help="List the methods, their properties and options.")(methods)
app.command(cls=PlainCommand, short_help="Print every setting as TOML.")(config)
app.command(cls=PlainCommand, short_help="Draw learning curves of runs.")(plot)
app.command("report", cls=PlainCommand, short_help="Write an HTML page on runs or a comparison.")(write_report)
app.command(cls=PlainCommand, short_help="Show the report of a run that goes on in a browser.")(watch)
app.command(cls=PlainCommand, short_help="Show what a run's server steps did to the updates.")(inspect)
app.command(cls=PlainCommand, short_help="Attack a run or an adapter, and say what was found.")(audit)
app.command(cls=PlainCommand, short_help="Plant made-up rows for an audit to look for.")(canaries)
app.command(cls=PlainCommand, short_help="Time every part against its alternatives.")(bench)
app.add_typer(log.app, name="log", short_help="Verify and show the logs of a server and its sites.")
app.add_typer(flower.app, name="flower", short_help="Deploy a federation of real sites over Flower.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a bug, 2 for a mistake of the user, 130 for Ctrl-C.

    With FEDSPAN_DEBUG=1 in the environment the traceback of an error is shown.
    """
    given = list(sys.argv[1:] if args is None else args)
    _prepare()
    try:
        where = place()
    except FedspanError as error:
        return _fail(message(error), 2)
    return _command(given) if where is None else _one_of_several(where, given)


def _one_of_several(where: Place, given: Sequence[str]) -> int:
    """Do this process's part of a run that torchrun has started several processes for."""
    from fedspan.distributed.leader import Ended, exit_now, leader_of

    try:
        code = _follow(where) if where.rank > 0 else _lead(given)
    except Ended as error:  # after the run's own end
        code = _fail(str(error), 2)
    except Exception as error:
        code = _failed(error)
    finally:
        if where.rank == 0:
            leader_of(where).leave()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    exit_now(code)
    return code


def _lead(given: Sequence[str]) -> int:
    if given[:1] not in (["run"], ["resume"]):
        return _fail(f"{' '.join(given[:1]) or 'no command'} in processes of torchrun: expected run or resume", 2)
    return _command(given)


def _follow(where: Place) -> int:
    """Work for the process that leads the run, which alone reads the command's arguments and says something."""
    from fedspan.distributed.follower import follow
    from fedspan.runs.distributed import FollowerWork

    return follow(where, FollowerWork(where), lambda line: print(f"fedspan: {line}", file=sys.stderr))


def _command(given: Sequence[str]) -> int:
    try:
        command = typer.main.get_command(app)
        code = command.main(list(given), prog_name="fedspan", standalone_mode=False)
        if sys.stdout is not None:  # it was closed before the start
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:
        return _fail(str(error) if isinstance(error, Interrupted) else "interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has seen enough; Python must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FEDSPAN_DEBUG"):
            raise
        return _failed(error)


def _prepare() -> None:
    # The libraries' own bars and advice would be written across the display.
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    tokenizer_threads.one_core()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without our letters is no reason to fail


def _failed(error: Exception) -> int:
    if "_FEDSPAN_COMPLETE" in os.environ:
        given = f"{type(error).__name__}: {message(error)}"
        return _fail(f"shell completion failed ({given}): expected a call by the script of --install-completion", 2)
    if isinstance(error, USAGE_ERROR):
        return _fail(usage(error), 2)
    if is_users(error):
        return _fail(message(error), 2)
    if is_out_of_memory(error):
        return _fail("the GPU's memory is full; try a smaller local.batch_size or data.max_length, or device=cpu", 2)
    if isinstance(error, Bug) and error.__cause__ is not None:
        return _fail(report(error.__cause__, error.folder), 1)
    return _fail(report(error, None), 1)


def _fail(line: str, code: int) -> int:
    print(f"fedspan: {line}", file=sys.stderr)
    return code
