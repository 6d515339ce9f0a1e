"""The server's ServerApp: one federation over Flower's messages, from its folder, into its folder.

The folder is named by `server-dir` of the run's configuration, or FEDSPAN_SERVER_DIR. It holds the federation's
`config.toml`; the run is kept in `runs/NAME` there (`run-name`, "federation" unless given), and a run that was
interrupted goes on from where that folder stands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedspan import config as settings
from fedspan import runs
from fedspan.engine import Event
from fedspan.flower.port import GridPort

SERVER_DIR = "FEDSPAN_SERVER_DIR"
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run or resume the federation to its end."""
    folder, name = _where(context)
    config = settings.load(folder / "config.toml")
    result = runs.serve(config, folder / "runs" / name, said(sys.stdout.write), GridPort(grid, name))
    sys.stdout.write(f"summary: {result.out / 'summary.json'}\n")


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
        raise ValueError(f"no server folder: expected server-dir in the run's configuration, or {SERVER_DIR}")
    name = str(context.run_config.get("run-name") or "federation")
    if Path(name).name != name:
        raise ValueError(f"run-name = {name!r}: expected a plain name")
    return Path(str(named)), name
