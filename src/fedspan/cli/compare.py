"""`fedspan compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedspan.cli.arguments import parse_count
from fedspan.cli.failures import Interrupted


def compare(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.toml", help="The comparison: base, arms, conditions, seeds.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the comparison, new or begun; if not given, runs/NAME."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the suite and say what it would run; nothing is run or written.")
    ] = False,
    at_once: Annotated[
        str | None,
        typer.Option(
            "--at-once",
            metavar="N",
            help="Most runs in memory at once; if not given, 8. On a CPU it changes no result.",
        ),
    ] = None,
) -> None:
    """Compare methods or settings over seeds, and say which differences can be told from chance.

    \b
    Examples:
      fedspan compare examples/compare/suite.toml --dry-run
      fedspan compare examples/compare/suite.toml --out runs/rules
      fedspan compare examples/compare/suite.toml --out runs/rules    goes on after an interruption

    The suite names a baseline arm. Each arm is tuned on held-out training rows where it has a grid, then run with every
    seed under every condition. The table gives mean and deviation, the paired difference to the baseline with its
    interval, and a verdict: better, worse, equivalent within the margin, or open; see docs/comparing.md.

    The folder holds the ordinary run folders, runs.jsonl (a line for each), comparison.json and table.md. Seeds, arms
    and conditions may be added to the suite later: only what is new is run.
    """
    from fedspan import comparison
    from fedspan.display.console import command_console

    count = parse_count("--at-once", at_once, "compare")
    console = command_console()

    def show(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if dry_run:
        for line in comparison.dry_run(suite, out):
            show(line)
        return
    try:
        found = comparison.compare(suite, out, show, at_once=count or comparison.AT_ONCE)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on where it stopped") from None
    show("")
    show(found.table)
    show(f"{found.out}/  table.md, comparison.json, runs.jsonl")
