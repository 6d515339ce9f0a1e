"""The functions that run a federation, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspan import comparison
from fedspan.comparison import AT_ONCE, Comparison
from fedspan.config import Config, from_mapping, load
from fedspan.display.console import console_for
from fedspan.display.session import watch
from fedspan.runs import check as run_check
from fedspan.runs import execution, many
from fedspan.runs.check import RunCheck
from fedspan.runs.events import Event, OnEvent
from fedspan.runs.execution import Result
from fedspan.wire.transport import Transport


def run(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    on_event: OnEvent | None = None,
    *,
    quiet: bool | None = None,
    transport: Transport | None = None,
) -> Result:
    """Run a federation into a new folder, of simulated clients unless a transport is given.

    On a terminal a progress display is shown, in a notebook a text that is kept up to date, and a table of the result
    at the end.
    Elsewhere, as in a script whose output goes to a file, nothing is printed.

    Parameters
    ----------
    config
        Settings: a `Config`, nested settings such as ``{"federation": {"rounds": 6}}``, or the path of a TOML file;
        None: the built-in defaults.
    out
        The run folder; None: ``runs/METHOD-TIME-NUMBER``.
    on_event
        Called with every `Event` of the run, whatever is shown.
    quiet
        True: print nothing. False: print one line per round where there is neither a terminal nor a notebook.
    transport
        Reaches the clients at their sites; None: they are simulated in this process.

    Raises
    ------
    FedspanError
        For anything wrong with the settings, the data or the model, before any training starts; and when a round
        fails, after which `resume` continues.
    """
    settings, folder = _settings(config), None if out is None else Path(out)
    return _shown(lambda listen: execution.run(settings, folder, listen, transport), on_event, quiet)


def resume(
    out: str | os.PathLike[str],
    on_event: OnEvent | None = None,
    workers: int | None = None,
    *,
    rounds: int | None = None,
    quiet: bool | None = None,
    transport: Transport | None = None,
) -> Result:
    """Continue an interrupted run, or extend a finished one; the result has the same bits as if it had never stopped.

    Parameters
    ----------
    out
        The run folder.
    on_event, quiet, transport
        As for `run`.
    workers
        Number of processes; None: as the run's own settings say.
    rounds
        Number of rounds in all, to extend a finished run or to stop sooner; None: as the run's own settings say.

    Raises
    ------
    FedspanError
        When `out` holds no run; when another process is at work in it; when it is damaged; for other settings, data,
        base or libraries than it began with, unless these may change.
    """
    return _shown(
        lambda listen: execution.resume(Path(out), listen, workers, transport, rounds=rounds), on_event, quiet
    )


def run_many(
    configs: Sequence[Config | Mapping[str, Any] | str | os.PathLike[str]],
    outs: Sequence[str | os.PathLike[str] | None] | None = None,
    on_event: many.OnRunEvent | None = None,
    *,
    apart: bool = False,
) -> list[Result]:
    """Run several federations of simulated clients at once, such as the seeds and methods of a comparison.

    Runs over one base share its memory, and their clients share passes over it. Each is the ordinary run, with its own
    folder, which `resume` continues too; its results agree with those of the run alone up to rounding. Nothing is
    printed.

    Parameters
    ----------
    configs
        The settings of each run, as for `run`.
    outs
        The run folders, one for each; a folder that holds a run of the same settings is resumed. None: new ones under
        ``runs``.
    on_event
        Called with the number of the run, from 0, and every `Event` of it.
    apart
        Let only clients of one run share a pass over the base: every result then has the bits of the run alone on the
        same device, whatever else is run with it.

    Raises
    ------
    FedspanError
        For anything wrong with one of the runs, before any of them trains; for one that fails on the way when the
        others have ended. The message names the run, counted from 1.
    """
    settings = [_settings(config) for config in configs]
    return many.run_many(settings, outs, many.ignore if on_event is None else on_event, apart=apart)


def compare(
    suite: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    quiet: bool | None = None,
    at_once: int = AT_ONCE,
) -> Comparison:
    """Compare arms over seeds, and judge their paired differences; an interrupted comparison goes on.

    Parameters
    ----------
    suite
        The TOML file that describes the comparison (docs/comparing.md).
    out
        The folder of the comparison, new or begun; None: ``runs/NAME``.
    quiet
        As for `run`: a line for every finished run is shown on a terminal and in a notebook, unless this is True.
    at_once
        Most runs in memory at once. On a CPU it changes no result.

    Raises
    ------
    FedspanError
        For anything wrong with the suite, before any training; for a folder that holds something else, or another
        comparison; and for a run that fails, after which the same call goes on.
    """
    console = console_for(quiet)

    def show(line: str) -> None:
        if console is not None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    return comparison.compare(suite, out, show, at_once=at_once)


def check(
    config: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
) -> RunCheck:
    """Return what can be known of a run before it trains: rows, clients, parameters, traffic, memory, time.

    One round of one step is tried with a client of every rank. Nothing is printed, and nothing is left on the disk.

    Parameters
    ----------
    config, out
        As for `run`.

    Raises
    ------
    FedspanError
        For everything that `run` would refuse before any training.
    """
    return run_check.check(_settings(config), out)


def _settings(config: Config | Mapping[str, Any] | str | os.PathLike[str] | None) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return from_mapping(config)
    return load(config, must_exist=True)


def _shown(work: Callable[[OnEvent], Result], on_event: OnEvent | None, quiet: bool | None) -> Result:
    listeners = [] if on_event is None else [on_event]
    console = console_for(quiet)
    if console is None:
        return work(_each(listeners))
    return watch(lambda show: work(_each([*listeners, show])), console)


def _each(listeners: list[OnEvent]) -> OnEvent:
    def on_event(event: Event) -> None:
        for listen in listeners:
            listen(event)

    return on_event
