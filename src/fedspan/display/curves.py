"""Learning curves of runs as a picture."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspan.config import Config
from fedspan.display import run_groups
from fedspan.display.own_files import write_own
from fedspan.display.run_folder import read_run
from fedspan.support.errors import FedspanError, one_line

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow that is too light on white.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_LEVELS = (("base", "untouched base", (1, 2)), ("local", "average client alone", (5, 2)))
_FEW = 40  # rounds that get a marker each; more would be a thick line
AXES = ("both", "round", "megabytes")
"""Values of `x`: what the horizontal axis shows, in one panel or two."""
_MAKER = "fedspan"
_FORMATS: Mapping[str, tuple[Mapping[str, str | None], bytes]] = {
    "png": ({"Software": _MAKER}, b"Software\0fedspan"),
    "svg": ({"Title": _MAKER, "Date": None}, b"<dc:title>fedspan</dc:title>"),
    "pdf": ({"Creator": _MAKER, "CreationDate": None}, b"/Creator (fedspan)"),
}
"""Format of a picture -> what it says of its origin, and how that stands in the file."""


@dataclass(frozen=True, slots=True)
class _Run:
    folder: Path
    summary: Mapping[str, Any]
    """The run's summary; empty while the run is unfinished."""
    history: Sequence[Mapping[str, Any]]
    config: Config | None

    def evaluated(self, metric: str) -> dict[int, float]:
        """Return the figure of every round that was evaluated with the metric."""
        records = [record for record in self.history if metric in (record.get("eval") or {})]
        if not records:
            raise FedspanError(f"{self.folder}: no round was evaluated with {metric!r}")
        return {record["round_num"]: _number(record["eval"][metric]) for record in records}

    def bytes_until(self) -> dict[int, float]:
        """Return the bytes sent up and down until the end of each round."""
        total, sent = 0.0, {}
        for record in self.history:
            if not {"bytes_up", "bytes_down"} <= record.keys():
                raise FedspanError(f"{self.folder}: round {record['round_num']} has no bytes_up and bytes_down")
            total += record["bytes_up"] + record["bytes_down"]
            sent[record["round_num"]] = total
        return sent


@dataclass(frozen=True, slots=True)
class _Curve:
    """One line of the picture: a run, or the mean of several that differ by their seeds."""

    label: str
    rounds: Sequence[int]
    megabytes: Sequence[float]
    mean: Sequence[float]
    deviation: Sequence[float] | None
    """Sample standard deviation over the seeds; None for a single run."""

    @classmethod
    def of(cls, runs: Sequence[_Run], label: str, metric: str) -> _Curve:
        values, sent = [run.evaluated(metric) for run in runs], [run.bytes_until() for run in runs]
        rounds = sorted(set(values[0]).intersection(*values))
        if not rounds:
            raise FedspanError(
                f"{', '.join(str(run.folder) for run in runs)}: no round was evaluated with {metric!r} in all of them; "
                "expected --no-band to draw them one by one"
            )
        by_round = [[figures[n] for figures in values] for n in rounds]
        return cls(
            label if len(runs) == 1 else f"{label} ({len(runs)} seeds, mean ± sd)",
            rounds,
            [statistics.fmean(bytes_of[n] for bytes_of in sent) / 1e6 for n in rounds],
            [statistics.fmean(figures) for figures in by_round],
            None if len(runs) == 1 else [_deviation(figures) for figures in by_round],
        )


