"""Metrics of the user's own, named in the settings as `module:function`.

A function takes all predictions and all references and returns one number::

    def first_word(predictions, references):
        pairs = zip(predictions, references, strict=True)
        return sum(p.split()[:1] == r.split()[:1] for p, r in pairs) / len(references)

Its attributes may say more: ``first_word.needs = "texts"`` (or ``labels``, ``probabilities``, ``numbers``, ``losses``;
without it: ``texts`` for instruction data, otherwise ``labels``) and ``first_word.higher_is_better = False``.

A module is imported only because the user's own settings name it: a run folder or an adapter from elsewhere names none
that is.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from fedspan.support.errors import FedspanError, one_line


def is_own(name: str) -> bool:
    """Return whether this names a function in a module of the user's own."""
    return ":" in name


def load_function(name: str) -> Callable[..., Any]:
    """Import the function that `module:function` names.

    Raises
    ------
    FedspanError
        Where the module cannot be imported or has no such function.
    """
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), function)):
        raise FedspanError(f"data.metrics = {name!r}: expected module:function, such as my_metrics:first_word")
    try:
        found: object = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever the user's module raises
        raise FedspanError(
            f"data.metrics = {name!r}: {module} cannot be imported ({type(error).__name__}: {one_line(error, 200)}); "
            "expected a module on Python's path (PYTHONPATH)"
        ) from error
    if not callable(found):
        raise FedspanError(f"data.metrics = {name!r}: {module} has no function {function!r}")
    return found


def guarded(name: str, function: Callable[..., Any]) -> Callable[[Sequence[Any], Sequence[Any]], float]:
    """Return the function as a score whose failure is one line.

    Raises
    ------
    FedspanError
        When it is called, where the function fails or returns no number.
    """

    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        try:
            value = function(predictions, references)
        except Exception as error:
            raise FedspanError(
                f"data.metrics = {name!r} failed: {type(error).__name__}: {one_line(error, 200)}"
            ) from error
        try:
            return math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise FedspanError(
                f"data.metrics = {name!r} returned {one_line(repr(value), 80)}: expected a number"
            ) from None

    return score
