"""A federation in regions as a folder: the server above, and a whole deployment for each region."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedspan.config import Config, from_mapping
from fedspan.flower import deployment
from fedspan.flower.deployment import PORT, Deployment, File
from fedspan.support.errors import FedspanError

REGION = "region.json"
"""The file that tells a server that it is a region's: its name, and the folder of its way up."""
_NOT_ABOVE = ("README.md", "docker-compose.yml", "server/sites.json")
_NOT_OF_REGION = ("README.md", "docker-compose.yml", "server/compose.yml", "server/run.sh")
_NOT_OF_UPLINK = ("site.toml", "config.toml", "sites.json", "identity.key", "compose.yml", "container")
_RUNTIME_PORT = 8601


@dataclass(frozen=True, slots=True)
class TreePlan:
    """The server above, whose sites are the regions, and the regions."""

    above: Deployment
    regions: Mapping[str, Deployment]


def parsed(given: Sequence[str]) -> dict[str, list[str]]:
    """Return the sites of each region from words such as `north=mayo,ucl`.

    Raises
    ------
    FedspanError
        For a word of another form, a region that is named twice, or a site in two regions.
    """
    regions: dict[str, list[str]] = {}
    region_of: dict[str, str] = {}
    for word in given:
        name, equals, sites = word.partition("=")
        names = [site.strip() for site in sites.split(",") if site.strip()]
        if not equals or not names:
            raise FedspanError(f"--region {word}: expected NAME=SITE,SITE,… with the sites of the region")
        for each in (name, *names):
            if not deployment.NAME.fullmatch(each):
                raise FedspanError(
                    f"--region {word}: the name {each!r}: expected lower-case letters, digits and dashes, 32 at most"
                )
        if name in regions:
            raise FedspanError(f"--region {name} is given twice: expected all of its sites at once")
        for site in names:
            if site in region_of:
                raise FedspanError(f"--region {word}: {site} is in {region_of[site]} already")
            region_of[site] = name
        regions[name] = names
    for name in regions:
        if name.casefold() in {site.casefold() for site in region_of}:
            raise FedspanError(f"--region {name}=…: a site has this name; expected another for the region")
    return regions


def parsed_hosts(given: Sequence[str], regions: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Return the names and addresses of each region's server from words such as `north=north.example.org`."""
    hosts: dict[str, tuple[str, ...]] = {}
    for word in given:
        name, equals, host = word.partition("=")
        if not equals or not host or name not in regions:
            known = ", ".join(regions) or "none"
            raise FedspanError(f"--region-host {word}: expected REGION=NAME with one of the regions {known}")
        hosts[name] = (*hosts.get(name, ()), host)
    return hosts


def in_regions(config: Config, regions: Mapping[str, Sequence[str]], clients: Mapping[str, str]) -> Config:
    """Return settings in which each region has the clients of its sites.

    Parameters
    ----------
    clients
        Site -> client id.
    """
    named = {region: tuple(clients[site] for site in sites) for region, sites in regions.items()}
    tree = config.model_dump()
    tree["deployment"]["regions"] = named
    return from_mapping(tree)


def plan(
    regions: Mapping[str, Sequence[str]],
    clients: Mapping[str, str],
    hosts: Sequence[str] = (),
    region_hosts: Mapping[str, Sequence[str]] | None = None,
    port: int = PORT,
    free: Sequence[int] = (),
) -> TreePlan:
    """Return a plan in which no two servers or sites of one machine share a port.

    Parameters
    ----------
    hosts
        Names and addresses of the server above; empty: this machine only.
    region_hosts
        Region -> those of its server; a region that is not there is on this machine only.
    port
        Of the server above; the k-th region's server, counted from 1, has this plus 2k.
    free
        Ports to take instead, for a trial: two for each server and one for each region and site.

    Raises
    ------
    FedspanError
        For a name or a port that is not valid, or that is used twice.
    """
    num_sites = sum(map(len, regions.values()))
    servers = [port + k for k in range(2 + 2 * len(regions))]
    inner = [_RUNTIME_PORT + k for k in range(len(regions) + num_sites)]
    if free:
        servers, inner = list(free[: len(servers)]), list(free[len(servers) :])
    own = iter(inner[len(regions) :])
    above = deployment.plan(list(regions), hosts, servers[0], servers[1], inner[: len(regions)], list(regions))
    below: dict[str, Deployment] = {}
    for k, (region, names) in enumerate(regions.items(), 1):
        ports = [next(own) for _ in names]
        where, ids = (region_hosts or {}).get(region, ()), [clients[site] for site in names]
        below[region] = deployment.plan(names, where, servers[2 * k], servers[2 * k + 1], ports, ids)
    return TreePlan(above, below)


def num_ports(regions: Mapping[str, Sequence[str]]) -> int:
    """Return how many ports a plan for one machine needs."""
    return 2 + 3 * len(regions) + sum(map(len, regions.values()))


def write(folder: Path, plan: TreePlan, config: Config) -> None:
    """Write the server above and every region with new keys into a new folder, or nothing on an error.

    Raises
    ------
    FedspanError
        When the folder exists and is not empty.
    """
    deployment.write_files(folder, _files(plan, config))


def _files(plan: TreePlan, config: Config) -> Iterator[File]:
    for path, content, mode in deployment.files_of(plan.above, config):
        top, _, rest = path.partition("/")
        if path in _NOT_ABOVE:
            continue
        if top != "sites":
            yield path, content, mode
            continue
        region, _, name = rest.partition("/")
        if name.split("/")[0] not in _NOT_OF_UPLINK:
            yield f"regions/{region}/uplink/{name}", _for_region(name, content), mode
    for region, below in plan.regions.items():
        for path, content, mode in deployment.files_of(below, config):
            if path not in _NOT_OF_REGION:
                yield f"regions/{region}/{path}", _for_region(path, content), mode
        yield f"regions/{region}/server/serve.sh", deployment.fill("serve.sh", {}), 0o755
        containers = {"PORT": str(below.port), "ABOVE": plan.above.server}
        yield f"regions/{region}/compose.yml", deployment.fill("compose.region.yml", containers), 0o644
        record = {"region": region, "uplink": "../uplink"}
        yield f"regions/{region}/server/{REGION}", (json.dumps(record, indent=2) + "\n").encode(), 0o644
    num_regions = "one region" if len(plan.regions) == 1 else f"{len(plan.regions)} regions"
    values = {"NUM_REGIONS": num_regions, "SERVER": plan.above.server}
    yield "README.md", deployment.fill("README.tree.md", values), 0o644


def _for_region(path: str, content: bytes) -> bytes:
    """Return a file of a deployment as a region has it: its answers come from its server, which is another app."""
    changes = {
        "start.sh": (b'--site "$PWD"', b'--site "$PWD" --region'),
        "server/app/pyproject.toml": (b"fedspan.flower.server_app:app", b"fedspan.flower.region_app:app"),
    }
    old, new = changes.get(path, (b"", b""))
    assert content.count(old) == 1 or not old, f"{path} has not {old!r} once"
    return content.replace(old, new) if old else content