def plot(
    folders: Sequence[Path], out: Path, metric: str | None = None, *, x: str = "both", band: bool | None = None
) -> Path:
    """Draw the runs' metric against rounds and against bytes sent, with base and local control as levels.

    Parameters
    ----------
    folders
        Run folders, finished or not. Levels are those of the first finished one.
    out
        The picture; its ending determines the format (.png, .svg, .pdf). A picture of fedspan's is replaced.
    metric
        One of the metrics in `metrics.jsonl`; None: the summary's.
    x
        One of `AXES`.
    band
        Average runs and show their standard deviation as a band. None: those whose settings differ by their seeds
        alone; True: all of one method with the same options; False: draw every run.

    Raises
    ------
    FedspanError
        When a folder holds no run, no round was evaluated with the metric, the picture's format is unknown, there is
        something else where it is to be written, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FedspanError("plots need matplotlib: pip install 'fedspan[plots]'") from None
    if x not in AXES:
        raise FedspanError(f"--x {x!r}: expected {', '.join(AXES[:-1])} or {AXES[-1]}")
    if suite := next((folder for folder in folders if (folder / "comparison.json").exists()), None):
        raise FedspanError(f"{suite} is a comparison: `fedspan report {suite}` draws it; plot takes run folders")
    runs = [_Run(folder, *read_run(folder), run_groups.config_of(folder)) for folder in folders]
    name = metric or _metric_of(runs)
    groups = run_groups.grouped([(_key(run, band), run) for run in runs])
    curves = [
        _Curve.of(group, label, name) for group, label in zip(groups, _labels([g[0] for g in groups]), strict=True)
    ]
    wanted = ("round", "megabytes") if x == "both" else (x,)
    figure = Figure(figsize=(9 if len(wanted) == 2 else 5.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(wanted), sharey=True, squeeze=False)[0]
    for axis, axes in zip(wanted, panels, strict=True):
        _panel(axes, curves, axis)
    _draw_levels(panels[0], next((run.summary for run in runs if run.summary), {}), name)
    panels[0].set_ylabel(one_line(name, 60))
    _legend(figure, panels[-1], len(curves))
    return save_figure(figure, out)


def save_figure(figure: Any, out: Path) -> Path:
    """Write a figure in the format of the file's ending, and return the path.

    Raises
    ------
    FedspanError
        For an ending that is no format of pictures, and where there is a file that fedspan did not make.
    """
    ending = out.suffix.removeprefix(".").lower()
    if ending not in _FORMATS:
        raise FedspanError(f"{out}: expected a picture that ends in .png, .svg or .pdf")
    import matplotlib

    metadata, marker = _FORMATS[ending]
    buffer = io.BytesIO()
    # Names of folders may hold a dollar sign, which is no formula there.
    with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42, "text.parse_math": False}):
        for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
            text.set_parse_math(False)
        figure.savefig(buffer, format=ending, dpi=160, metadata=metadata)
    return write_own(out, buffer.getvalue(), marker)


def _key(run: _Run, band: bool | None) -> str:
    """Return what runs have in common that are drawn as one line."""
    if band is False or run.config is None:
        return str(run.folder)
    return str(sorted(run.config.method.items())) if band else run_groups.repeated(run.config)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


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
    """Return the runs' methods where these tell them apart, with other settings where needed, or their folders."""
    methods = [str(run.history[0]["method"]) for run in runs if run.history]
    if len(set(methods)) == len(runs):
        return methods
    configs = [run.config for run in runs if run.config is not None]
    if len(configs) == len(runs):
        names = run_groups.labels(configs)
        if len(set(names)) == len(runs):
            return names
    return _folder_names([run.folder for run in runs])


def _folder_names(folders: Sequence[Path]) -> list[str]:
    """Return as many of the last parts of the paths as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def _panel(axes: Any, curves: Sequence[_Curve], axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for k, curve in enumerate(curves):
        xs = curve.rounds if axis == "round" else curve.megabytes
        color = _COLORS[k % len(_COLORS)]
        axes.plot(
            xs,
            curve.mean,
            color=color,
            linestyle=_DASHES[k // len(_COLORS) % len(_DASHES)],
            marker=_MARKERS[k % len(_MARKERS)] if len(xs) <= _FEW else None,
            markersize=4,
            linewidth=1.8,
            # Matplotlib keeps names that begin with an underscore out of the legend.
            label=one_line(curve.label, 60).lstrip("_"),
        )
        if curve.deviation is not None:
            low, high = (
                [m + sign * d for m, d in zip(curve.mean, curve.deviation, strict=True)] for sign in (-1.0, 1.0)
            )
            axes.fill_between(xs, low, high, color=color, alpha=0.16, linewidth=0)
    if axis == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round" if axis == "round" else "sent up and down, MB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def _legend(figure: Any, axes: Any, count: int) -> None:
    """Put few names into the picture, and many beside it, where they hide no curve."""
    if count <= 4:
        axes.legend(frameon=False, loc="best", fontsize=8)
        return
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside right upper", fontsize=8, ncols=1 + (count - 1) // 16)


def _draw_levels(axes: Any, summary: Mapping[str, Any], metric: str) -> None:
    for key, label, dashes in _LEVELS:
        values = summary.get("metrics", {}).get(key)
        if values and isinstance(values.get(metric), int | float):
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
