"""`fedspan methods`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedspan.cli import completion
from fedspan.cli.arguments import AsJson


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A method, to see its options; if not given, all methods.",
            show_default=False,
            autocompletion=completion.method_names,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every method with its properties, or one method's properties and options.

    \b
    Examples:
      fedspan methods
      fedspan methods glora
      fedspan methods --json
    """
    from fedspan.display import method_tables as tables
    from fedspan.display.console import command_console

    if as_json:
        answer = tables.method_records() if name is None else tables.method_record(name)
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    console = command_console()
    if name is None:
        console.print(tables.methods_table(), highlight=False)
        console.print()
        console.print(tables.LEGEND, style="dim", highlight=False, markup=False)
        return
    console.print(tables.properties_table(name), highlight=False)
    console.print()
    options = tables.options_table(name)
    console.print(options if options.row_count else f"{name} has no options", highlight=False)
