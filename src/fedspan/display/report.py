"""The figures of a finished run as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedspan import methods
from fedspan.data.metrics import METRICS
from fedspan.display.progress import number, size


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the untouched base, the average client alone and the federation, side by side.

    Parameters
    ----------
    summary
        The content of `summary.json`.
    """
    measured = summary["metrics"]
    names = _metric_names(summary)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(f"{name} {_arrow(name)}".rstrip(), justify="right")
    table.add_column("up", justify="right")
    table.add_column("down", justify="right")

    def row(label: str, values: Mapping[str, float] | None, *traffic: str, style: str = "") -> None:
        if values:
            table.add_row(label, *(number(values.get(name)) for name in names), *traffic, style=style)

    totals = summary["totals"]
    traffic = (size(totals["bytes_up"]), size(totals["bytes_down"]))
    row("untouched base", measured.get("base"), "0 B", "0 B")
    row("average client alone", measured.get("local"), "0 B", "0 B")
    row(_headline(summary), measured["clients"], *traffic, style="bold")
    ranks = measured.get("per_rank", {})
    if len(ranks) > 1:
        for rank, values in ranks.items():
            row(f"  a client of rank {rank}", values)
    if measured.get("server") != measured["clients"]:
        row("  the server's full state", measured.get("server"))
    for client, values in measured.get("per_client", {}).items():
        row(f"  on the test data of {client}", values)
    row("  on the clients' own data", measured.get("own_data"))
    row("  on unseen data", measured.get("unseen"))
    return table


def _headline(summary: Mapping[str, Any]) -> str:
    info = methods.create(summary["method"], **summary.get("options", {})).info
    if info.pooled or info.alone:
        return f"{info.title} (control)"
    return f"federation ({info.title})"


def _metric_names(summary: Mapping[str, Any]) -> list[str]:
    """Return the metrics in the order of the columns: the run's own first, the loss last."""
    first = summary["metric"]
    others = [name for name in summary["metrics"]["clients"] if name not in (first, "loss")]
    return [first, *others, *(["loss"] if first != "loss" else [])]


def _arrow(name: str) -> str:
    if name == "loss":
        return "↓"
    if name not in METRICS:  # a metric that was registered by the process of the run alone
        return ""
    return "↑" if METRICS[name].higher_is_better else "↓"
