"""From the lines of the finished runs to the content of `comparison.json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedspan.comparison.differences import Difference, Pairs, judge, pair
from fedspan.comparison.suite import POINT, Suite
from fedspan.comparison.tuning import Choice

Line = Mapping[str, Any]
Cell = tuple[str, str]


def comparison(suite: Suite, lines: Mapping[Cell, Sequence[Line]], choices: Mapping[Cell, Choice]) -> dict[str, Any]:
    """Return everything that a comparison has found, as plain values.

    Parameters
    ----------
    lines
        (condition, arm) -> the final runs, one for each seed.
    choices
        (condition, arm) -> the values that it ran with.
    """
    every = [line for own in lines.values() for line in own]
    first, margin = every[0], suite.margin * POINT
    family = [
        pair(c, arm, _values(suite, lines[c, arm]), _values(suite, lines[c, suite.baseline]), first["rows"])
        for c, arm in lines
        if arm != suite.baseline and (c, suite.baseline) in lines
    ]
    higher = first["higher_is_better"]
    judged = judge(family, margin=margin, confidence=suite.confidence, higher_is_better=higher, point=POINT)
    return {
        "name": suite.name,
        "metric": first["metric"],
        "higher_is_better": higher,
        "figure": suite.figure,
        "last_rounds": suite.last_rounds,
        "margin": margin,
        "confidence": suite.confidence,
        "baseline": suite.baseline,
        "seeds": list(suite.seeds),
        "conditions": list(suite.condition_names),
        "arms": list(suite.arm_names),
        "base": [_base(condition, lines, every) for condition in suite.condition_names],
        "cells": [_cell(suite, cell, own, choices[cell]) for cell, own in lines.items()],
        "differences": [_difference(suite, one) for one in judged],
    }


def _values(suite: Suite, lines: Iterable[Line]) -> dict[int, float | None]:
    return {line["seed"]: line["figures"][suite.figure] for line in lines}


def _cell(suite: Suite, cell: Cell, lines: Sequence[Line], choice: Choice) -> dict[str, Any]:
    values = _values(suite, lines)
    known = [value for value in values.values() if value is not None]
    unseen = [line["unseen"] for line in lines if line["unseen"] is not None]
    return {
        "condition": cell[0],
        "arm": cell[1],
        "n": len(known),
        "diverged": len(values) - len(known),
        "mean": mean(known),
        "std": deviation(known),
        "values": {str(seed): value for seed, value in values.items()},
        "settings": dict(choice.values),
        "at_edge": choice.at_edge,
        "rows": lines[0]["rows"],
        "unseen": mean(unseen),
        **{key: mean([line[key] for line in lines]) for key in ("bytes_up", "bytes_down", "seconds")},
    }


def _base(condition: str, lines: Mapping[Cell, Sequence[Line]], every: Sequence[Line]) -> dict[str, Any]:
    """Return the figures of the untouched base: each was measured once, in some run of the same seed, base and data."""
    measured = {(line["seed"], line["base_key"]): line["base"] for line in every if line["base"] is not None}
    wanted = [line for (c, _), own in lines.items() if c == condition for line in own]
    values = {str(line["seed"]): measured.get((line["seed"], line["base_key"])) for line in wanted}
    return {"condition": condition, "mean": mean([v for v in values.values() if v is not None]), "values": values}


def _difference(suite: Suite, one: Difference) -> dict[str, Any]:
    pairs: Pairs = one.pairs
    low, high = one.interval or (None, None)
    low_adjusted, high_adjusted = one.adjusted_interval or (None, None)
    return {
        "condition": pairs.condition,
        "arm": pairs.arm,
        "baseline": suite.baseline,
        "n": len(pairs.values),
        "mean": pairs.mean,
        "std": pairs.deviation,
        "low": low,
        "high": high,
        "p": one.p,
        "p_adjusted": one.p_adjusted,
        "low_adjusted": low_adjusted,
        "high_adjusted": high_adjusted,
        "verdict": one.verdict,
        "size": one.size,
        "seeds_for_a_point": one.seeds_for_a_point,
    }


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation (n − 1); None for fewer than two values."""
    centre = mean(values)
    if centre is None or len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
