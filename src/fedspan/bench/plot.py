"""results.jsonl -> one plot per suite: the time of every arm against the size that grows in the suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedspan.bench.harness import describe
from fedspan.bench.table import Record, latest

GROWS: Mapping[str, str] = {"server": "K", "clients": "hidden", "scaling": "K", "galore": "r"}
"""The key on the horizontal axis by suite; a suite without one has a single case and gets bars."""
_PANELS = 12
_COLORS = ("#0b6e99", "#d1495b", "#3c7d3c", "#b07d12", "#6b4fa0", "#3d3d3d", "#e07b39", "#4fa3a5", "#9a5ca8", "#7a7a7a")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw SUITE.png for every suite that was measured, from the latest machine and sizes; return the paths."""
    paths = []
    for suite in dict.fromkeys(r["suite"] for r in records):
        own = _latest_setting([r for r in records if r["suite"] == suite])
        if own:
            path = folder / f"{suite}.png"
            figure = _lines(own, GROWS[suite]) if suite in GROWS else _bars(own)
            figure.savefig(path, dpi=140)
            paths.append(path)
    return paths


def _latest_setting(records: Sequence[Record]) -> list[Record]:
    """Return the newest measurements that were taken with the sizes and on the CPU of the last one."""
    measured = [r for r in latest(records) if r["median"] is not None]
    return [r for r in measured if _setting(r) == _setting(measured[-1])]


def _setting(record: Record) -> tuple[Any, ...]:
    return record["quick"], record["machine"]["cpu"]


def _lines(records: Sequence[Record], axis: str) -> Figure:
    """Draw one panel for every combination of the other keys, the largest ones, with logarithmic axes."""
    panels = _panels(records, axis)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 1.6, 3.6 * rows), layout="constrained")
    arms = list(dict.fromkeys(r["arm"] for r in records))
    for i, (title, group) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, group, axis, arms)
        axes.set_title(title, fontsize=9)
    handles = {label: h for a in figure.axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _panels(records: Sequence[Record], axis: str) -> dict[str, list[Record]]:
    """Return the records of each panel by its title."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["case"].get("phase") == "broadcast":  # only in the table: it hardly depends on anything
            continue
        groups.setdefault(describe({k: v for k, v in record["case"].items() if k != axis}), []).append(record)
    # A panel with one point on its axis shows nothing; the last ones are the largest.
    drawn = {title: g for title, g in groups.items() if len({r["case"][axis] for r in g}) > 1} or groups
    return dict(list(drawn.items())[-_PANELS:])


def _panel(axes: Any, records: Sequence[Record], axis: str, arms: Sequence[str]) -> None:
    for k, arm in enumerate(arms):
        points = sorted((r["case"][axis], r["median"]) for r in records if r["arm"] == arm)
        if points:
            color = _COLORS[k % len(_COLORS)]
            dashes = "-" if k < len(_COLORS) else "--"
            axes.plot(*zip(*points, strict=True), dashes, color=color, marker="o", markersize=3, label=arm)
    floors = sorted({(r["case"][axis], r["floor_seconds"]) for r in records if r.get("floor_seconds")})
    if floors:
        axes.plot(*zip(*floors, strict=True), ":", color="#000000", linewidth=1, label="floor")
    _style(axes, axis, sorted({r["case"][axis] for r in records}))


def _style(axes: Any, axis: str, ticks: Sequence[Any]) -> None:
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(records: Sequence[Record]) -> Figure:
    figure = Figure(figsize=(7, 0.5 * len(records) + 1), layout="constrained")
    axes = figure.add_subplot()
    labels = [r["arm"] for r in records][::-1]
    axes.barh(labels, [r["median"] for r in records][::-1], color="#9db8c4", label="start-up and end")
    rounds = [r["details"].get("rounds_seconds", 0.0) for r in records][::-1]
    axes.barh(labels, rounds, color=_COLORS[0], label="rounds")
    axes.set(xlabel="seconds", title=describe(records[0]["case"]))
    axes.title.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
