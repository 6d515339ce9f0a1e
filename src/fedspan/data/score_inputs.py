"""The inputs of metrics: their lengths, and numbers that no score is defined for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def check_pairs(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Refuse predictions that are not as many as the references, or none at all.

    Raises
    ------
    ValueError
        With both numbers.
    """
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: expected as many, and at least one"
        )


def all_finite(values: Sequence[Any]) -> bool:
    """Return whether no number among these values, or in a list among them, is NaN or infinite."""
    for value in values:
        numbers = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            return False
    return True
