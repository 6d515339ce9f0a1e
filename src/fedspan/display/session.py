"""A run with its progress shown while it works, and a table of its result at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from fedspan.display.notebook import follow_in_notebook, in_kernel
from fedspan.display.progress import follow
from fedspan.support.activity import report

if TYPE_CHECKING:
    from fedspan.runs.events import OnEvent
    from fedspan.runs.execution import Result


def watch(work: Callable[[OnEvent], Result], console: Console) -> Result:
    """Do the work of a run under a progress display, print the table of its result, and return it.

    Parameters
    ----------
    work
        Runs a federation and hands every event to the listener that it is given.
    """
    with follow_in_notebook() if in_kernel() else follow(console) as show:
        report("loading the libraries")  # which the work imports, and this file does not
        result = work(show)
    from fedspan.display.report import summary_table

    console.print()
    console.print(summary_table(result.summary), highlight=False)
    console.print()
    return result
