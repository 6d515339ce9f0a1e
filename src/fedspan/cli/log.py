"""`fedspan log`: verify and show the logs of events of a server and its sites."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedspan.cli.arguments import AsJson, PlainCommand, new_app
from fedspan.support.errors import FedspanError

app = new_app()


@app.callback()
def _top() -> None:
    """Verify and show the hash-chained logs that a server and its sites keep."""


@app.command(cls=PlainCommand, short_help="Check logs, and compare server and sites.")
def verify(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Folders of a run, a site, a server or a deployment, or logs themselves."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Check that no line of a log was edited, cut, moved or added, and that server and sites tell the same story.

    \b
    Examples:
      fedspan log verify server/runs/federation charite.jsonl mayo.jsonl
      fedspan log verify trial

    Each line holds the SHA-256 of the line before it. Every message must have been received as it was sent, every
    answer must have arrived as it was given, and each side's log must still hold the lines that the other side was
    shown. Lines that were written after the last message between two sides have no other witness. The exit status is 2
    where anything is found.
    """
    from fedspan.events import chain, places
    from fedspan.events.verify import verify as compare

    report = compare([chain.read(path) for path in places.all_logs(folders)])
    if as_json:
        found = {"checked": report.checked, "notes": report.notes, "findings": report.findings}
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for title, lines in (("", report.checked), ("note: ", report.notes), ("FOUND: ", report.findings)):
            for line in lines:
                typer.echo(f"{title}{line}")
    if report.findings:
        count = len(report.findings)
        raise FedspanError(f"{count} finding{'s' * (count != 1)}: expected logs that are whole and agree")


@app.command(cls=PlainCommand, short_help="Print a log for people.")
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a log, or several, or a log itself.")],
    last: Annotated[
        int | None, typer.Option("--last", metavar="N", min=1, help="Only the last N lines of each log.")
    ] = None,
) -> None:
    """Print a log's entries, one in a line: its number, the time in UTC, what happened, and its particulars.

    \b
    Examples:
      fedspan log show sites/charite
      fedspan log show server/runs/federation --last 20
    """
    from fedspan.events import chain, places
    from fedspan.events.show import lines

    paths = places.logs_in(folder)
    for path in paths:
        read = chain.read(path)
        if len(paths) > 1:
            typer.echo(f"{path}  {read.node}")
        for line in list(lines(read))[-(last or 0) :]:
            typer.echo(line)
        if read.faults:
            typer.echo(f"FOUND: {read.faults[0]}; see `fedspan log verify`")
