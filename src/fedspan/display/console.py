"""The console on which progress and tables are shown."""

from __future__ import annotations

import sys

from rich.console import Console

_WIDE = 160


def command_console() -> Console:
    """Return the console of a command: the terminal, or one wide enough for any table where the output is a pipe."""
    # Tables are not folded for a pipe, so that a line of the table stays a line.
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_WIDE)


def console_for(quiet: bool | None) -> Console | None:
    """Return the console on which a function of the library shows its progress, or None for silence.

    Parameters
    ----------
    quiet
        None: show progress on a terminal and in a notebook only; False: always; True: never.
    """
    if quiet:
        return None
    if in_notebook():
        # Rich would make HTML of every line; plain text is kept by all kinds of notebooks.
        return Console(force_jupyter=False, force_terminal=False, width=_WIDE)
    console = command_console()
    return console if console.is_terminal or quiet is False else None


def in_notebook() -> bool:
    """Return whether the code runs under IPython without a terminal, as in Jupyter and its relatives."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None and not sys.stdout.isatty()
