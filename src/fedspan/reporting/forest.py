"""Differences to a baseline with their intervals, on one scale, as places in per cent of a drawing's width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedspan.display.progress import number
from fedspan.reporting.comparison import Comparison, Difference

_EDGE = 4.0  # per cent of the width that stay free at either side


@dataclass(frozen=True, slots=True)
class Bar:
    """One row: the difference and its interval; places are None where the figure is missing."""

    difference: Difference
    at: float | None
    low: float | None
    high: float | None
    figures: str
    """The difference with its interval, as text."""
    verdict: str
    """The verdict as a sentence."""


@dataclass(frozen=True, slots=True)
class Forest:
    """All rows, with what they share."""

    bars: Sequence[Bar]
    zero: float
    margin: tuple[float, float] | None
    """Ends of the zone in which a difference counts as none."""
    ticks: Sequence[tuple[float, str]]
    """Places on the scale, and their figures."""


def forest(comparison: Comparison) -> Forest | None:
    """Return the drawing of a comparison's differences; None where there are none."""
    if not comparison.differences:
        return None
    margin = comparison.margin
    ends = [0.0, *((margin, -margin) if margin is not None else ())]
    for difference in comparison.differences:
        ends += [v for v in (difference.mean, difference.low, difference.high) if v is not None]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def place(value: float | None) -> float | None:
        return None if value is None else round(_EDGE + (100 - 2 * _EDGE) * (value - low) / span, 2)

    bars = [
        Bar(d, place(d.mean), place(d.low), place(d.high), _figures(d), sentence(comparison, d))
        for d in comparison.differences
    ]
    step = _step(span)
    values = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    ticks = [(place(value) or 0.0, _tick(value)) for value in values]
    zone = None if margin is None else (place(-margin) or 0.0, place(margin) or 0.0)
    return Forest(bars, place(0.0) or 0.0, zone, ticks)


def sentence(comparison: Comparison, difference: Difference) -> str:
    """Return the verdict on one difference in words."""
    if difference.verdict in ("better", "worse"):
        return f"{difference.verdict} than {difference.baseline}"
    if difference.verdict == "equivalent":
        return f"equivalent to {difference.baseline} within ±{number(comparison.margin)}"
    seeds = difference.seeds_for_a_point
    return "open" if seeds is None else f"open: a difference of one point would need {seeds:,} seeds"


def _figures(difference: Difference) -> str:
    if difference.mean is None:
        return "–"
    if difference.low is None or difference.high is None:
        return _signed(difference.mean)
    return f"{_signed(difference.mean)} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _signed(value: float, form: str = "+.3f") -> str:
    return f"{value:{form}}".replace("-", "−")


def _step(span: float) -> float:
    """Return a round number that divides the span into three to six parts."""
    power: float = 10.0 ** math.floor(math.log10(span))
    return next(factor * power for factor in (2.0, 1.0, 0.5, 0.25) if span / (factor * power) >= 3.0)


def _tick(value: float) -> str:
    return "0" if abs(value) < 1e-12 else _signed(value, "+.3g")
