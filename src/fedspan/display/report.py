"""What a run or a set of runs comes to: tables on the terminal, a picture of the learning curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from fedspan import methods
from fedspan.data.metrics import METRICS
from fedspan.display.progress import number, size
from fedspan.support.errors import FedspanError


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The untouched base, the average client alone and the federation, side by side.

    Parameters
    ----------
    summary
        What `summary.json` holds.
    """
    measured = summary["metrics"]
    names = _metric_names(summary)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(f"{name} {_arrow(name)}", justify="right")
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
    row("  on the clients' own data", measured.get("own_data"))
    row("  on unseen data", measured.get("unseen"))
    return table


def _headline(summary: Mapping[str, Any]) -> str:
    info = methods.create(summary["method"], **summary.get("options", {})).info
    if info.pooled or info.alone:
        return f"{info.title} (control)"
    return f"federation ({info.title})"


def _metric_names(summary: Mapping[str, Any]) -> list[str]:
    """The run's metric first, the loss last."""
    first = summary["metric"]
    others = [name for name in summary["metrics"]["clients"] if name not in (first, "loss")]
    return [first, *others, *(["loss"] if first != "loss" else [])]


def _arrow(name: str) -> str:
    return "↑" if name != "loss" and METRICS[name].higher_is_better else "↓"


def method_records() -> list[dict[str, Any]]:
    """Every method with its properties, as the methods themselves state them."""
    records = []
    for factory in methods.METHODS.values():
        method = factory()
        records.append({**asdict(method.info), "secure_sum": method.secure_sum})
    return records


def methods_table() -> Table:
    """The same as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("name", style="bold", no_wrap=True)
    for heading in ("exact", "gauge", "ranks", "sums", "personal"):
        table.add_column(heading, justify="center")
    for heading in ("trains", "up", "down", "paper"):
        table.add_column(heading)
    for record in method_records():
        tags = ("exact", "gauge_invariant", "hetero_rank", "secure_sum", "personalised")
        table.add_row(
            record["name"],
            *("yes" if record[tag] else "–" for tag in tags),
            record["trains"],
            record["traffic_up"],
            record["traffic_down"],
            record["paper"],
        )
    return table


METHODS_LEGEND = """\
exact     what clients receive, at sufficient rank, is the ideal update T = Σ p_k s_k B_k A_k
gauge     re-factoring a client's (B, A) as (B G, G⁻¹ A) does not change the result
ranks     clients may train adapters of different ranks
sums      every exchange is a plain sum, so it runs where the server may see only sums
personal  each client ends with a model of its own
trains    LoRA factors, the weights of the target modules, or all weights
up, down  numbers sent per client, round and m×n module at rank r; K clients, c = Σ r_k
paper     arXiv id"""


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary (empty while the run is unfinished) and round records of a run folder.

    Raises
    ------
    ValueError
        When the folder holds no run, or a damaged one.
    """
    history = folder / "metrics.jsonl"
    if not history.exists():
        raise FedspanError(f"{folder} holds no metrics.jsonl: expected the folder of a `fedspan run`")
    summary = folder / "summary.json"
    try:
        rounds = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
        return json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}, rounds
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FedspanError(f"{folder}: metrics.jsonl or summary.json is damaged ({error})") from None


_COLORS = ("#2a6fbb", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d1e", "#4d4d4d")


def plot(folders: Sequence[Path], out: Path, metric: str | None = None) -> Path:
    """Draw the runs' metric against rounds and against bytes sent, with base and local control as levels.

    Parameters
    ----------
    folders
        Run folders, finished or not. Levels are those of the first one that has them.
    out
        The picture; its ending says the format (.png, .svg, .pdf).
    metric
        One of the metrics in `metrics.jsonl`; none: the summary's.

    Raises
    ------
    ValueError
        When a folder holds no run, no round was evaluated with the metric, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FedspanError("plots need matplotlib: pip install 'fedspan[plots]'") from None
    runs = [(folder, *read_run(folder)) for folder in folders]
    name = metric or next((s["metric"] for _, s, _ in runs if s), None) or _first_metric(runs)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    by_method = len({history[0]["method"] for _, _, history in runs if history}) == len(runs)
    for k, (folder, _, history) in enumerate(runs):
        evaluated = [r for r in history if name in (r.get("eval") or {})]
        if not evaluated:
            raise FedspanError(f"{folder}: no round was evaluated with {name!r}")
        sent = _cumulative(history)
        color = _COLORS[k % len(_COLORS)]
        values = [r["eval"][name] for r in evaluated]
        label = history[0]["method"] if by_method else folder.name
        style = {"color": color, "marker": "o", "markersize": 3.5, "linewidth": 1.8, "label": label}
        by_round.plot([r["round_num"] for r in evaluated], values, **style)
        by_bytes.plot([sent[r["round_num"]] / 1e6 for r in evaluated], values, **style)
    _levels(by_round, next((s for _, s, _ in runs if s), {}), name)
    by_round.set(xlabel="round", ylabel=name)
    by_bytes.set(xlabel="sent up and down, MB")
    for axes in (by_round, by_bytes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    by_bytes.legend(frameon=False, loc="best")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160)
    return out


def _first_metric(runs: Sequence[tuple[Path, Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> str:
    for _, _, history in runs:
        for record in history:
            for name in record.get("eval") or {}:
                if name != "loss":
                    return str(name)
    raise FedspanError(f"{runs[0][0]}: no round was evaluated yet")


def _cumulative(history: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    total, sent = 0, {}
    for record in history:
        total += record["bytes_up"] + record["bytes_down"]
        sent[record["round_num"]] = total
    return sent


def _levels(axes: Any, summary: Mapping[str, Any], name: str) -> None:
    for key, label, dashes in (("base", "untouched base", (1, 2)), ("local", "average client alone", (5, 2))):
        values = summary.get("metrics", {}).get(key)
        if values and name in values:
            axes.axhline(values[name], color="#555555", linewidth=1.2, dashes=dashes)
            axes.annotate(
                label,
                (1, values[name]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#555555",
            )
