"""`fedspan predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedspan.cli.arguments import Settings
from fedspan.cli.evaluate import Base, Data, Model


def predict(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A new file that ends in .jsonl or .csv.")],
    base: Base = None,
    settings: Settings = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file where it exists.")] = False,
) -> None:
    """Write what a finished run, or a PEFT adapter from anywhere, predicts for every row.

    \b
    Examples:
      fedspan predict runs/mine --data new.csv --out predicted.csv
      fedspan predict adapter --base llama --data a.jsonl --out b.jsonl

    The columns of the input are kept, and rows need no label. A classifier's rows get `prediction` and the
    probabilities (in CSV, `probability` of the predicted class), others the number or the generated answer.
    """
    from fedspan.runs import application

    found = application.predict_rows(model, data, out, force=force, settings=settings or (), base=base)
    for note in found.notes:
        print(note)
    print(f"{found.out}  {found.rows:,} rows")
