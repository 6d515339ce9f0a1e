"""Access to a federation, and the calls that its proxy forwards: a real SuperLink behind nginx and our own proxy."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import ssl
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from starlette.requests import Request

from fedspan.config import load
from fedspan.flower import certificates, node_keys, proxy, trial
from fedspan.flower.deployment import Deployment
from fedspan.flower.process_tree import ProcessTree
from fedspan.flower.runtime import Runtime, SuperNodeLost

SITES = ("north", "south", "spare")
PROXIES = [
    pytest.param("nginx", marks=pytest.mark.skipif(trial.choose_proxy("auto") != "nginx", reason="needs nginx")),
    "python",
]
HEARTBEAT = 30.0

Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Server:
    """A SuperLink with its proxies."""

    folder: Path
    plan: Deployment
    tree: ProcessTree
    ports: dict[str, int]
    runtimes: dict[str, int] = field(default_factory=dict)

    @property
    def ca(self) -> Path:
        return self.folder / "server/ca.crt"

    def key(self, site: str) -> Key:
        key = load_ssh_private_key((self.folder / "sites" / site / "node.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def status(self) -> dict[str, str]:
        """Every registered node's, from the control API, which this machine alone can reach."""
        client = node_keys.connect(f"localhost:{self.plan.superlink_port}", self.ca)
        try:
            return {node.name: node.status for node in node_keys.nodes(client)}
        finally:
            client.close()

    def start_node(
        self, name: str, key: Path, ca: Path, port: int, environment: Mapping[str, str] | None = None
    ) -> int:
        """The port of its runtime API, which asks for the site's runtime key."""
        runtime = trial.free_ports(1)[0]
        command = [sys.executable, "-m", "fedspan.flower.node", "--superlink", f"localhost:{port}"]
        command += ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
        command += ["--isolation", "process", "--host", "127.0.0.1", "--port", str(runtime)]
        command += ["--superexec-auth-secret-file", str(key.with_name("runtime.key"))]
        self.tree.start(name, command, self.folder, {"FLWR_HOME": str(self.folder / "home"), **(environment or {})})
        return runtime

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("security") / "fed"
    plan = trial.prepare(folder, SITES, load(overrides=["federation.num_clients=3"]))
    (folder / "server/nodes/spare.pub").unlink()  # known to nobody
    first = trial.choose_proxy("auto")
    with ProcessTree(folder / "logs") as tree:
        trial.start(tree, folder, plan, first, lambda line: None, sites=False)
        ports = {first: plan.port}
        if first != "python":
            ports["python"] = trial.free_ports(1)[0]
            command = [
                sys.executable,
                "-m",
                "fedspan.flower.proxy",
                "--host",
                "127.0.0.1",
                "--port",
                str(ports["python"]),
            ]
            command += ["--upstream", f"localhost:{plan.superlink_port}", "--ca", "ca.crt"]
            tree.start(
                "python-proxy", [*command, "--certificate", "server.crt", "--key", "server.key"], folder / "server", {}
            )
            tree.wait("python-proxy", lambda: trial.answers(ports["python"], folder / "server/ca.crt"), trial.READY)
        yield Server(folder, plan, tree, ports)


@pytest.fixture(scope="module")
def connected(server: Server) -> Server:
    """A registered node behind each proxy, which are all online."""
    for site, kind in zip(("north", "south"), ("python", trial.choose_proxy("auto")), strict=True):
        key = server.folder / "sites" / site / "node.key"
        server.runtimes[site] = server.start_node(site, key, server.ca, server.ports[kind])
    for site in ("north", "south"):
        server.tree.wait(site, lambda site=site: server.status()[site] == "online", 30)
    return server


def fleet(server: Server, port: int, signing: Key, shown: Key | None = None, ca: Path | None = None) -> FleetHttpClient:
    """Flower's own client of the fleet API."""
    public = (shown or signing).public_key()
    return FleetHttpClient.from_server_address(
        f"localhost:{port}",
        False,
        (ca or server.ca).read_bytes(),
        [RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(signing, public)],
    )


def activation(key: Key) -> ActivateNodeRequest:
    return ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT)


def test_registered_nodes_connect_through_either_proxy(connected: Server) -> None:
    assert connected.status() == {"north": "online", "south": "online"}


