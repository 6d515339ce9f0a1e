"""Learning curves as SVG for a page: the colours are those of its style sheet, and no text comes from a file."""

from __future__ import annotations

import io
import re
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedspan.support.errors import FedspanError

NUM_COLORS = 8
"""Colours of the style sheet, `--s0` and so on; line styles and markers tell apart what shares one."""
_INK, _MUTED = "#000001", "#000002"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FEW = 30  # points that get a marker each
_SIZE = (4.7, 2.9)  # inches; 338 points wide, so that text keeps its size on a telephone
_FONT = 9
# Matplotlib's settings are the process's, and pages are made in several threads of a server.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class Line:
    """One curve, or the mean of several."""

    index: int
    """Place in the legend, which decides colour, dashes and marker."""
    xs: Sequence[float]
    ys: Sequence[float]
    deviation: Sequence[float] | None = None
    """Half of the height of the band around it; None for a single run."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's figures and the bytes sent until each round."""

    values: Mapping[int, float]
    sent: Mapping[int, float]


def line_of(index: int, curves: Sequence[Curve], by: str) -> Line | None:
    """Return the mean of curves over the rounds that all of them have; None where there are none.

    Parameters
    ----------
    by
        `round`, or `megabytes`: the mean of the bytes that the runs had sent by that round.
    """
    rounds = sorted(set(curves[0].values).intersection(*(curve.values for curve in curves)))
    if not rounds:
        return None
    values = [[curve.values[n] for curve in curves] for n in rounds]
    xs = (
        [float(n) for n in rounds]
        if by == "round"
        else [statistics.fmean(curve.sent[n] for curve in curves) / 1e6 for n in rounds]
    )
    deviation = [statistics.stdev(own) for own in values] if len(curves) > 1 else None
    return Line(index, xs, [statistics.fmean(own) for own in values], deviation)


def draw(lines: Sequence[Line], xlabel: str, levels: Sequence[float] = (), *, whole: bool = False) -> Markup:
    """Return a chart as an `svg` element.

    Parameters
    ----------
    xlabel
        Name of the horizontal axis, with its unit.
    levels
        Heights of dotted lines across the chart.
    whole
        Only whole numbers on the horizontal axis.

    Raises
    ------
    FedspanError
        When matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise FedspanError("a report needs matplotlib: pip install 'fedspan[plots]'") from None
    salt = f"{xlabel}{[line.xs for line in lines]}{[line.ys for line in lines]}"
    with (
        _ONE_AT_A_TIME,
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": _FONT}),
    ):
        figure = Figure(figsize=_SIZE, layout="constrained", facecolor="none")
        axes = figure.subplots()
        for line in lines:
            _draw_line(axes, line)
        for level in levels:
            axes.axhline(level, color=_MUTED, linewidth=1.1, dashes=(1.5, 2.5))
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        _style(axes, xlabel)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_for_page(buffer.getvalue()))


def glyph(index: int) -> Markup:
    """Return the sign of a curve in a legend as an `svg` element."""
    dash = _DASHES[index // NUM_COLORS % len(_DASHES)]
    pattern = "" if isinstance(dash, str) else f' stroke-dasharray="{" ".join(str(2 * part) for part in dash[1])}"'
    shape = _SHAPES[_MARKERS[index % len(_MARKERS)]]
    color = f"var(--s{index % NUM_COLORS})"
    return Markup(
        f'<svg class="glyph" width="30" height="12" viewBox="0 0 30 12" aria-hidden="true">'
        f'<path d="M1 6H29" fill="none" style="stroke:{color};stroke-width:2"{pattern}/>'
        f'<path d="{shape}" style="fill:{color}"/></svg>'
    )


_SHAPES = {
    "o": "M15 2.6a3.4 3.4 0 1 1 0 6.8a3.4 3.4 0 1 1 0 -6.8z",
    "s": "M12 3h6v6h-6z",
    "^": "M15 1.8l4 7.4h-8z",
    "D": "M15 1.6l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
    "v": "M15 10.2l4 -7.4h-8z",
    "P": "M13.4 2h3.2v2.4h2.4v3.2h-2.4v2.4h-3.2v-2.4h-2.4v-3.2h2.4z",
    "X": "M12.6 2l2.4 2.2l2.4 -2.2l1.8 1.8l-2.3 2.2l2.3 2.2l-1.8 1.8l-2.4 -2.2l-2.4 2.2l-1.8 -1.8l2.3 -2.2l-2.3 -2.2z",
}


def _draw_line(axes: Any, line: Line) -> None:
    color = _color(line.index)
    axes.plot(
        line.xs,
        line.ys,
        color=color,
        linestyle=_DASHES[line.index // NUM_COLORS % len(_DASHES)],
        marker=_MARKERS[line.index % len(_MARKERS)] if len(line.xs) <= _FEW else None,
        markersize=4,
        linewidth=1.7,
    )
    if line.deviation is not None:
        low = [y - d for y, d in zip(line.ys, line.deviation, strict=True)]
        high = [y + d for y, d in zip(line.ys, line.deviation, strict=True)]
        axes.fill_between(line.xs, low, high, color=color, alpha=0.15, linewidth=0)


def _style(axes: Any, xlabel: str) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel(xlabel, color=_INK)
    axes.tick_params(colors=_INK, length=3, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_MUTED, linewidth=0.7)
    axes.grid(color=_MUTED, alpha=0.25, linewidth=0.5)


def _color(index: int) -> str:
    # A colour that no part of the chart has otherwise, until the style sheet's takes its place.
    return f"#0000f{index % NUM_COLORS}"


def _for_page(svg: str) -> str:
    """Return matplotlib's SVG as an element of a page, in the colours and the font of its style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="chart" viewBox="\1" aria-hidden="true">', svg, count=1
    )
    svg = svg.replace(_INK, "var(--ink)").replace(_MUTED, "var(--axis)")
    svg = re.sub(r"#0000f([0-7])", r"var(--s\1)", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"[ \t]*\n[ \t]*", "\n", svg)
    return re.sub(r"\n+", "\n", svg).strip()
