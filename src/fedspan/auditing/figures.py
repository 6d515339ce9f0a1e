"""Figures of a dossier as `svg` elements in the colours of its style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedspan.auditing.bounds import Guarantee
from fedspan.auditing.membership import Attack

_SIDE, _EDGE = 250, 42  # of the ROC chart in pixels: the side of its square, and the room for its axes
_MOST_POINTS = 400
_LOWEST = 0.4  # the scale of the AUCs begins here, or lower where an interval does


@dataclass(frozen=True, slots=True)
class Bar:
    """One AUC with its interval, as percentages of the width of the plot."""

    attack: Attack
    low: float
    at: float
    high: float


@dataclass(frozen=True, slots=True)
class Forest:
    """All AUCs on one scale."""

    bars: Sequence[Bar]
    ticks: Sequence[tuple[float, str]]
    chance: float
    """Place of 0.5."""
    bound: float | None
    """Place of the largest AUC that (ε, δ) allows."""


def forest(attacks: Sequence[Attack], guarantee: Guarantee | None) -> Forest:
    """Return the AUCs as places on a common scale that ends at 1."""
    start = min(_LOWEST, *(attack.auc.low for attack in attacks))
    start = int(start * 10) / 10

    def place(value: float) -> float:
        return round(100 * (value - start) / (1 - start), 2)

    bars = [Bar(a, place(a.auc.low), place(a.auc.value), place(a.auc.high)) for a in attacks]
    steps = [round(start + 0.1 * i, 1) for i in range(round((1 - start) * 10) + 1)]
    bound = None if guarantee is None else place(guarantee.best_auc())
    return Forest(bars, [(place(x), f"{x:.1f}") for x in steps], place(0.5), bound)


def roc(attacks: Sequence[Attack], guarantee: Guarantee | None) -> Markup:
    """Return the share of members found by the share of non-members taken for members, for every threshold."""
    parts = [
        f'<svg class="roc" viewBox="0 0 {_SIDE + 2 * _EDGE} {_SIDE + _EDGE + 14}" role="img" aria-label="ROC curves">',
        f'<rect x="{_EDGE}" y="8" width="{_SIDE}" height="{_SIDE}" fill="none" style="stroke:var(--rule)"/>',
        _path([(0, 0), (1, 1)], "stroke:var(--axis);stroke-dasharray:2 3"),
    ]
    if guarantee is not None:
        grid = [i / 200 for i in range(201)]
        bound = [(x, guarantee.best_tpr(x)) for x in grid]
        parts.append(_path(bound, "stroke:var(--worse);stroke-dasharray:6 3;stroke-width:1.6"))
    for number, attack in enumerate(attacks):
        parts.append(_path(_thinned(attack.roc), f"stroke:var(--s{number});stroke-width:1.8"))
    for share in (0.0, 0.5, 1.0):
        x, y = _point(share, share)
        parts.append(f'<text x="{x}" y="{_SIDE + 24}" text-anchor="middle">{100 * share:.0f} %</text>')
        parts.append(f'<text x="{_EDGE - 4}" y="{y + 4}" text-anchor="end">{100 * share:.0f} %</text>')
    return Markup("".join([*parts, "</svg>"]))


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = max(1, len(points) // _MOST_POINTS)
    return [*points[::step], points[-1]] if points else [(0.0, 0.0)]


def _point(x: float, y: float) -> tuple[float, float]:
    return round(_EDGE + _SIDE * x, 1), round(8 + _SIDE * (1 - y), 1)


def _path(points: Sequence[tuple[float, float]], style: str) -> str:
    places = " L".join("{} {}".format(*_point(x, y)) for x, y in points)
    return f'<path d="M{places}" fill="none" style="{style}"/>'
