"""`fedspan flower`: a deployment as a folder, and a trial of one on this machine."""

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
    typer.Argument(metavar="CONFIG.toml", help="Settings; none: the embedded default.", show_default=False),
]
_Sites = Annotated[
    str | None,
    typer.Option(metavar="N|NAMES", help="How many sites, or their names with commas; else federation.num_clients."),
]
_Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one setting; give it as often as you like."),
]


@app.command(short_help="Write a ready deployment.")
def init(
    folder: _Folder,
    config: _Config = None,
    sites: _Sites = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Name or address of the server, the first is what sites use; else localhost."
        ),
    ] = None,
    port: Annotated[int, typer.Option(metavar="P", help="Where sites reach the server.")] = 8443,
    settings: _Settings = None,
) -> None:
    """Write a ready deployment: certificates, keys, start scripts, the proxy's configuration, container files.

    \b
    Examples:
      fedspan flower init fed my.toml --sites charite,mayo,ucl --host fed.example.org
      fedspan flower init trial --sites 4

    `server/` stays with the server; each folder under `sites/` goes to its site over a safe channel. README.md in
    the folder says what to start in which order.
    """
    from fedspan.flower import deployment

    names, loaded = _federation(config, sites, settings)
    deployment.write(folder, deployment.plan(names, host or (), port), loaded)
    typer.echo(f"{folder}/  {len(names)} sites: {', '.join(names)}; {folder / 'README.md'} says what to do next")


@app.command(short_help="Try a deployment out on this machine.")
def up(
    folder: _Folder,
    config: _Config = None,
    sites: _Sites = None,
    settings: _Settings = None,
    proxy: Annotated[
        str, typer.Option(metavar="NAME", help="nginx, python (comes with fedspan), or auto: nginx where there is one.")
    ] = "auto",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For all of it.")] = 3600.0,
    run: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the run; an unfinished one is gone on with. Else a new one.")
    ] = None,
) -> None:
    """Bring a deployment up on loopback, run its federation, print the result, and take everything down.

    \b
    Examples:
      fedspan flower up trial --sites 4
      fedspan flower up trial --sites 4 --set method.name=glora_sums --set privacy.secure_sums=true

    Server, proxy and sites are separate processes with TLS, node keys and the proxy's rules, as between real
    machines. A folder that does not exist is made first, on free ports. Every process's log is in DIR/logs.
    """
    from fedspan.flower import trial

    trial.chosen_proxy(proxy)  # before anything is written
    if not folder.exists() or not any(folder.iterdir()):
        names, loaded = _federation(config, sites, settings)
        trial.prepare(folder, names, loaded)
    elif config is not None or sites is not None or settings:
        raise FedspanError(f"{folder} is set up already: expected no --sites, --set or config, or a new folder")
    outcome = trial.up(folder, typer.echo, proxy=proxy, timeout=timeout, run=run)
    _show(outcome)


@app.command(short_help="Make a site's keys anew, at the site.")
def keys(
    folder: Annotated[Path, typer.Argument(metavar="SITE_DIR", help="The site's folder.")],
) -> None:
    """Make a site's node key and identity anew, so that nobody else ever held them; print what the others need.

    \b
    Example:
      fedspan flower keys sites/charite
    """
    from fedspan.flower import deployment

    client_id, identity = deployment.renew_keys(folder)
    typer.echo(
        f"{folder / 'node.pub'} goes to the server, into nodes/ in place of the old one; then ./register.sh there"
    )
    typer.echo(f'this line goes into sites.json at every site: "{client_id}": "{identity}"')


def _federation(path: Path | None, sites: str | None, settings: list[str] | None) -> tuple[list[str], Config]:
    """The sites' names, and settings that are for so many; what no method could do is refused here."""
    from fedspan.config import load
    from fedspan.flower.deployment import client_ids

    given = load(path, settings or ())
    text = str(given.federation.num_clients) if sites is None else sites
    if text.isdecimal():
        if int(text) < 1:
            raise FedspanError(f"--sites {text}: expected at least one")
        names = client_ids(int(text))
    else:
        names = [name.strip() for name in text.split(",")]
    loaded = load(path, [*(settings or ()), f"federation.num_clients={len(names)}"])

    from fedspan.federation import requirements  # slow: a mistyped setting is answered before it

    requirements.chosen(loaded)
    return names, loaded


def _show(outcome: Outcome) -> None:
    from rich.console import Console

    from fedspan.display import report

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a line of the table stays a line in a pipe
    console.print()
    console.print(report.summary_table(outcome.summary), highlight=False)
    console.print()
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.seconds.items())
    typer.echo(f"{outcome.out}/  {spent}")
