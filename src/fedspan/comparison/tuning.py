"""The choice among the values of a grid, by runs on held-out training data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.comparison.plan import combinations

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """The values that an arm runs with under a condition."""

    values: Mapping[str, Any]
    at_edge: bool = False
    """The best value is the smallest or largest that was tried, so a better one may lie beyond."""


def mean_score(figures: Sequence[float | None], higher_is_better: bool) -> float:
    """Return the mean of the figures over the tuning seeds, larger being better; -inf where one run diverged."""
    numbers = [value for value in figures if value is not None]
    if len(numbers) < len(figures):
        return -math.inf
    mean = math.fsum(numbers) / len(numbers)
    return mean if higher_is_better else -mean


def best(tried: Sequence[Values], scores: Sequence[float]) -> Values:
    """Return the values with the highest score; of several, those that were tried first."""
    return tried[max(range(len(tried)), key=lambda i: scores[i])]


def choice(tried: Sequence[Values], scores: Sequence[float]) -> Choice:
    """Return the best values, and whether one of them is at the edge of those that were tried."""
    chosen = best(tried, scores)
    return Choice(chosen, any(_at_edge(value, [one[key] for one in tried]) for key, value in chosen.items()))


def _at_edge(value: Any, tried: Sequence[Any]) -> bool:
    numbers = [other for other in tried if _is_positive(other)]
    return len(numbers) == len(tried) and len({*numbers}) > 1 and value in (min(numbers), max(numbers))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def beyond_the_edge(tried: Sequence[Values], scores: Sequence[float]) -> Values | None:
    """Return one more value to try: the next one, in the grid's own steps, beyond a best one that is at the edge.

    None where the best is not at the edge, and for grids of more than one setting or of other values than positive
    numbers.
    """
    (key, *others) = tried[0]
    chosen = best(tried, scores)
    if others or not _at_edge(chosen[key], [one[key] for one in tried]):
        return None
    values = sorted({one[key] for one in tried})
    edge, inner = (values[0], values[1]) if chosen[key] == values[0] else (values[-1], values[-2])
    beyond: float = edge * edge / inner
    if all(isinstance(value, int) for value in values):
        whole = max(1, round(beyond))
        return None if whole in values else {key: whole}
    return {key: float(f"{beyond:.2g}")}


def tried_values(grid: Mapping[str, Sequence[Any]], more: Sequence[Values] = ()) -> list[Values]:
    """Return all values to try, each once: the combinations of the grid, and those added at its edge."""
    distinct = {json.dumps(values): values for values in (*combinations(grid), *more)}
    return list(distinct.values())
