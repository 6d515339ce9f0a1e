"""`fedspan watch`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedspan.cli.report import RunFolders, diagnostics_in_words
from fedspan.support.errors import FedspanError


def watch(
    folders: RunFolders,
    port: Annotated[
        str,
        typer.Option("--port", metavar="N", show_default=False, help="The port; if not given, any that is free."),
    ] = "0",
) -> None:
    """Show the report of runs that go on in a browser on this machine, up to date (needs matplotlib).

    \b
    Examples:
      fedspan watch runs/mine
      fedspan watch runs/mine --port 8765

    The address that is printed holds a secret; nobody else can open the page, and no other machine can reach it.
    Ctrl-C ends it. The run itself is not touched.
    """
    number = _port(port)
    from fedspan import reporting

    live = reporting.serve(folders, diagnostics_in_words, number)
    try:
        print(live.url, flush=True)
        live.run()
    except KeyboardInterrupt:
        live.close()  # the usual end, before the first request


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65536):
        raise FedspanError(f"--port {text!r}: expected a number from 0 to 65535")
    return int(text)
