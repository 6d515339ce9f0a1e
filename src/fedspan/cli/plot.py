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
            "--out", metavar="FILE", show_default=False, help="The picture: .png, .svg or .pdf; by default curves.png."
        ),
    ] = Path("curves.png"),
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Metric to draw; if not given, the summary's.")
    ] = None,
) -> None:
    """Draw learning curves of one or more runs, against rounds and against bytes sent (needs matplotlib).

    \b
    Example:
      fedspan plot runs/glora runs/fedit --out compare.png
    """
    from fedspan.display.curves import plot as plot_curves

    print(plot_curves(folders, out, metric))
