"""`fedspan flower`: write a deployment, try it on this machine, replace a site's keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedspan.cli.arguments import NearestNames
from fedspan.support.errors import FedspanError

if TYPE_CHECKING:
    from fedspan.config import Config
    from fedspan.flower.trial import Outcome

app = typer.Typer(
    cls=NearestNames,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Deploy a federation of real sites over Flower.",
)

_Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]
_Config = Annotated[
    Path | None,
    typer.Argument(
        metavar="CONFIG.toml", help="Settings; the embedded default if it is not given.", show_default=False
    ),
]
_Sites = Annotated[
    str | None,
    typer.Option(
        metavar="N|NAMES",
        help="Number of sites, or their names separated by commas; by default federation.num_clients.",
    ),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; may be repeated."),
]


@app.command(short_help="Write a complete deployment.")
def init(
    folder: _Folder,
    config: _Config = None,
    sites: _Sites = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name or address of the server; sites use the first one. By default localhost; may be repeated.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(metavar="P", help="Port on which sites reach the server.")] = 8443,
    settings: _Settings = None,
) -> None:
    """Write a complete deployment: certificates, keys, start scripts, the proxy's configuration, container files.

    \b
    Examples:
      fedspan flower init fed my.toml --sites charite,mayo,ucl --host fed.example.org
      fedspan flower init trial --sites 4

    `server/` stays on the server; each folder under `sites/` goes to its site over a secure channel. README.md in
    the folder says what to start in which order.
    """
    from fedspan.flower import deployment

    names, loaded = _federation(config, sites, settings)
    deployment.write(folder, deployment.plan(names, host or (), port), loaded)
    typer.echo(f"{folder}/  {len(names)} sites: {', '.join(names)}; for the next steps see {folder / 'README.md'}")


@app.command(short_help="Try a deployment on this machine.")
def up(
    folder: _Folder,
    config: _Config = None,
    sites: _Sites = None,
    settings: _Settings = None,
    proxy: Annotated[
        str,
        typer.Option(metavar="NAME", help="nginx, python (comes with fedspan), or auto (nginx if it is installed)."),
    ] = "auto",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time for everything.")] = 3600.0,
    run: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the run, resumed if it is unfinished; by default a new one."),
    ] = None,
) -> None:
    """Start a deployment on loopback, run its federation, print the result, and take everything down.

    \b
    Examples:
      fedspan flower up trial --sites 4
      fedspan flower up trial --sites 4 --set method.name=glora_sums --set privacy.secure_sums=true

    Server, proxy and sites are separate processes with TLS, node keys and the proxy's rules, as between real
    machines. A folder that does not exist is created first, with free ports. The logs are in DIR/logs.
    """
    from fedspan.flower import trial

    trial.choose_proxy(proxy)  # an unusable proxy is refused before anything is written
    if not folder.exists() or not any(folder.iterdir()):
        names, loaded = _federation(config, sites, settings)
        trial.prepare(folder, names, loaded)
    elif config is not None or sites is not None or settings:
        raise FedspanError(
            f"{folder} already holds a deployment: expected no --sites, --set or CONFIG.toml, or a new folder"
        )
    outcome = trial.up(folder, typer.echo, proxy=proxy, timeout=timeout, run=run)
    _show(outcome)


@app.command(short_help="Replace a site's keys, at the site.")
def keys(
    folder: Annotated[Path, typer.Argument(metavar="SITE_DIR", help="The site's folder.")],
) -> None:
    """Replace a site's node key and identity with new ones, and print what the server and the other sites need.

    \b
    Example:
      fedspan flower keys sites/charite
    """
    from fedspan.flower import deployment

    client_id, identity = deployment.renew_keys(folder)
    typer.echo(
        f"send {folder / 'node.pub'} to the server, replace the old key in nodes/ with it, and run ./register.sh there"
    )
    typer.echo(f'put this line into sites.json at every site: "{client_id}": "{identity}"')


def _federation(path: Path | None, sites: str | None, settings: list[str] | None) -> tuple[list[str], Config]:
    """Return the sites' names, and settings for that number of clients; refuse settings that cannot run."""
    from fedspan.config import load
    from fedspan.flower.deployment import client_ids

    config = load(path, settings or ())
    text = str(config.federation.num_clients) if sites is None else sites
    if text.isdecimal():
        if int(text) < 1:
            raise FedspanError(f"--sites {text}: expected at least one")
        names = client_ids(int(text))
    else:
        names = [name.strip() for name in text.split(",")]
    config = load(path, [*(settings or ()), f"federation.num_clients={len(names)}"])

    from fedspan.federation import requirements  # a slow import: mistyped settings are reported before it

    requirements.chosen(config)
    return names, config


def _show(outcome: Outcome) -> None:
    from rich.console import Console

    from fedspan.display import report

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # wide enough that no row of the table is wrapped in a pipe
    console.print()
    console.print(report.summary_table(outcome.summary), highlight=False)
    console.print()
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.seconds.items())
    typer.echo(f"{outcome.out}/  {times}")
