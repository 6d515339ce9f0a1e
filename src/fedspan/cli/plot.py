"""`fedspan plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders, finished or not.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            show_default=False,
            help="The picture: .png, .svg or .pdf; by default curves.png. It replaces a picture of fedspan's only.",
        ),
    ] = Path("curves.png"),
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Metric to draw; if not given, the summary's.")
    ] = None,
    x: Annotated[
        str, typer.Option("--x", metavar="AXIS", show_default=False, help="round, megabytes, or both (the default).")
    ] = "both",
    band: Annotated[
        bool | None,
        typer.Option(
            "--band/--no-band",
            show_default=False,
            help="Average all runs of a method, with a band of one standard deviation, or draw every run; if not "
            "given, average those whose settings differ by their seeds alone.",
        ),
    ] = None,
) -> None:
    """Draw learning curves of one or more runs, against rounds and against bytes sent (needs matplotlib).

    \b
    Examples:
      fedspan plot runs/glora runs/fedit --out compare.png
      fedspan plot runs/*/seed-* --x megabytes --out compare.pdf
    """
    from fedspan.display.curves import plot as plot_curves

    print(plot_curves(folders, out, metric, x=x, band=band))
