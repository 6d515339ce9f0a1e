"""A deployment as a folder: the server's files, each site's files, and the scripts that start them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fedspan.config import Config, to_toml
from fedspan.data.files import names_of
from fedspan.federation.client_names import names_of_sites, numbered_ids
from fedspan.flower import certificates
from fedspan.flower.server_data import with_stated_metrics, without_data
from fedspan.support.errors import FedspanError
from fedspan.support.paths import lacks
from fedspan.wire.names import is_name

PORT = 8443
"""Port on which sites reach the proxy."""
_RUNTIME_PORT = 8601
_LOCAL = ("localhost", "127.0.0.1", "::1")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_RECORD = "deployment.json"


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site: its folder's name, its client id, and the port between its own two processes."""

    name: str
    client_id: str
    runtime_port: int


@dataclass(frozen=True, slots=True)
class Deployment:
    """Everything that the files of a deployment depend on, except the keys."""

    hosts: tuple[str, ...]
    """Names and addresses of the server; sites use the first."""
    port: int
    superlink_port: int
    sites: tuple[SitePlan, ...]

    @property
    def local(self) -> bool:
        """True where only this machine can reach the server."""
        return all(host in _LOCAL for host in self.hosts)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses on which the proxy listens: of IPv4, and of IPv6 where the server is named by one."""
        old, new = ("127.0.0.1", "::1") if self.local else ("0.0.0.0", "::")
        named = any(":" in host for host in self.hosts if self.local or host not in _LOCAL)
        return (old, new) if named else (old,)

    @property
    def server(self) -> str:
        """HOST:PORT to which sites connect."""
        return _with_port(self.hosts[0], self.port)


def plan(
    sites: Sequence[str],
    hosts: Sequence[str] = (),
    port: int = PORT,
    superlink_port: int | None = None,
    runtime_ports: Sequence[int] = (),
    clients: Sequence[str] = (),
) -> Deployment:
    """Return a deployment for these sites, which are the federation's clients in this order.

    Parameters
    ----------
    sites
        Their names: lower-case letters, digits and dashes.
    hosts
        Names and addresses of the server; empty: this machine only.
    port, superlink_port, runtime_ports
        Ports of the proxy, of the SuperLink behind it (by default the next one), and between each site's processes.
    clients
        The client id of each site, as `clients_of` gives it; empty: `client-0`, `client-1`, …

    Raises
    ------
    FedspanError
        For a name or a port that is not valid, or that is used twice.
    """
    _check_names(sites)
    behind = port + 1 if superlink_port is None else superlink_port
    inner = list(runtime_ports) or [_RUNTIME_PORT + k for k in range(len(sites))]
    _check_ports(port, behind, inner)
    named = zip(sites, clients or numbered_ids(len(sites)), inner, strict=True)
    return Deployment(tuple(hosts) or _LOCAL[:1], port, behind, tuple(SitePlan(*fields) for fields in named))


def _with_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_names(sites: Sequence[str]) -> None:
    seen = set()
    for name in sites:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise FedspanError(f"site {name!r}: expected lower-case letters, digits and dashes, 32 at most")
        if name in seen:
            raise FedspanError(f"site {name!r} is named twice: expected different names")
        seen.add(name)
    if not sites:
        raise FedspanError("no sites: expected at least one")


def _check_ports(port: int, behind: int, inner: Sequence[int]) -> None:
    for number, whose in ((port, ""), (behind, ", the SuperLink's"), *((number, ", a site's") for number in inner)):
        if type(number) is not int or not 0 < number < 65536:
            raise FedspanError(f"port {number!r}{whose}: expected one between 1 and 65535")
    if len({port, behind, *inner}) < 2 + len(inner):
        raise FedspanError(
            f"port {port} collides with the SuperLink's port {behind} or one of the sites' ports {inner[0]} to "
            f"{inner[-1]}: expected another"
        )


def named_sites(config: Config) -> dict[str, str]:
    """Return the client id of every site that is named after a training file; none where clients are numbered.

    A site's name is the client id in lower case, with dashes for other characters.

    Raises
    ------
    FedspanError
        For files whose names no clients can have.
    """
    data = config.data
    if data.task != "files" or config.federation.partition != "files" or len(data.train) < 2:
        return {}
    clients = names_of_sites(names_of(data.train))
    names = [re.sub(r"[^a-z0-9]+", "-", client.lower()).strip("-") for client in clients]
    _check_names(names)
    return dict(zip(names, clients, strict=True))


def clients_of(config: Config, sites: Sequence[str]) -> list[str]:
    """Return the client id of each site, as a federation in one process has it.

    Clients that are named after their files belong to the sites of these names, or to sites of other names in order.

    Raises
    ------
    FedspanError
        When some of the sites, and not all, have the name of a file.
    """
    named = named_sites(config)
    if len(named) != len(sites):  # also where there is none; another number is refused by `write`
        return list(numbered_ids(len(sites)))
    if set(sites) == set(named):
        return [named[site] for site in sites]
    if set(sites) & set(named):
        raise FedspanError(
            f"sites {', '.join(sites)}: the training files are called {', '.join(named)}; expected sites of these "
            "names, or of other names in the order of the files"
        )
    return list(named.values())


def write(folder: Path, deployment: Deployment, config: Config) -> None:
    """Write a whole deployment with new keys into a new folder, or nothing on an error.

    Raises
    ------
    FedspanError
        When the folder exists and is not empty, or the configuration is for another number of clients.
    """
    clients = config.federation.num_clients
    if clients != len(deployment.sites):
        raise FedspanError(f"federation.num_clients = {clients}: expected {len(deployment.sites)}, one for each site")
    write_files(folder, files_of(deployment, config))


def write_files(folder: Path, files: Iterable[File]) -> None:
    """Write the files of a deployment into a new folder, or nothing on an error; each server gets a folder of runs.

    Raises
    ------
    FedspanError
        When the folder exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FedspanError(f"{folder} exists and is not empty: expected a new folder")
    with _complete_or_not_at_all(folder) as partial:
        for path, content, mode in files:
            target = partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_new(target, content, mode)
        for server in partial.rglob("server/"):
            (server / "runs").mkdir()
        for inner in partial.rglob("*/"):
            inner.chmod(0o700)


