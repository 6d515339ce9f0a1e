"""`fedspan evaluate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedspan.cli.arguments import AsJson, Settings

if TYPE_CHECKING:
    from fedspan.runs.application import Evaluation

Model = Annotated[
    Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, or of a PEFT LoRA adapter.")
]
Data = Annotated[
    list[Path],
    typer.Option("--data", metavar="FILE", help="JSONL, JSON, CSV, Parquet, .npz or a folder; may be repeated."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="NAME", help="The base, where the name that the folder gives does not lead to it."),
]


def evaluate(
    model: Model,
    data: Data,
    base: Base = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a finished run, or a PEFT adapter from anywhere, on labelled data.

    \b
    Examples:
      fedspan evaluate runs/mine --data test.csv
      fedspan evaluate adapter --data a.jsonl --set data.metrics=auroc
      fedspan evaluate adapter --base my-bert --data a.csv --json

    On the test rows of a run the figures are those of its summary. Settings of data and evaluation are the run's,
    unless --set gives others; metrics that it names take the place of the run's and of the usual ones.
    """
    from fedspan.runs import application

    found = application.evaluate(model, data, settings=settings or (), base=base)
    if as_json:
        from fedspan.support import standard_json

        print(standard_json.dumps(standard_json.standard(dataclasses.asdict(found)), indent=2))
        return
    _show(found)


def _show(found: Evaluation) -> None:
    from fedspan.display.console import command_console
    from fedspan.display.evaluation import tables

    console = command_console()
    for note in found.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for table in tables(found.metrics, found.rows, found.classes):
        console.print(table)
