"""The server's ServerApp: one federation over Flower's messages, from its folder, into its folder.

The folder is named by `server-dir` of the run's configuration, or FEDSPAN_SERVER_DIR. It holds the federation's
`config.toml`, the sites' keys and their client ids. The run is kept in `runs/NAME` there (`run-name`, "federation"
unless given), and a run that was interrupted is resumed from its checkpoint. One process at a time leads a run.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedspan import config as settings
from fedspan.events import fingerprints
from fedspan.flower.grid_transport import GridTransport
from fedspan.flower.log_levels import without_traceback
from fedspan.flower.node_clients import NodeClients
from fedspan.privacy.identities import read_identities
from fedspan.runs import execution
from fedspan.runs.events import Event
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire.names import check_name

SERVER_DIR = "FEDSPAN_SERVER_DIR"
PATIENCE = 20.0
"""Seconds to wait for another process that leads the same run to end."""
_POLL = 0.2
IDENTITIES = "sites.json"
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the federation to its end; report an error that ends it early in one line."""
    try:
        folder, name = folder_and_name(context)
        config = settings.load(folder / "config.toml")
        clients = NodeClients(folder)
        clients.check()
        with leadership(folder / "runs", name):
            transport = GridTransport(grid, name, clients)
            # Where the sites sign their keys for secure sums, the server checks it before it passes them on.
            trusted = read_identities(folder / IDENTITIES) if (folder / IDENTITIES).exists() else None
            write = event_writer(sys.stdout.write)
            keys = fingerprints.of_folder(folder)
            result = execution.serve(config, folder / "runs" / name, write, transport, trusted, keys)
    except (FedspanError, OSError) as error:
        without_traceback(FedspanError, OSError)
        sys.stdout.write(f"fedspan: {one_line(error)}\n")
        raise
    sys.stdout.write(f"summary: {result.out / 'summary.json'}\n")


@contextmanager
def leadership(folder: Path, name: str, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of the run of that name: two processes would overwrite each other's checkpoints.

    Raises
    ------
    FedspanError
        When another process still leads it after `patience` seconds; one whose SuperLink was killed ends by itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("wb") as lock:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it, however this process ends
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise FedspanError(f"another process leads the run {name!r}: expected it to have ended") from None
                time.sleep(_POLL)
        yield


def event_writer(write: Callable[[str], object]) -> Callable[[Event], None]:
    """Return a handler that writes each event's numbers and strings in one line."""

    def on_event(event: Event) -> None:
        text = " ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in event.data.items()
            if isinstance(value, str | int | float)
        )
        write(f"{event.kind}: {text}\n")
        sys.stdout.flush()

    return on_event


def folder_and_name(context: Context) -> tuple[Path, str]:
    """Return the server's folder and the run's name."""
    folder = context.run_config.get("server-dir") or os.environ.get(SERVER_DIR)
    if not folder:
        raise FedspanError(f"no server folder: expected server-dir in the run's configuration, or {SERVER_DIR}")
    return Path(str(folder)), check_name(context.run_config.get("run-name") or "federation", "run-name")
