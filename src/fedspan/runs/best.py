"""The best round of a run by its validation data, and the stop of a run that no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from fedspan.data.metrics import METRICS


class BestRound(TypedDict):
    """The round with the best headline metric on the validation data, or without it on the clients' held-out rows; of
    equal ones the first."""

    round_num: int
    validation: dict[str, float | None]
    """Its figures on these rows."""
    rows: int
    """Number of them; 0 where it is not known, under client-level privacy."""
    test: dict[str, float | None] | None
    """Its figures on the test data, as in its record."""


def best_record(history: Sequence[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """Return the record of the best round; None where no round has a figure on validation data."""
    best: Mapping[str, Any] | None = None
    highest = -math.inf
    for record in history:
        value = _value(record, metric)
        if value is not None and (best is None or value > highest):
            best, highest = record, value
    return best


def _value(record: Mapping[str, Any], metric: str) -> float | None:
    """Return a figure of a round, turned so that larger is better; None where it has none."""
    value: float | None = (record.get("validation") or {}).get(metric)
    if value is None or math.isnan(value):
        return None
    return value if METRICS[metric].higher_is_better else -value


def is_spent(history: Sequence[Mapping[str, Any]], metric: str, patience: int | None) -> bool:
    """Return whether the last `patience` evaluations brought nothing better than the one before them.

    It follows from the records alone, so that a resumed run stops where one that never stopped does.
    """
    if patience is None:
        return False
    evaluated = [record for record in history if record.get("validation") is not None]
    best = best_record(evaluated, metric)
    since = len(evaluated) if best is None else len(evaluated) - 1 - evaluated.index(best)
    return since >= patience


def best_round(history: Sequence[Mapping[str, Any]], metric: str, rows: int) -> BestRound | None:
    """Return the summary's entry on the best round."""
    best = best_record(history, metric)
    if best is None:
        return None
    by_clients = best.get("client_evaluation") or {}
    return {
        "round_num": best["round_num"],
        "validation": dict(best["validation"]),
        "rows": rows or by_clients.get("rows") or 0,
        "test": None if best["eval"] is None else dict(best["eval"]),
    }
