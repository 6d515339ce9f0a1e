"""The functions that run a federation, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedspan.config import Config, from_mapping, load
from fedspan.display.console import console_for
from fedspan.display.session import watch
from fedspan.runs import execution
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

    On a terminal a progress display is shown, in a notebook one line per round, and a table of the result at the end.
    Elsewhere, as in a script whose output goes to a file, nothing is printed.

    Parameters
    ----------
    config
        Settings: a `Config`, nested settings such as ``{"federation": {"rounds": 6}}``, or the path of a TOML file;
        None: the built-in defaults.
    out
        The run folder; None: ``runs/METHOD-TIME``.
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
    quiet: bool | None = None,
    transport: Transport | None = None,
) -> Result:
    """Continue an interrupted run; the result has the same bits as that of an uninterrupted one.

    Parameters
    ----------
    out
        The run folder.
    on_event, quiet, transport
        As for `run`.
    workers
        Number of processes; None: as the run's own settings say.

    Raises
    ------
    FedspanError
        When `out` holds no run.
    """
    return _shown(lambda listen: execution.resume(Path(out), listen, workers, transport), on_event, quiet)


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
