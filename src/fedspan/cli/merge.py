"""`fedspan merge`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fedspan.cli import completion
from fedspan.cli.arguments import method_section, parse_rank, parse_weights


def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="ADAPTER_DIR...", help="PEFT LoRA adapter folders.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="The aggregation rule; see `fedspan methods`.",
            autocompletion=completion.method_names,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for the merged adapter.")],
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="W1 W2 …",
            help="Weight of each adapter, such as its number of examples; if not given, all weigh the same.",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", metavar="R", help="Largest rank of the result; if not given, all that it has."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set an option of the method, such as density=0.2 or method.density=0.2; may be repeated.",
            autocompletion=completion.method_options,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME", help="The base's name or folder, where the adapters have several."),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            "--missing",
            metavar="zero|refuse",
            show_default=False,
            help="Modules and heads that only some adapters have: refuse (the default), or take an absent module as no "
            "change and average a head over the adapters that have it.",
        ),
    ] = "refuse",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="Type of the written numbers: float32, bfloat16 or float16."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Write the base with the result in its weights, in place of an adapter.")
    ] = False,
) -> None:
    """Apply an aggregation rule once to PEFT adapter folders from anywhere, of any ranks and scalings.

    \b
    Examples:
      fedspan merge alice bob carol --method glora --out merged
      fedspan merge alice bob --weights 300 100 --method flexlora --out merged
      fedspan merge a b c --method glora --set server_rank=auto --out merged
      fedspan merge a b --method ties --set density=0.2 --rank 32 --out merged
      fedspan merge a b --method flora --base my-llama --full --out model

    Besides the methods: ties, dare_linear, dare_ties and magnitude_prune, which are PEFT's own functions on the changes
    of the weights. docs/merging.md says what cannot be merged, and what to do instead.

    The result is a PEFT folder. If an exact method's result does not fit in it, the loss is reported. The weights end
    at the first word that is not a number; write ./7 for a folder whose name is a number.
    """
    section = method_section(method, settings or ())
    numbers, limit = parse_weights(weights or ()), parse_rank(rank)
    from fedspan.merging.one_shot import merge as merge_adapters
    from fedspan.merging.one_shot import named_rule

    report = merge_adapters(
        folders,
        named_rule(**section),
        weights=numbers,
        rank=limit,
        out=out,
        base=None if base is None else os.path.expanduser(base),
        missing=missing,  # type: ignore[arg-type]  # checked there
        dtype=dtype,
        full=full,
    )
    for line in report.lines():
        print(line)
