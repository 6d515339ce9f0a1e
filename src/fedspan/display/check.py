"""The page that `fedspan run --check` prints: facts, and the clients' sizes as bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedspan.display.progress import duration, size
from fedspan.runs.check import RunCheck

_LINES = 12
"""Clients that have a bar of their own."""
_WIDTH = 30


def check_lines(found: RunCheck) -> Iterator[RenderableType]:
    """Yield a table of facts, the clients' sizes as bars, and the notes."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _facts(found):
        table.add_row(name, value)
    yield table
    yield ""
    yield from _bars(found.clients)
    for note in found.notes:
        yield f"note: {note}"


def _facts(found: RunCheck) -> Iterator[tuple[str, str]]:
    rows = ", ".join(f"{count:,} {split}" for split, count in found.data["rows"].items())
    classes, names = found.data["num_classes"], found.data["label_names"]
    yield "data", f"{found.data['kind']}; rows: {rows}"
    if classes is not None:
        yield "classes", f"{classes}" + (f": {', '.join(map(str, names[:20]))}" if names else "")
    share = 100 * found.trained_parameters / max(1, found.base_parameters)
    yield (
        "base",
        f"{found.model}, {found.base_parameters:,} parameters; {found.trained_parameters:,} trained ({share:.2g} %)",
    )
    number = f"{found.clients_a_round:g} of {len(found.clients)} clients in each of {found.rounds} rounds"
    yield "federation", f"{found.method}; {number}"
    up, down = found.bytes_up, found.bytes_down
    yield "traffic", f"up {size(up)}, down {size(down)} in the first round; {size((up + down) * found.rounds)} in all"
    yield "memory", f"a client {size(found.client_memory)}; the server's step {size(found.server_memory)}"
    reason = f" ({found.reason})" if found.reason else ""
    processes = "1 process" if found.workers == 1 else f"{found.workers} processes"
    yield "engine", f"{found.engine}{reason} on {found.device}, {processes}"
    steps = f"{found.client_steps:,.0f} client-steps of {1000 * found.step_seconds:.3g} ms"
    evaluations = f"evaluation {duration(found.evaluation_seconds)}"
    yield "time", f"about {duration(found.seconds)}: {steps}, {evaluations}, server {duration(found.server_seconds)}"


def _bars(clients: Sequence[tuple[str, int, int]]) -> Iterator[Text]:
    """Yield the number of examples of every client, or of the smallest, the middle and the largest of many."""
    shown = sorted(clients, key=lambda c: -c[2]) if len(clients) > _LINES else list(clients)
    if len(shown) > _LINES:
        shown = [shown[round(i * (len(shown) - 1) / (_LINES - 1))] for i in range(_LINES)]
        yield Text(f"examples of {_LINES} of the {len(clients)} clients, from the largest to the smallest:")
    else:
        yield Text("examples of every client:")
    most = max(count for _, _, count in shown)
    wide = max(len(name) for name, _, _ in shown)
    for name, rank, count in shown:
        bar = "█" * max(1, round(_WIDTH * count / max(1, most))) if count else ""
        yield Text(f"  {name:<{wide}}  rank {rank:<4} {bar} {count:,}")