@pytest.mark.parametrize("kind", PROXIES)
def test_an_unregistered_key_is_refused(connected: Server, kind: str) -> None:
    with fleet(connected, connected.ports[kind], key := connected.key("spare")) as client:
        with pytest.raises(httpx.HTTPStatusError, match="activate-node") as refused:
            client.ActivateNode(activation(key))
        # Nor can it register itself.
        with pytest.raises(httpx.HTTPStatusError, match="register-node") as barred:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public_key_to_bytes(key.public_key())))
    assert refused.value.response.status_code == 412
    assert "must be registered via the CLI" in barred.value.response.text
    assert "spare" not in connected.status()


def test_a_supernode_with_an_unregistered_key_ends(connected: Server) -> None:
    key = connected.folder / "sites/spare/node.key"
    connected.start_node("stranger", key, connected.ca, connected.plan.port)
    with pytest.raises(ValueError, match=r"^stranger ended \(exit status [1-9]"):
        connected.tree.wait("stranger", lambda: False, 30)
    assert "Failed to initialize the connection to the SuperLink" in connected.log("stranger")


@pytest.mark.parametrize("kind", PROXIES)
def test_a_key_that_is_in_use_is_refused(connected: Server, kind: str) -> None:
    key = connected.key("north")
    client = fleet(connected, connected.ports[kind], key)
    with client, pytest.raises(httpx.HTTPStatusError) as refused:
        client.ActivateNode(activation(key))
    assert refused.value.response.status_code == 412
    assert connected.status()["north"] == "online"


@pytest.mark.parametrize("kind", PROXIES)
def test_nobody_speaks_for_another(connected: Server, kind: str) -> None:
    """A public key is no secret: without its private key, and with another node's id, it opens nothing."""
    client = node_keys.connect(f"localhost:{connected.plan.superlink_port}", connected.ca)
    ids = {node.name: node.node_id for node in node_keys.nodes(client)}
    client.close()
    north, south, stranger = connected.key("north"), connected.key("south"), generate_key_pairs()[0]
    asking = PullMessagesRequest(node=Node(node_id=ids["north"]))
    for signing, shown in ((stranger, north), (south, south), (stranger, stranger)):
        strange = fleet(connected, connected.ports[kind], signing, shown)
        with strange, pytest.raises(httpx.HTTPStatusError) as refused:
            strange.PullMessages(asking)
        assert refused.value.response.status_code == 401
    with fleet(connected, connected.ports[kind], north) as own:  # it itself may, so that the refusals mean something
        own.PullMessages(asking)


@pytest.mark.parametrize("kind", PROXIES)
def test_a_server_that_another_authority_vouches_for_is_refused(connected: Server, kind: str, tmp_path: Path) -> None:
    other = tmp_path / "other.crt"
    other.write_bytes(certificates.certificate_authority("another").public)
    key = connected.key("north")
    client = fleet(connected, connected.ports[kind], key, ca=other)
    with client, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        client.ActivateNode(activation(key))
    with pytest.raises(ValueError, match="belongs to another server"):
        trial.answers(connected.ports[kind], other)


def test_another_user_of_a_sites_machine_gets_no_task(connected: Server) -> None:
    address, key = f"127.0.0.1:{connected.runtimes['north']}", connected.folder / "sites/north/runtime.key"
    for secret in (None, b"guessed", (connected.folder / "sites/south/runtime.key").read_bytes()):
        with pytest.raises(SuperNodeLost, match="401"):
            Runtime(address, secret=secret).acquire()
    assert Runtime(address, secret=key.read_bytes()).acquire() is False


HIDDEN = [
    *("/v1/control/list-nodes", "/v1/control/register-node", "/v1/control/start-run", "/v1/runtime/acquire-task"),
    *("/", "/docs", "/openapi.json", "/health", "/v1/fleet", "/v1/fleet/", "/v1", "//v1/control/list-nodes"),
    # Ways around a rule on the beginning of a path.
    *("/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes", "/v1/fleet/..%2fcontrol/list-nodes"),
    *("/v1/fleet/.././control/list-nodes", "/v1/fleet/pull-messages/../../control/list-nodes"),
    *(
        "/v1/fleet//../control/list-nodes",
        "/v1/fleet/%252e%252e/control/list-nodes",
        "/v1/fleet/..;/control/list-nodes",
    ),
    *("/v1/fleet\\..\\control\\list-nodes", "/V1/FLEET/pull-messages", "/v1/fleet/pull-messages/", "/v1/fleet/x%0ay"),
    *("/v1/fleet/pull-messages%00", "/v1/fleet/pull-messages%20HTTP/1.1", "https://localhost/v1/control/list-nodes"),
]
# These are tidied up by one proxy into an allowed call, which is what then arrives, or refused by the other.
TIDIED = ["/v1/control/../fleet/pull-messages", "/v1/control/list-nodes%3f/../../fleet/pull-messages"]


