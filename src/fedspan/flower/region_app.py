"""A region's ServerApp: it answers the server above, from its folder, for as long as its SuperLink runs.

The folder is named by FEDSPAN_SERVER_DIR. Beside what every server's has, `region.json` holds the region's name and the
folder of its way up: there it listens on a Unix socket for what the SuperNode that is connected to the server above
passes on (`fedspan.flower.client_app_process --region`).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedspan import config as settings
from fedspan.events import fingerprints
from fedspan.flower.grid_transport import GridTransport
from fedspan.flower.log_levels import without_traceback
from fedspan.flower.node_clients import NodeClients
from fedspan.flower.region_deployment import REGION
from fedspan.flower.server_app import IDENTITIES, event_writer, folder_and_name, leadership
from fedspan.privacy.identities import read_identities
from fedspan.regions.regional_server import RegionalServer
from fedspan.runs.events import Event
from fedspan.runs.logged import logged
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire.unix_socket import Listener

_LOOK = 2.0
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Serve until the SuperLink ends; report an error that ends it early in one line."""
    try:
        folder, name = folder_and_name(context)
        with leadership(folder / "runs", name):
            serve(grid, folder, name)
    except (FedspanError, OSError) as error:
        without_traceback(FedspanError, OSError)
        sys.stdout.write(f"fedspan: {one_line(error)}\n")
        raise


def serve(grid: Grid, folder: Path, name: str) -> None:
    """Answer the server above with what a region's server at `folder` sums, in the run of that name.

    Raises
    ------
    FedspanError
        When the folder is no region's server's, or its settings cannot be summed region by region.
    """
    region, uplink = _region(folder)
    config, clients = settings.load(folder / "config.toml"), NodeClients(folder)
    clients.check()
    out, write = folder / "runs" / name, event_writer(sys.stdout.write)
    trusted = read_identities(folder / IDENTITIES) if (folder / IDENTITIES).exists() else None
    transport = GridTransport(grid, name, clients)
    on_event, logged_transport = logged(out, config, write, transport, trusted, fingerprints.of_folder(folder))

    def notify(line: str) -> None:
        on_event(Event("site", {"line": line}))

    server = RegionalServer(region, config, logged_transport, out, notify, trusted, uplink)
    listener = Listener(uplink)
    threading.Thread(target=_end_with_parent, args=(listener,), daemon=True).start()
    sys.stdout.write(f"the region {region} is served\n")
    sys.stdout.flush()
    listener.serve(server.answer)


def _region(folder: Path) -> tuple[str, Path]:
    """Return the region's name and the folder of its way up."""
    path = folder / REGION
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, uplink = record["region"], record["uplink"]
        if not isinstance(name, str) or not isinstance(uplink, str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise FedspanError(f'{path}: expected {{"region": NAME, "uplink": FOLDER}} of a region\'s server') from None
    found = (folder / uplink).resolve()
    if not found.is_dir():
        raise FedspanError(f"{found}: expected the folder of the region's way up (uplink in {path})")
    return name, found


def _end_with_parent(listener: Listener) -> None:
    """End when the process that started this one has: it waits for calls, and would not notice otherwise."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(_LOOK)
    listener.close()
