"""Two regions over Flower's own grids in memory and Unix sockets: all of the way but SuperLinks and SuperNodes."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny
from flwr.clientapp import ClientApp
from flwr.common.constant import HEARTBEAT_INTERVAL_INF, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from grids import Field
from run_folders import state_of
from test_between_processes import settings

from fedspan.events import chain
from fedspan.events.verify import verify
from fedspan.flower import region_app, region_deployment, trial
from fedspan.flower.client_app import client_app
from fedspan.flower.client_app_process import RegionProcess
from fedspan.flower.grid_transport import GridTransport
from fedspan.flower.node_clients import NodeClients
from fedspan.flower.node_keys import read_keys
from fedspan.runs.events import Event
from fedspan.runs.execution import run, serve
from fedspan.site.settings import SiteSettings
from fedspan.site.site import Site
from fedspan.wire.unix_socket import socket_path

pytest.importorskip("cryptography")
REGIONS = {"north": ["a", "b"], "south": ["c", "d"]}
CLIENTS = {site: f"client-{k}" for k, site in enumerate("abcd")}


class Keyed(Field):
    """A grid whose nodes have the keys of a server's folder."""

    def __init__(self, apps: Mapping[str, ClientApp], server: Path) -> None:
        self._apps, self._keys, self._names = apps, read_keys(server / "nodes"), iter(apps)
        self._name_of: dict[int, str] = {}
        super().__init__(list(apps.values()), [{} for _ in apps])

    def _node(self) -> int:
        name = next(self._names)
        key = self._keys.get(name, secrets.token_bytes(32))
        node: int = self.state.create_node(
            NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, heartbeat_interval=HEARTBEAT_INTERVAL_INF
        )
        self.state.acknowledge_node_heartbeat(node_id=node, heartbeat_interval=HEARTBEAT_INTERVAL_INF)
        self._name_of[node] = name
        return node

    def _serve(self, node: int, app: ClientApp, config: dict[str, str]) -> None:
        super()._serve(node, self._apps[self._name_of[node]], config)


@pytest.fixture
def grids() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def started(grids: ExitStack, apps: Mapping[str, ClientApp], server: Path) -> Keyed:
    made = Keyed(apps, server)
    made.start()
    grids.callback(made.stop)
    return made


def app_of(site: Site, lock: threading.Lock) -> ClientApp:
    """A site's ClientApp; the sites of these tests share one base, on which one of them works at a time."""

    def call(folder: Path, content: bytes, timeout: float) -> bytes:
        with lock:
            return site.answer(content)

    return client_app(call, Path("site"))


def test_two_regions_over_grids_and_sockets_come_to_the_bits_of_one_process(
    bases: dict[str, Path], texts: Path, tmp_path: Path, grids: ExitStack
) -> None:
    """Under masks; and the logs of both levels agree, each with those that it speaks to."""
    masked = settings(bases["bert"], texts, "glora_sums", 4, secure_sums=True)
    folder, alone = tmp_path / "tree", tmp_path / "alone"
    config = region_deployment.in_regions(masked, REGIONS, CLIENTS)
    trial.prepare_regions(folder, REGIONS, config)
    lock, loaded = threading.Lock(), None
    for name, members in REGIONS.items():
        server, apps = folder / "regions" / name / "server", {}
        for member in members:
            home = folder / "regions" / name / "sites" / member
            site = Site(SiteSettings.read(home), home, loaded)
            loaded, apps[member] = site.loaded, app_of(site, lock)
        field = started(grids, apps, server)
        threading.Thread(target=region_app.serve, args=(field.grid, server, "region"), daemon=True).start()
    uplinks = {name: folder / "regions" / name / "uplink" for name in REGIONS}
    up = {name: client_app(RegionProcess().call, path) for name, path in uplinks.items()}
    above = started(grids, up, folder / "server")
    lines: list[str] = []

    def listen(event: Event) -> None:
        if event.kind == "site":
            lines.append(event.data["line"])

    transport = GridTransport(above.grid, "tree", NodeClients(folder / "server"))
    out = folder / "server" / "runs" / "federation"
    result = serve(config, out, listen, transport)
    assert [(record["num_clients"], record["rejected"]) for record in result.history] == [(4, {})] * 2, lines
    assert all(socket_path(path).exists() for path in uplinks.values())

    run(settings(bases["bert"], texts, "glora_sums", 4, fixed_point=True), alone)
    tiny.same(state_of(out), state_of(alone))
    assert verify([chain.read(path / chain.FILE) for path in (out, *uplinks.values())]).findings == []
    for name, members in REGIONS.items():
        own = folder / "regions" / name / "server" / "runs" / "region"
        below = [folder / "regions" / name / "sites" / member for member in members]
        assert verify([chain.read(path / chain.FILE) for path in (own, *below)]).findings == []
