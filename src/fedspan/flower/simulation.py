"""A federation on Flower's simulation engine: the deployment's server and sites in one process each, on one machine."""

from __future__ import annotations

import importlib.util
import logging
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
from fedspan.runs import execution
from fedspan.runs.engine import OnEvent
from fedspan.runs.execution import Result
from fedspan.site.loading import Loaded
from fedspan.site.settings import Settings
from fedspan.site.site import Site
from fedspan.support.errors import FedspanError


def run(config: Config, out: Path, on_event: OnEvent) -> Result:
    """Run or resume a federation of simulated sites.

    The same bits as `fedspan.run` with `engine.name = "sequential"`, which is how a site trains unless told otherwise.

    Ray starts one process that holds the base, the data and all sites between messages: what a site keeps from one
    message of a round to the next is in its memory, so its messages must not go from process to process. The
    clients' own state is under `out/sites`.

    Raises
    ------
    ValueError
        When Ray is missing, or for anything wrong with the settings, the data or the model.
    """
    if importlib.util.find_spec("ray") is None:
        raise FedspanError("the engine flower-simulation needs Ray: pip install 'flwr[simulation]>=1.41,<1.43'")
    from flwr.simulation import run_simulation

    clients = make_clients(config, load_data(config.data, config.seed))
    results: list[Result] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(execution.serve(config, out, on_event, GridTransport(grid, "simulation")))

    on_gpu = device_of(config.device).type == "cuda"
    with _errors_only():
        run_simulation(
            server,
            client_app(to_toml(config), str((out / "sites").resolve())),
            len(clients),
            backend_config={
                "init_args": {"num_cpus": 1, "include_dashboard": False},
                "client_resources": {"num_cpus": 1, "num_gpus": 1.0 if on_gpu else 0.0},
            },
        )
    return results[0]


@contextmanager
def _errors_only() -> Iterator[None]:
    """Flower logs what it does, and that this function is to go; our own events say what matters."""
    logger = logging.getLogger("flwr")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


def client_app(config: str, folder: str) -> ClientApp:
    """The ClientApp of all simulated sites.

    Parameters
    ----------
    config
        The federation's settings as TOML: what is sent to Ray's process is text.
    folder
        Where the sites keep their state.
    """
    app = ClientApp()

    @app.query("fedspan")
    def answer(message: Message, context: Context) -> Message:
        return answered(message, context, config, folder)

    return app


_HELD: dict[tuple[str, str], Everybody] = {}
"""What Ray's process keeps between messages; it has nowhere else to keep anything."""
_AT_WORK = threading.Lock()


class Everybody:
    """All sites of a federation in one process: one base and one set of data for all of them."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        corpus = load_data(config.data, config.seed)
        self._clients = sorted(make_clients(config, corpus), key=lambda client: client.client_id)
        largest = max(client.rank for client in self._clients)
        self._loaded = Loaded.of(config, requirements.chosen(config), corpus, largest)
        self._sites: dict[str, Site] = {}

    def site(self, number: int) -> Site:
        """The site of that number, in the order of the clients' ids."""
        client_id = self._clients[number].client_id
        if client_id not in self._sites:
            self._sites[client_id] = Site(Settings(self.config, client_id), self.folder / client_id, self._loaded)
        return self._sites[client_id]


def answered(message: Message, context: Context, config: str, folder: str) -> Message:
    """A site's answer, or why there is none."""
    try:
        content, _ = records.unpack(message)
        number = int(context.node_config["partition-id"])
        with _AT_WORK:
            if (config, folder) not in _HELD:
                _HELD[config, folder] = Everybody(settings.from_mapping(tomllib.loads(config)), Path(folder))
            return Message(records.pack(_HELD[config, folder].site(number).answer(content)), reply_to=message)
    except Exception as error:
        return refusal(message, error)