def ask(server: Server, port: int, path: str, method: str = "POST", head: str = "") -> int:
    """Send a request whose path nothing tidies up on this side; the status."""
    body = ListNodesRequest().SerializeToString()
    head = head or f"Host: localhost\r\nContent-Length: {len(body)}\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\n"
    trust = ssl.create_default_context(cafile=str(server.ca))
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        trust.wrap_socket(plain, server_hostname="localhost") as channel,
    ):
        channel.sendall(f"{method} {path} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode("latin-1") + body)
        answer = b""
        while part := channel.recv(65536):
            answer += part
    return int(answer.split()[1])


def upstream_requests(server: Server) -> list[str]:
    """Return the requests that reached the SuperLink, except those to its fleet API."""
    return [line for line in server.log("superlink").splitlines() if '"' in line and "/v1/fleet/" not in line]


@pytest.mark.parametrize("kind", PROXIES)
def test_the_control_and_runtime_apis_stay_behind_the_proxy(server: Server, kind: str) -> None:
    before = upstream_requests(server)
    for path in HIDDEN:
        # 400: no valid request to begin with.
        assert ask(server, server.ports[kind], path) in (400, 403), path
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(server, server.ports[kind], "/v1/fleet/pull-messages", method) == 403, method
    for path in TIDIED:
        assert ask(server, server.ports[kind], path) in (400, 401, 403, 415, 422), path
    assert upstream_requests(server) == before
    # The SuperLink itself answers, so that it is the proxy that refuses; and an allowed call passes it.
    assert ask(server, server.plan.superlink_port, "/v1/control/list-nodes") == 200
    assert upstream_requests(server) != before
    assert ask(server, server.ports[kind], "/v1/fleet/pull-messages") not in (403, 404, 502)


@pytest.mark.parametrize("kind", PROXIES)
def test_a_second_request_cannot_be_hidden_in_a_first(server: Server, kind: str) -> None:
    """Both lengths at once, as in request smuggling: whatever the proxy makes of it, no control call arrives."""
    before = upstream_requests(server)
    hidden = "0\r\n\r\nPOST /v1/control/list-nodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    lengths = f"Host: localhost\r\nContent-Length: {len(hidden)}\r\nTransfer-Encoding: chunked\r\n"
    for head in (f"{lengths}\r\n{hidden}", f"{lengths.replace(': chunked', ' : chunked')}\r\n{hidden}"):
        try:
            status = ask(server, server.ports[kind], "/v1/fleet/pull-messages", head=head)
        except (OSError, IndexError):
            continue  # hung up on
        assert status >= 400
    assert upstream_requests(server) == before


def largest_memory(words: str, folder: Path) -> int:
    """Bytes of memory that the process of this deployment with these words on its command line ever had."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if words in line and Path(entry / "cwd").resolve() == folder:
                (peak,) = (row for row in (entry / "status").read_text().splitlines() if row.startswith("VmHWM:"))
                return 1024 * int(peak.split()[1])
        except OSError:
            continue
    raise AssertionError(f"no process with {words}")


def flood(server: Server, port: int, signing: Key | None, num: int, size: int) -> list[int]:
    """Send `num` bodies of `size` bytes at the same time, all but their last byte; return the answers' statuses."""
    head = f"Host: localhost\r\nContent-Length: {size}\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\n"
    if signing is not None:
        stamp = now().isoformat()
        signature = b64encode(sign_message(signing, stamp.encode())).decode()
        key = b64encode(public_key_to_bytes(signing.public_key())).decode()
        head += f"flwr-public-key: {key}\r\nflwr-timestamp: {stamp}\r\nflwr-signature: {signature}\r\n"
    trust, statuses = ssl.create_default_context(cafile=str(server.ca)), []
    finish = threading.Event()

    def send() -> None:
        with (
            socket.create_connection(("127.0.0.1", port), 30) as plain,
            trust.wrap_socket(plain, server_hostname="localhost") as channel,
        ):
            try:
                channel.sendall(f"POST /v1/fleet/push-object HTTP/1.1\r\n{head}\r\n".encode())
                for _ in range((size - 1) >> 20):
                    channel.sendall(bytes(1 << 20))
                finish.wait(10)
                channel.sendall(bytes(size - ((size - 1) >> 20 << 20)))
            except OSError:
                pass  # it has its answer already
            try:
                statuses.append(int(channel.recv(1000).split()[1]))
            except (OSError, IndexError):
                statuses.append(0)

    threads = [threading.Thread(target=send) for _ in range(num)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    finish.set()
    for thread in threads:
        thread.join(60)
    return statuses


@pytest.mark.parametrize("kind", PROXIES)
def test_strangers_cannot_fill_the_servers_memory(server: Server, kind: str) -> None:
    """Fifteen bodies of 64 MB at once: neither the proxy nor the SuperLink behind it holds them."""
    place = (server.folder / "server").resolve()
    programs = ["fedspan.flower.superlink", *(["fedspan.flower.proxy"] if kind == "python" else [])]
    stranger = generate_key_pairs()[0]
    before = {program: largest_memory(program, place) for program in programs}
    for signing in (None, stranger):
        statuses = flood(server, server.ports[kind], signing, 15, (64 << 20) - 1)
        assert set(statuses) <= {401, 0}, statuses
    for program in programs:
        assert largest_memory(program, place) - before[program] < 40 << 20, program


def test_a_registered_nodes_large_body_passes_through_the_proxy_part_by_part(server: Server) -> None:
    place = (server.folder / "server").resolve()
    before = largest_memory("fedspan.flower.proxy", place)
    statuses = flood(server, server.ports["python"], server.key("north"), 3, 20 << 20)
    # The SuperLink has read them, and they are no messages.
    assert set(statuses) <= {400, 401, 415, 422, 500}, statuses
    assert 401 not in statuses
    assert largest_memory("fedspan.flower.proxy", place) - before < 20 << 20


def sent(parts: Sequence[bytes], seconds: float) -> Request:
    """A request whose parts come one after the other, each after some seconds."""

    async def receive() -> dict[str, object]:
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    left = list(parts)
    return Request({"type": "http", "method": "POST", "headers": []}, receive)


@pytest.mark.parametrize(
    ("parts", "seconds", "status"), [(3, 0.2, 408), (30, 0.02, 408), (5, 0.0, 413), (4, 0.0, None), (3, 0.05, None)]
)
def test_the_proxy_waits_for_no_body_for_ever(
    monkeypatch: pytest.MonkeyPatch, parts: int, seconds: float, status: int | None
) -> None:
    """Neither for its next part nor, in all, for a body that trickles in; and it passes on no more than it should."""
    monkeypatch.setattr(proxy, "_PAUSE", 0.1)
    limits = SimpleNamespace(value=(4000, 0.3))

    async def passed() -> list[bytes]:
        return [
            part
            async for part in proxy._body(
                sent([b"x" * 1000] * parts if seconds == 0 else [b"x"] * parts, seconds), limits
            )
        ]

    if status is None:
        assert sum(map(len, asyncio.run(passed()))) == parts * (1000 if seconds == 0 else 1)
    else:
        with pytest.raises(proxy._Refused) as refused:
            asyncio.run(passed())
        assert refused.value.status == status


@pytest.mark.parametrize("ahead", [60, -400])
def test_a_wrong_clock_is_named_at_both_ends(server: Server, ahead: int, tmp_path: Path) -> None:
    """Flower refuses what such a site signs, and its SuperNode ends without a word."""
    (tmp_path / "sitecustomize.py").write_text(
        "import datetime, flwr.supercore.date as date\nright = date.now\n"
        f"date.now = lambda: right() + datetime.timedelta(seconds={ahead})\n"
    )
    key, name = server.folder / "sites/south/node.key", f"south-{ahead}"
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    server.start_node(name, key, server.ca, server.plan.port, {"PYTHONPATH": paths})
    end = time.monotonic() + 40
    while server.tree.ended(name) is None and time.monotonic() < end:
        time.sleep(0.1)
    assert server.tree.ended(name) is not None
    side = "ahead of" if ahead > 0 else "behind"
    for part, clock in ((name, "this machine's clock"), ("superlink", "south's clock")):
        found = re.search(
            rf"{clock} is about (\d+) s {side} the server's: expected at most 5 s ahead", server.log(part)
        )
        assert found is not None, server.log(part)[-2000:]
        assert abs(int(found[1]) - abs(ahead)) <= 2


@pytest.mark.parametrize("kind", PROXIES)
def test_a_proxy_passes_nothing_to_a_server_that_it_cannot_trust(server: Server, kind: str, tmp_path: Path) -> None:
    folder, port = tmp_path / "server", trial.free_ports(1)[0]
    shutil.copytree(server.folder / "server", folder)
    (folder / "ca.crt").write_bytes(certificates.certificate_authority("another").public)
    (folder / "listen.conf").write_text(f"listen 127.0.0.1:{port} ssl;")
    script = (folder / "proxy.sh").read_text().replace(f"--port {server.plan.port}", f"--port {port}")
    (folder / "proxy.sh").write_text(script)
    given = {"PATH": trial.program_path(), "PYTHON": sys.executable, "FEDSPAN_PROXY": kind}
    server.tree.start(f"distrustful-{kind}", ["./proxy.sh"], folder, {**given, "FEDSPAN_NGINX": "master_process off;"})
    server.tree.wait(f"distrustful-{kind}", lambda: trial.answers(port, server.ca), trial.READY)
    before = server.log("superlink").count("/v1/fleet/get-fab")
    assert ask(server, port, "/v1/fleet/get-fab") == 502
    assert server.log("superlink").count("/v1/fleet/get-fab") == before
    assert ask(server, server.ports[kind], "/v1/fleet/get-fab") != 502
    assert server.log("superlink").count("/v1/fleet/get-fab") == before + 1


def test_the_superlink_is_reached_from_this_machine_alone(server: Server) -> None:
    """It listens on the loopback, and its older gRPC interfaces, which would be open on every address, do not run."""
    listening = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line}
    port = f"{server.plan.superlink_port:04X}"
    assert {entry for entry in listening if entry.endswith(port)} == {f"0100007F:{port}"}
    own = {name for name in ("9092", "9093") if f'{name}"' in server.log("superlink")}
    assert own == set()


def test_plain_http_is_refused(server: Server) -> None:
    for kind, port in server.ports.items():
        url = f"http://localhost:{port}/v1/fleet/pull-messages"
        if kind == "nginx":
            assert httpx.post(url, trust_env=False).status_code == 400
        else:
            with pytest.raises(httpx.TransportError):
                httpx.post(url, trust_env=False)


def test_the_folder_of_keys_says_who_is_registered(connected: Server, tmp_path: Path) -> None:
    client = node_keys.connect(f"localhost:{connected.plan.superlink_port}", connected.ca)
    keys = node_keys.read_keys(connected.folder / "server/nodes")
    assert node_keys.synchronise(client, keys) == ([], [])
    (tmp_path / "spare.pub").write_bytes((connected.folder / "sites/spare/node.pub").read_bytes())
    more = {**keys, **node_keys.read_keys(tmp_path)}
    assert node_keys.synchronise(client, more) == (["spare"], [])
    assert connected.status()["spare"] == "registered"
    # A node that is unregistered loses its access at once, although it is connected.
    assert node_keys.synchronise(client, {"north": keys["north"]}) == ([], ["south", "spare"])
    with pytest.raises(ValueError, match=r"^spare: this key was unregistered before, .* expected a new one"):
        node_keys.synchronise(client, {"north": keys["north"], "spare": more["spare"]})
    client.close()
    assert connected.status() == {"north": "online"}
    end = time.monotonic() + 40
    while connected.tree.ended("south") is None and time.monotonic() < end:
        time.sleep(0.1)
    assert connected.tree.ended("south") is not None


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no public key"):
        node_keys.read_keys(tmp_path)
    key = certificates.node_key("a").public
    (tmp_path / "a.pub").write_bytes(key)
    (tmp_path / "b.pub").write_bytes(key)
    with pytest.raises(ValueError, match="holds the same key as a"):
        node_keys.read_keys(tmp_path)
    (tmp_path / "b.pub").write_bytes(b"ssh-ed25519 AAAA x")
    with pytest.raises(ValueError, match="holds no public key on a NIST curve"):
        node_keys.read_keys(tmp_path)
