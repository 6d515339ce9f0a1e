"""The server's ServerApp: one federation over Flower's messages, from its folder, into its folder.

The folder is named by `server-dir` of the run's configuration, or FEDSPAN_SERVER_DIR. It holds the federation's
`config.toml`; the run is kept in `runs/NAME` there (`run-name`, "federation" unless given), and a run that was
interrupted goes on from where that folder stands. One process at a time leads a run.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedspan import config as settings
from fedspan.flower.grid_transport import GridTransport
from fedspan.flower.records import one_line
from fedspan.runs import execution
from fedspan.runs.engine import Event
from fedspan.support.errors import FedspanError

SERVER_DIR = "FEDSPAN_SERVER_DIR"
PATIENCE = 20.0
"""Seconds that another process which leads the same run has to end."""
_LOOK = 0.2
_TOLD = (ValueError, ConnectionError)
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the federation to its end; what ends it early is told in one line."""
    try:
        folder, name = _where(context)
        config = settings.load(folder / "config.toml")
        with leading(folder / "runs", name):
            result = execution.serve(config, folder / "runs" / name, said(sys.stdout.write), GridTransport(grid, name))
    except _TOLD as error:
        logging.getLogger("flwr").addFilter(_without_traceback)
        sys.stdout.write(f"fedspan: {one_line(error)}\n")
        raise
    sys.stdout.write(f"summary: {result.out / 'summary.json'}\n")


@contextmanager
def leading(folder: Path, name: str, patience: float = PATIENCE) -> Iterator[None]:
    """Lead the run of that name alone: two processes would overwrite each other's checkpoints.

    Raises
    ------
    ValueError
        When another process still leads it after `patience` seconds; one whose SuperLink was killed ends by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("wb") as lock:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the system, however this process ends
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise FedspanError(f"another process leads the run {name!r}: expected it to have ended") from None
                time.sleep(_LOOK)
        yield


def _without_traceback(record: logging.LogRecord) -> bool:
    """What Flower logs of an error whose line says all."""
    if record.exc_info and isinstance(record.exc_info[1], _TOLD):
        record.exc_info = None
    return True


def said(write: Callable[[str], object]) -> Callable[[Event], None]:
    """One line for every event, of what can be said in a line."""

    def on_event(event: Event) -> None:
        told = " ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in event.data.items()
            if isinstance(value, str | int | float)
        )
        write(f"{event.kind}: {told}\n")
        sys.stdout.flush()

    return on_event


def _where(context: Context) -> tuple[Path, str]:
    """The server's folder and the run's name."""
    named = context.run_config.get("server-dir") or os.environ.get(SERVER_DIR)
    if not named:
        raise FedspanError(f"no server folder: expected server-dir in the run's configuration, or {SERVER_DIR}")
    name = str(context.run_config.get("run-name") or "federation")
    if Path(name).name != name:
        raise FedspanError(f"run-name = {name!r}: expected a plain name")
    return Path(str(named)), name
