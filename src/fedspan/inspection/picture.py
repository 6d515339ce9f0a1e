"""The diagnostics of a run as one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedspan.display.curves import save_figure
from fedspan.inspection.record import Inspection
from fedspan.support.errors import FedspanError

_COLORS = ("#2a6fbb", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d1e", "#4d4d4d")


def plot(run: Inspection, out: Path) -> Path:
    """Draw distance, gauge, rank and angles by round in one picture.

    Parameters
    ----------
    out
        The picture; its ending determines the format (.png, .svg, .pdf).

    Raises
    ------
    FedspanError
        When matplotlib is missing, or for an unknown format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FedspanError("plots need matplotlib: pip install 'fedspan[plots]'") from None
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    ranks = run.ranks()
    by_rank = {f"to a client of rank {rank}": _readout_series(run, rank) for rank in ranks}
    full = {"at full rank": run.series("distance_from_ideal")}
    _panel(panels[0][0], "away from the ideal update, %", run, full | (by_rank if len(by_rank) > 1 else {}), 100.0)
    gauge = {
        "gauge sensitivity": run.series("gauge_sensitivity"),
        "cross terms of averaged factors": run.series("cross_terms"),
    }
    _panel(panels[0][1], "change of the result, %", run, gauge, 100.0)
    ranks_of = {"effective": run.series("effective_rank"), "stable": run.series("stable_rank")}
    _panel(panels[1][0], "rank of the whole change", run, ranks_of)
    angles = {
        "between clients": run.series("angle_clients_mean"),
        "client to consensus": run.series("angle_consensus"),
        "drift of the consensus": run.series("drift_mean"),
    }
    _panel(panels[1][1], "mean principal angle, degrees", run, angles)
    for axes in panels[1]:
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{run.info.title}: {run.folder.name}", fontsize=10)
    return save_figure(figure, out)


def _readout_series(run: Inspection, rank: str) -> list[float | None]:
    return [(record["diagnostics"].get("readout_loss") or {}).get(rank) for record in run.rounds]


def _panel(
    axes: Any, label: str, run: Inspection, lines: Mapping[str, Sequence[float | None]], unit: float = 1.0
) -> None:
    """Draw one quarter: a line per figure that applies in some round, or a note that none does."""
    rounds = [record["round_num"] for record in run.rounds]
    drawn = {name: values for name, values in lines.items() if any(v is not None for v in values)}
    for (name, values), color in zip(drawn.items(), _COLORS * 3, strict=False):
        heights = [math.nan if v is None else v * unit for v in values]
        axes.plot(rounds, heights, color=color, marker="o", markersize=3, linewidth=1.6, label=name)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if drawn:
        # With at least 1 on the axis, rounding errors look like zero and not like a curve.
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
        axes.legend(frameon=False, loc="best", fontsize=8)
    else:
        axes.text(0.5, 0.5, "does not apply", transform=axes.transAxes, ha="center", color="#555555", fontsize=9)
