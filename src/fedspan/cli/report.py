"""`fedspan report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

RunFolders = Annotated[
    list[Path],
    typer.Argument(metavar="DIR...", help="Run folders, finished or not, or the folder of one comparison."),
]


def report(
    folders: RunFolders,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            show_default=False,
            help="The page; by default report.html. It replaces an earlier report only.",
        ),
    ] = Path("report.html"),
) -> None:
    """Write one HTML page on runs or on a comparison, which opens without a network (needs matplotlib).

    \b
    Examples:
      fedspan report runs/mine
      fedspan report runs/glora runs/flora --out rules.html

    The page shows the settings, base and data, tables that can be sorted, learning curves by round and by megabyte
    with bands over seeds, the spread over clients and ranks, the diagnostics in words, and the cost.
    """
    from fedspan import reporting

    print(reporting.write(reporting.read(folders), out, diagnostics_in_words))


def diagnostics_in_words(folder: Path) -> Sequence[str]:
    """Return a run's diagnostics in sentences."""
    from fedspan import inspection

    return inspection.readings(inspection.read(folder))
