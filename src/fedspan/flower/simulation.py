"""A federation on Flower's simulation engine: the deployment's server and sites in one process each, on one machine."""

from __future__ import annotations

import importlib.util
import logging
import threading
import tomllib
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedspan import config as settings
from fedspan.client.setup import device_of
from fedspan.config import Config, to_toml
from fedspan.data import load as load_data
from fedspan.federation import requirements
from fedspan.federation.clients import make_clients
from fedspan.flower import records
from fedspan.flower.client_app import refusal
from fedspan.flower.grid_transport import GridTransport
from fedspan.flower.log_levels import errors_only
from fedspan.models.placement import is_spread
from fedspan.runs import execution
from fedspan.runs.events import OnEvent
from fedspan.runs.execution import Result
from fedspan.site.loading import Loaded
from fedspan.site.settings import SiteSettings
from fedspan.site.site import Site
from fedspan.support.errors import FedspanError
from fedspan.wire.refusals import Code


def run(config: Config, out: Path, on_event: OnEvent) -> Result:
    """Run or resume a federation of simulated sites.

    The result has the same bits as `fedspan.run` with `engine.name = "sequential"`, which is a site's default engine.

    Ray starts one process that keeps the base, the data and all sites between messages: a site holds its state between
    the messages of a round in memory, so its messages must all reach the same process. The clients' persistent state
    is under `out/sites`.

    Raises
    ------
    FedspanError
        When Ray is missing, or for an error in the settings, the data or the model.
    """
    if importlib.util.find_spec("ray") is None:
        raise FedspanError("the engine flower-simulation needs Ray: pip install 'flwr[simulation]>=1.41,<1.43'")
    from flwr.simulation import run_simulation

    corpus = load_data(config.data, config.data_seed)
    clients = make_clients(corpus, config.federation, config.federation_seed, config.data.client_holdout)
    results: list[Result] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(execution.serve(config, out, on_event, GridTransport(grid, "simulation")))

    gpus = 0
    if device_of(config.device).type == "cuda":
        gpus = torch.cuda.device_count() if is_spread(config.engine.device_map) else 1
    with errors_only():
        run_simulation(
            server,
            client_app(to_toml(config), str((out / "sites").resolve())),
            len(clients),
            backend_config={
                "init_args": {"num_cpus": 1, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": float(gpus)},
            },
        )
    return results[0]


def client_app(config: str, folder: str) -> ClientApp:
    """Return the ClientApp of all simulated sites.

    Parameters
    ----------
    config
        The federation's settings as TOML, because Flower sends the app to Ray's process as plain values.
    folder
        Folder of the sites' persistent state.
    """
    app = ClientApp()

    @app.query("fedspan")
    def answer(message: Message, context: Context) -> Message:
        return answer_message(message, context, config, folder)

    return app


_SITES: dict[tuple[str, str], SimulatedSites] = {}
"""The sites by settings and folder; a module-level cache is all that Ray's process keeps between messages."""
_LOCK = threading.Lock()
_log = logging.getLogger("fedspan.flower")


class SimulatedSites:
    """All sites of a federation in one process, which share the base and the data."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        corpus = load_data(config.data, config.data_seed)
        clients = make_clients(corpus, config.federation, config.federation_seed, config.data.client_holdout)
        self._clients = sorted(clients, key=lambda client: client.client_id)
        largest = max(client.rank for client in self._clients)
        self._loaded = Loaded.of(config, requirements.chosen(config), corpus, largest)
        self._sites: dict[str, Site] = {}

    def site(self, number: int) -> Site:
        """Return the site with that position in the sorted client ids; created at the first call."""
        client_id = self._clients[number].client_id
        if client_id not in self._sites:
            site = SiteSettings(self.config, client_id), self.folder / client_id, self._loaded
            self._sites[client_id] = Site(*site, notify=_log.warning)
        return self._sites[client_id]


def answer_message(message: Message, context: Context, config: str, folder: str) -> Message:
    """Return a site's answer, or a refusal with the reason."""
    try:
        content, _ = records.unpack(message)
        number = int(context.node_config["partition-id"])
        with _LOCK:
            if (config, folder) not in _SITES:
                _SITES[config, folder] = SimulatedSites(settings.from_mapping(tomllib.loads(config)), Path(folder))
            return Message(records.pack(_SITES[config, folder].site(number).answer(content)), reply_to=message)
    except Exception as error:
        return refusal(message, Code.FAILED, error)
