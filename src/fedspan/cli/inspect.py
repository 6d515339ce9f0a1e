"""`fedspan inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedspan.cli.arguments import AsJson


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, finished or not.")],
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the figures too: .png, .svg or .pdf (needs matplotlib)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run's diagnostics by round, and say in plain words what they mean for this run.

    \b
    Examples:
      fedspan inspect runs/glora-20260101-120000
      fedspan inspect runs/mine --plot mine.png
      fedspan inspect runs/mine --json

    Distance from the ideal update, gauge sensitivity, effective rank, angles between clients, drift, confinement:
    the statements of the papers, measured. The run needs `evaluation.diagnostics`, which is on by default where
    adapters are trained and at most 64 clients take part in a round.
    """
    from fedspan import inspection
    from fedspan.display.console import command_console

    run = inspection.read(folder)
    picture = inspection.plot(run, plot) if plot is not None else None
    if as_json:
        print(json.dumps(inspection.as_json(run), indent=2, ensure_ascii=False))
        return
    console = command_console()
    console.print(inspection.table(run), highlight=False)
    console.print()
    console.print(inspection.legend(run), style="dim", highlight=False, markup=False)
    console.print()
    for line in inspection.readings(run):
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)
    if picture is not None:
        print(picture)