@contextmanager
def _complete_or_not_at_all(folder: Path) -> Iterator[Path]:
    """Give a folder of mode 0700 under another name, which gets its own when the context ends without an error."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield partial
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:  # the disk is full; the name is a link, a mounted disk or the current folder
        raise FedspanError(
            f"{folder} cannot be written ({error.strerror}): expected the name of a new folder"
        ) from None


def read(folder: Path) -> Deployment:
    """Read the deployment in a folder that `write` made.

    Raises
    ------
    FedspanError
        When there is none, or a value in it is not valid.
    """
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["hosts"], list) or not isinstance(record["sites"], list):
            raise TypeError  # a text would be taken for a list of letters
        sites = tuple(SitePlan(**site) for site in record["sites"])
        read = Deployment(tuple(record["hosts"]), record["port"], record["superlink_port"], sites)
    except (OSError, ValueError, KeyError, TypeError):
        raise FedspanError(f"{lacks(folder, 'deployment')}: expected a folder made by `fedspan flower init`") from None
    try:
        _check(read)
    except FedspanError as error:
        raise FedspanError(f"{path}: {error}") from None
    return read


def regions_in(folder: Path) -> list[Path]:
    """Return the folders of a deployment's regions, each a deployment of its own; none where sites are not in regions.

    `fedspan.flower.region_deployment` writes them.
    """
    return sorted(path.parent for path in folder.glob(f"regions/*/{_RECORD}"))


def _check(deployment: Deployment) -> None:
    """Check the values of a deployment, which a person may have edited.

    Raises
    ------
    FedspanError
        For a name, host or port that is not valid.
    """
    if not deployment.hosts:
        raise FedspanError("hosts is empty: expected the server's name or address")
    for host in deployment.hosts:
        certificates.check_host(host)
    _check_names([site.name for site in deployment.sites])
    for site in deployment.sites:
        if not is_name(site.client_id):
            raise FedspanError(f"client_id {site.client_id!r}: expected letters, digits, dots, dashes and underscores")
    ids = [site.client_id for site in deployment.sites]
    if len(set(ids)) < len(ids):
        raise FedspanError(f"client_id {max(ids, key=ids.count)!r} is given twice: expected different ones")
    _check_ports(deployment.port, deployment.superlink_port, [site.runtime_port for site in deployment.sites])


def renew_keys(site: Path) -> tuple[str, str]:
    """Replace a site's node key, identity and runtime key in its folder.

    Returns
    -------
    tuple
        The site's client id, and its new public identity for the `sites.json` of all sites; its own is updated.

    Raises
    ------
    FedspanError
        When the folder is not a site's.
    """
    try:
        client_id = tomllib.loads((site / "site.toml").read_text(encoding="utf-8"))["client_id"]
        known = json.loads((site / "sites.json").read_text(encoding="utf-8"))
        comment = (site / "node.pub").read_text(encoding="utf-8").split()[-1]
        if not isinstance(client_id, str) or not isinstance(known, dict):
            raise TypeError
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise FedspanError(f"{site} is not a site's folder: expected one made by `fedspan flower init`") from None
    node, identity = certificates.node_key(comment), certificates.identity_key()
    known[client_id] = identity.public.decode()
    replace_all(
        site,
        (
            ("node.key", node.private, _SECRET),
            ("node.pub", node.public, _OPEN),
            ("identity.key", identity.private, _SECRET),
            ("runtime.key", secrets.token_bytes(32), _SECRET),
            ("sites.json", _json(known), _OPEN),
        ),
    )
    return client_id, known[client_id]


def replace_all(folder: Path, files: Sequence[tuple[str, bytes, int]]) -> None:
    """Replace files of a folder by new ones of the same owner; none of them when one cannot be written."""
    owner = folder.stat()
    new = [(folder / f".{name}.new", folder / name, content, mode) for name, content, mode in files]
    try:
        for path, _, content, mode in new:
            path.unlink(missing_ok=True)
            _write_new(path, content, mode)
            if os.geteuid() == 0:  # or the site's own account could not read the keys that root has made for it
                os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    except BaseException as error:
        for path, *_ in new:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FedspanError(f"{folder} keeps its old keys, no new ones could be written: {error.strerror}") from None
        raise
    for path, old, *_ in new:
        path.replace(old)


File = tuple[str, bytes, int]
"""Path in the folder, content and mode."""
_OPEN, _SECRET, _SCRIPT = 0o644, 0o600, 0o755


def files_of(deployment: Deployment, config: Config) -> Iterator[File]:
    """Yield every file of a deployment, with new keys."""
    authority = certificates.certificate_authority(f"fedspan federation at {deployment.hosts[0]}")
    # The proxy and the server's own commands reach the SuperLink under the local names.
    hosts = [*deployment.hosts, *_LOCAL, "superlink"]
    server = certificates.server_certificate(authority, hosts)
    nodes = {site.name: certificates.node_key(site.name) for site in deployment.sites}
    identities = {site.name: certificates.identity_key() for site in deployment.sites}
    config = with_stated_metrics(config)
    settings = to_toml(config).encode()
    known = {site.client_id: identities[site.name].public.decode() for site in deployment.sites}
    peers = _json(known)

    yield "ca/ca.key", authority.private, _SECRET
    yield "ca/ca.crt", authority.public, _OPEN
    yield _RECORD, _record(deployment), _OPEN
    yield "README.md", fill("README.md", _values(deployment)), _OPEN
    yield "docker-compose.yml", fill("compose.yml", _values(deployment)), _OPEN
    for path, content, mode in _server(deployment):
        yield f"server/{path}", content, mode
    yield "server/config.toml", to_toml(without_data(config)).encode(), _OPEN
    yield "server/sites.json", peers, _OPEN
    # Beside nodes/, which has the key of each site: no site can take another one's place.
    yield "server/clients.json", _json({site.name: site.client_id for site in deployment.sites}), _OPEN
    yield "server/ca.crt", authority.public, _OPEN
    yield "server/server.crt", server.public, _OPEN
    yield "server/server.key", server.private, _SECRET
    for name, key in nodes.items():
        yield f"server/nodes/{name}.pub", key.public, _OPEN
    for site in deployment.sites:
        for path, content, mode in _site(deployment, site):
            yield f"sites/{site.name}/{path}", content, mode
        home = f"sites/{site.name}"
        yield f"{home}/config.toml", settings, _OPEN
        yield f"{home}/sites.json", peers, _OPEN
        yield f"{home}/ca.crt", authority.public, _OPEN
        yield f"{home}/node.key", nodes[site.name].private, _SECRET
        yield f"{home}/node.pub", nodes[site.name].public, _OPEN
        yield f"{home}/identity.key", identities[site.name].private, _SECRET
        # Shared by the site's own two processes, so that other users of its machine cannot take its messages.
        yield f"{home}/runtime.key", secrets.token_bytes(32), _SECRET


def _server(deployment: Deployment) -> Iterator[File]:
    values = _values(deployment)
    for script in ("superlink.sh", "proxy.sh", "register.sh", "run.sh"):
        yield script, fill(script, values), _SCRIPT
    for sourced in ("environment.sh", "flwr_command.sh"):
        yield sourced, fill(sourced, values), _OPEN
    yield "nginx.conf", fill("nginx.conf", values), _OPEN
    yield "listen.conf", _listen(deployment.addresses, deployment.port), _OPEN
    yield "app/pyproject.toml", fill("app.toml", values), _OPEN
    yield "compose.yml", fill("compose.server.yml", values), _OPEN
    # In a container the proxy must be reachable from outside the container.
    yield "container/listen.conf", _listen(("0.0.0.0",), deployment.port), _OPEN
    yield from _container()


def _listen(addresses: Sequence[str], port: int) -> bytes:
    return "".join(f"listen {_with_port(address, port)} ssl;\n" for address in addresses).encode()


def _site(deployment: Deployment, site: SitePlan) -> Iterator[File]:
    values = {
        **_values(deployment),
        "NAME": site.name,
        "CLIENT_ID": site.client_id,
        "RUNTIME_PORT": str(site.runtime_port),
    }
    yield "start.sh", fill("start.sh", values), _SCRIPT
    yield "environment.sh", fill("environment.sh", values), _OPEN
    yield "site.toml", fill("site.toml", values), _OPEN
    yield "compose.yml", fill("compose.site.yml", values), _OPEN
    yield from _container()


def _container() -> Iterator[File]:
    yield "container/Dockerfile", fill("Dockerfile", {}), _OPEN
    yield "container/wheels/.keep", b"", _OPEN


def _values(deployment: Deployment) -> dict[str, str]:
    count = len(deployment.sites)
    extended = [
        f"  {site.name}:\n    extends: {{file: sites/{site.name}/compose.yml, service: {site.name}}}\n"
        f'    environment: {{FEDSPAN_SERVER: "superlink:{deployment.port}"}}\n    depends_on: [proxy]'
        for site in deployment.sites
    ]
    return {
        "PORT": str(deployment.port),
        "SUPERLINK_PORT": str(deployment.superlink_port),
        "HOSTS": " ".join(f"--host {address}" for address in deployment.addresses),
        "SERVER": deployment.server,
        "NUM_SITES": "one site" if count == 1 else f"{count} sites",
        "COUNT": str(count),
        "SITES": "\n".join(extended),
    }


def _record(deployment: Deployment) -> bytes:
    record = {
        "hosts": deployment.hosts,
        "port": deployment.port,
        "superlink_port": deployment.superlink_port,
        "sites": [
            {"name": site.name, "client_id": site.client_id, "runtime_port": site.runtime_port}
            for site in deployment.sites
        ],
    }
    return _json(record)


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a new file that never has more permissions than `mode`, not even while it is being written."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    path.chmod(mode)  # whatever the umask is


def fill(name: str, values: Mapping[str, str]) -> bytes:
    """Return a template with every `@KEY@` replaced."""
    text = (resources.files("fedspan.flower") / "templates" / name).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], text).encode()
