"""The figures of a finished run as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fedspan import methods
from fedspan.data.metrics import METRICS
from fedspan.display.progress import number, size

_MOST_NAMED = 12
"""Clients, above which a table does not show how each judges its model."""


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
    table.add_column("rows", justify="right")
    table.add_column("up", justify="right")
    table.add_column("down", justify="right")

    counts = summary.get("rows", {})

    def row(label: str, values: Mapping[str, float] | None, count: int | None, *traffic: str, style: str = "") -> None:
        if values:
            shown = "" if count is None else f"{count:,}"
            table.add_row(label, *(number(values.get(name)) for name in names), shown, *traffic, style=style)

    totals = summary["totals"]
    traffic = (size(totals["bytes_up"]), size(totals["bytes_down"]))
    row("untouched base", measured.get("base"), counts.get("base"), "0 B", "0 B")
    row("average client alone", measured.get("local"), counts.get("local"), "0 B", "0 B")
    row(_headline(summary), measured.get("clients"), counts.get("clients"), *traffic, style="bold")
    ranks = measured.get("per_rank", {})
    if len(ranks) > 1:
        for rank, values in ranks.items():
            row(f"  a client of rank {rank}", values, counts.get("per_rank"))
    if measured.get("server") != measured.get("clients"):
        row("  the server's full state", measured.get("server"), counts.get("server"))
    judged = summary.get("client_evaluation") is not None
    of_client = {client["client_id"]: client for client in summary.get("clients", ())}
    per_client = measured.get("per_client", {})
    named = {} if judged and len(per_client) > _MOST_NAMED else per_client
    for client, values in named.items():
        row(f"  on the {'rows' if judged else 'test data'} of {client}", values, of_client.get(client, {}).get("rows"))
    if summary.get("client_evaluation") is None:
        row("  on the clients' own data", measured.get("own_data"), counts.get("own_data"))
    for label, values, count in client_rows(summary):
        row(f"  {label}", values, count)
    row(*_worst(summary, of_client))
    row("  on unseen data", measured.get("unseen"), counts.get("unseen"))
    return table


def client_rows(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float] | None, int | None]]:
    """Return the figures that the clients' own evaluation adds to a table, with the rows behind them."""
    found = summary.get("client_evaluation")
    if not isinstance(found, Mapping):
        return []
    rows = [
        ("mean over the clients, unweighted", found.get("unweighted"), found.get("rows")),
        ("standard deviation over the clients", found.get("spread"), None),
    ]
    if dict(summary.get("metrics") or {}).get("clients") == found.get("figures"):
        return rows  # they are the federation's
    return [("on the clients' held-out rows", found.get("figures"), found.get("rows")), *rows]


def _worst(
    summary: Mapping[str, Any], of_client: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Mapping[str, float] | None, int | None]:
    """Return the row of the client that fares worst; without figures where all clients have the same."""
    worst = summary.get("worst_client")
    name = summary["metric"]
    found = {client["figures"][name] for client in of_client.values() if client.get("figures")}
    if worst is None or len(found) < 2:
        return "", None, None
    where = ", on its own data" if worst["data"] == "own" else ""
    client = of_client[worst["client_id"]]
    return f"  the worst, {worst['client_id']}{where}", client["figures"], client["rows"]


def _headline(summary: Mapping[str, Any]) -> str:
    info = methods.create(summary["method"], **summary.get("options", {})).info
    if info.pooled or info.alone:
        return f"{info.title} (control)"
    return f"federation ({info.title})"


def _metric_names(summary: Mapping[str, Any]) -> list[str]:
    """Return the metrics in the order of the columns: the run's own first, the loss last."""
    first = summary["metric"]
    others = [name for name in summary["metrics"].get("clients", ()) if name not in (first, "loss")]
    return [first, *others, *(["loss"] if first != "loss" else [])]


def _arrow(name: str) -> str:
    if name == "loss":
        return "↓"
    if name not in METRICS:  # a metric that was registered by the process of the run alone
        return ""
    return "↑" if METRICS[name].higher_is_better else "↓"
