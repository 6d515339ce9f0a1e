"""`fedspan flower`: write a deployment, try it on this machine, rotate its keys, watch it, lock its packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedspan.cli.arguments import AsJson, ConfigFile, PlainCommand, Settings, new_app
from fedspan.support.errors import FedspanError

if TYPE_CHECKING:
    from fedspan.config import Config
    from fedspan.flower.trial import Outcome

app = new_app()
keys_app = new_app()


@app.callback()
def _top() -> None:
    """Deploy a federation of real sites over Flower."""


_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]
_Sites = Annotated[
    str | None,
    typer.Option(
        "--sites",
        metavar="N|NAMES",
        help="Number of sites, or their names separated by commas; if not given, federation.num_clients, called after "
        "the training files where each is one client.",
    ),
]


_Regions = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        metavar="NAME=SITES",
        help="A region and its sites, as north=mayo,ucl; may be repeated, in place of --sites. Its own server sums "
        "what its sites answer and sends the sum up.",
    ),
]


@app.command(cls=PlainCommand, short_help="Write a complete deployment.")
def init(
    folder: _Folder,
    config: ConfigFile = None,
    sites: _Sites = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            help="Name or address of the server; may be repeated, sites use the first. If not given, localhost.",
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            "--port", metavar="P", show_default=False, help="Port on which sites reach the server; 8443 by default."
        ),
    ] = 8443,
    region: _Regions = None,
    region_host: Annotated[
        list[str] | None,
        typer.Option(
            "--region-host",
            metavar="NAME=HOST",
            help="Name or address of a region's server; may be repeated. If not given, localhost.",
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """Write a complete deployment: certificates, keys, start scripts, the proxy's configuration, container files.

    \b
    Examples:
      fedspan flower init fed my.toml --sites mayo,ucl --host fed.example.org
      fedspan flower init trial --sites 4
      fedspan flower init tree my.toml --region north=mayo,ucl --region south=bern

    `server/` stays on the server; each folder under `sites/` goes to its site over a secure channel. README.md in
    the folder says what to start, and in which order. Regions need a method that needs sums alone, such as glora_sums,
    and privacy.secure_sums or privacy.fixed_point.
    """
    from fedspan.flower import deployment, region_deployment

    if region_host and not region:
        raise FedspanError(f"--region-host {region_host[0]}: expected --region too, which says what the regions are")
    regions = region_deployment.parsed(region or ())
    hosts = region_deployment.parsed_hosts(region_host or (), regions)
    names, loaded = _federation(config, sites, settings, region)
    clients = deployment.clients_of(loaded, names)
    if region:
        plan = region_deployment.plan(regions, dict(zip(names, clients, strict=True)), host or (), hosts, port)
        region_deployment.write(folder, plan, loaded)
    else:
        deployment.write(folder, deployment.plan(names, host or (), port, clients=clients), loaded)
    typer.echo(f"{folder}/  {len(names)} sites: {', '.join(names)}; for the next steps see {folder / 'README.md'}")


@app.command(cls=PlainCommand, short_help="Try a deployment on this machine.")
def up(
    folder: _Folder,
    config: ConfigFile = None,
    sites: _Sites = None,
    region: _Regions = None,
    settings: Settings = None,
    proxy: Annotated[
        str,
        typer.Option(
            "--proxy",
            metavar="NAME",
            show_default=False,
            help="nginx, python (comes with fedspan), or auto (by default: nginx if it is installed).",
        ),
    ] = "auto",
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", show_default=False, help="Longest time for everything; 3600 by default."
        ),
    ] = 3600.0,
    run: Annotated[
        str | None,
        typer.Option(
            "--run", metavar="NAME", help="Name of the run, resumed if it is unfinished; if not given, a new one."
        ),
    ] = None,
    in_memory: Annotated[
        bool,
        typer.Option("--in-memory", help="Keep the SuperLink's messages in memory and not in a database on the disk."),
    ] = False,
) -> None:
    """Start a deployment on loopback, run its federation, print the result, and take everything down.

    \b
    Examples:
      fedspan flower up trial --sites 4
      fedspan flower up trial --sites 4 --set method.name=flora
      fedspan flower up tree my.toml --region north=a,b --region south=c,d

    Server, proxy and sites are separate processes with TLS, node keys and the proxy's rules, as between real
    machines. A folder that does not exist is created first, with free ports. The logs are in DIR/logs. Regions need a
    method that needs sums alone, such as glora_sums, and privacy.secure_sums or privacy.fixed_point.
    """
    from fedspan.flower import trial

    trial.choose_proxy(proxy)  # an unusable proxy is refused before anything is written
    if not folder.exists() or not any(folder.iterdir()):
        names, loaded = _federation(config, sites, settings, region)
        if region:
            from fedspan.flower import region_deployment

            trial.prepare_regions(folder, region_deployment.parsed(region), loaded)
        else:
            trial.prepare(folder, names, loaded)
    elif config is not None or sites is not None or settings or region:
        raise FedspanError(
            f"{folder} already holds a deployment: expected no --sites, --region, --set or CONFIG.toml, or a new folder"
        )
    outcome = trial.up(folder, typer.echo, proxy=proxy, timeout=timeout, run=run, in_memory=in_memory)
    _show(outcome)


@keys_app.callback()
def _keys() -> None:
    """Rotate the keys and certificates of a deployment."""


@keys_app.command(cls=PlainCommand, short_help="Replace the keys of a site, or a server's certificate.")
def rotate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the site, or of the server.")],
    authority: Annotated[
        Path | None,
        typer.Option("--ca", metavar="DIR", help="The folder with the authority's ca.key; needed for a server."),
    ] = None,
) -> None:
    """Replace a site's node key, identity and runtime key, or a server's key and certificate; say what has to follow.

    \b
    Examples:
      fedspan flower keys rotate sites/charite
      fedspan flower keys rotate server --ca ca

    Run it where the keys are used. Either all of a folder's keys are replaced or none.
    """
    from fedspan.flower import rotation

    for line in rotation.rotate(folder, authority):
        typer.echo(line)


app.add_typer(keys_app, name="keys", short_help="Rotate keys and certificates, where they are used.")


@app.command(cls=PlainCommand, short_help="Show the state of a deployment.")
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a deployment, a server or a site.")],
    as_json: AsJson = False,
) -> None:
    """Show the last round, who answered in it, refusals, the last event, and how long the certificates are valid.

    \b
    Examples:
      fedspan flower status server
      fedspan flower status sites/charite --json

    Everything is read from the folder; no process is asked. The exit status is 2 where a certificate has expired or a
    log is damaged.
    """
    from fedspan.flower.status import Status

    state = Status(folder)
    if as_json:
        typer.echo(json.dumps(state.as_json(), indent=2))
    else:
        for line in state.lines():
            typer.echo(line)
    problems = state.problems()
    if problems:
        raise FedspanError(problems[0])


@app.command(cls=PlainCommand, short_help="Serve a health page and metrics on the loopback.")
def health(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a deployment, a server or a site.")],
    port: Annotated[
        int, typer.Option("--port", metavar="P", show_default=False, help="Port on 127.0.0.1; 9464 by default.")
    ] = 9464,
) -> None:
    """Serve a page for people (/), a health check (/health) and metrics for Prometheus (/metrics) until Ctrl-C.

    \b
    Example:
      fedspan flower health server --port 9464

    Everything is read from the folder, as `fedspan flower status` does. FEDSPAN_HEALTH_PORT in the environment of
    superlink.sh and start.sh starts the same beside them.
    """
    from fedspan.flower.health import HealthServer

    with HealthServer(folder, port) as server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/  /health  /metrics")
        server.serve_forever()


@app.command(cls=PlainCommand, short_help="Write down a deployment's exact packages.")
def lock(
    folder: _Folder,
    find_links: Annotated[
        list[str] | None,
        typer.Option("--find-links", metavar="DIR", help="A folder of wheels, such as fedspan's own; may be repeated."),
    ] = None,
    no_index: Annotated[
        bool, typer.Option("--no-index", help="Take packages from those folders only, not from pip's index.")
    ] = False,
) -> None:
    """Write requirements.lock: the version and SHA-256 hash of every package that pip would install here now.

    \b
    Example:
      fedspan flower lock fed --find-links dist

    It is put beside the wheels of each container in DIR and used when an image is built. Without containers:
    pip install --require-hashes -r requirements.lock. It is valid for this Python version and this kind of machine.
    """
    from fedspan.flower import requirements_lock

    arguments = [word for place in find_links or () for word in ("--find-links", place)]
    written = requirements_lock.write(folder, [*arguments, *(["--no-index"] if no_index else [])])
    for path in written:
        typer.echo(str(path))


def _federation(
    path: Path | None, sites: str | None, settings: list[str] | None, region: list[str] | None = None
) -> tuple[list[str], Config]:
    """Return the sites' names, and settings for that number of clients; refuse settings that cannot run."""
    from fedspan.config import load
    from fedspan.federation.client_names import numbered_ids
    from fedspan.flower.deployment import clients_of, named_sites
    from fedspan.flower.region_deployment import in_regions, parsed

    regions = parsed(region or ())
    if regions and sites is not None:
        raise FedspanError(f"--sites {sites} with --region: expected the sites in their regions alone")

    config = load(path, settings or ())
    text = str(config.federation.num_clients) if sites is None else sites
    if regions:
        names = [name for group in regions.values() for name in group]
    elif text.isdecimal():
        if int(text) < 1:
            raise FedspanError(f"--sites {text}: expected at least one")
        named = list(named_sites(config))
        names = named if len(named) == int(text) else list(numbered_ids(int(text)))
    else:
        names = [name.strip() for name in text.split(",")]
    config = load(path, [*(settings or ()), f"federation.num_clients={len(names)}"])

    if config.deployment.regions and not regions:
        raise FedspanError("deployment.regions is set: expected --region NAME=SITES for each of its regions")
    if regions:
        config = in_regions(config, regions, dict(zip(names, clients_of(config, names), strict=True)))

    from fedspan.federation import requirements  # a slow import: mistyped settings are reported before it

    requirements.check_between_sites(requirements.chosen(config))
    return names, config


def _show(outcome: Outcome) -> None:
    from fedspan.display import report
    from fedspan.display.console import command_console

    console = command_console()
    console.print()
    console.print(report.summary_table(outcome.summary), highlight=False)
    console.print()
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.seconds.items())
    typer.echo(f"{outcome.out}/  {times}")
