"""Learning curves of runs as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspan.display.run_folder import read_run
from fedspan.support.errors import FedspanError

_COLORS = ("#2a6fbb", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d1e", "#4d4d4d")
_LEVELS = (("base", "untouched base", (1, 2)), ("local", "average client alone", (5, 2)))


@dataclass(frozen=True, slots=True)
class _Run:
    folder: Path
    summary: Mapping[str, Any]
    """The run's summary; empty while the run is unfinished."""
    history: Sequence[Mapping[str, Any]]

    def evaluated(self, metric: str) -> list[Mapping[str, Any]]:
        """Return the records of the rounds that were evaluated with the metric."""
        records = [record for record in self.history if metric in (record.get("eval") or {})]
        if not records:
            raise FedspanError(f"{self.folder}: no round was evaluated with {metric!r}")
        return records

    def bytes_until(self) -> dict[int, int]:
        """Return the bytes sent up and down until the end of each round."""
        total, sent = 0, {}
        for record in self.history:
            if not {"bytes_up", "bytes_down"} <= record.keys():
                raise FedspanError(f"{self.folder}: round {record['round_num']} has no bytes_up and bytes_down")
            total += record["bytes_up"] + record["bytes_down"]
            sent[record["round_num"]] = total
        return sent


def plot(folders: Sequence[Path], out: Path, metric: str | None = None) -> Path:
    """Draw the runs' metric against rounds and against bytes sent, with base and local control as levels.

    Parameters
    ----------
    folders
        Run folders, finished or not. Levels are those of the first finished one.
    out
        The picture; its ending determines the format (.png, .svg, .pdf).
    metric
        One of the metrics in `metrics.jsonl`; None: the summary's.

    Raises
    ------
    FedspanError
        When a folder holds no run, no round was evaluated with the metric, the picture's format is unknown, or
        matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FedspanError("plots need matplotlib: pip install 'fedspan[plots]'") from None
    runs = [_Run(folder, *read_run(folder)) for folder in folders]
    name = metric or _metric_of(runs)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for k, (run, label) in enumerate(zip(runs, _labels(runs), strict=True)):
        _draw(run, name, label, _COLORS[k % len(_COLORS)], by_round, by_bytes)
    _draw_levels(by_round, next((run.summary for run in runs if run.summary), {}), name)
    by_round.set(xlabel="round", ylabel=name)
    by_bytes.set(xlabel="sent up and down, MB")
    for axes in (by_round, by_bytes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    by_bytes.legend(frameon=False, loc="best")
    return save_figure(figure, out)


def save_figure(figure: Any, out: Path) -> Path:
    """Write a figure in the format of the file's ending, and return the path.

    Raises
    ------
    FedspanError
        For an ending that is no format of matplotlib.
    """
    ending = out.suffix.removeprefix(".").lower()
    if ending not in figure.canvas.get_supported_filetypes():
        raise FedspanError(f"{out}: expected a picture that ends in .png, .svg or .pdf")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160)
    return out


def _metric_of(runs: Sequence[_Run]) -> str:
    """Return the metric of the first summary; without any, the first metric that was evaluated."""
    for run in runs:
        if run.summary:
            return str(run.summary["metric"])
    for run in runs:
        for record in run.history:
            for name in record.get("eval") or {}:
                if name != "loss":
                    return str(name)
    raise FedspanError(f"{runs[0].folder}: no round was evaluated yet")


def _labels(runs: Sequence[_Run]) -> list[str]:
    """Return the runs' methods where these tell them apart, otherwise the names of their folders."""
    methods = [str(run.history[0]["method"]) for run in runs if run.history]
    return methods if len(set(methods)) == len(runs) else [run.folder.name for run in runs]


def _draw(run: _Run, metric: str, label: str, color: str, by_round: Any, by_bytes: Any) -> None:
    evaluated, sent = run.evaluated(metric), run.bytes_until()
    # A gap where the figure is not defined.
    values = [math.nan if record["eval"][metric] is None else record["eval"][metric] for record in evaluated]
    style = {"color": color, "marker": "o", "markersize": 3.5, "linewidth": 1.8, "label": label}
    by_round.plot([record["round_num"] for record in evaluated], values, **style)
    by_bytes.plot([sent[record["round_num"]] / 1e6 for record in evaluated], values, **style)


def _draw_levels(axes: Any, summary: Mapping[str, Any], metric: str) -> None:
    for key, label, dashes in _LEVELS:
        values = summary.get("metrics", {}).get(key)
        if values and values.get(metric) is not None:
            axes.axhline(values[metric], color="#555555", linewidth=1.2, dashes=dashes)
            axes.annotate(
                label,
                (1, values[metric]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                fontsize=8,
                color="#555555",
            )
