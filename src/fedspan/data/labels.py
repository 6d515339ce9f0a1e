"""The meaning of the labels in a table: class ids, class names, or the numbers of a regression."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedspan.data.metrics import METRICS
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_MISSING = frozenset(
    ("", "#n/a", "#na", "<na>", "n/a", "na", "nan", "-nan", "nat", "none", "null", "1.#ind", "1.#qnan")
)
"""Texts that pandas and R read and write in place of a missing value, and Excel's #N/A, in lower case."""
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


@dataclass(frozen=True, slots=True)
class Labels:
    """The mapping from raw labels to targets: they are ids, names (in the order of their ids), or plain numbers."""

    form: Literal["id", "name", "number"]
    num_labels: int
    names: tuple[str, ...] | None = None

    def ids(self, raw: Iterable[Any], source: str) -> list[int] | list[float]:
        """Return the targets of `raw` labels.

        Raises
        ------
        FedspanError
            Naming the row and its label, when the training data has no such label.
        """
        known: dict[tuple[type, Any], Any] = {}  # equal labels are one object, of which there may be millions
        targets = []
        for row, value in enumerate(raw, 1):
            _check_type(value, row, source)
            key = type(value), value
            if key not in known:
                known[key] = self._target(value, f"row {row} of {source}")
            targets.append(known[key])
        return targets

    @property
    def places(self) -> dict[Any, int]:
        """The id of each name."""
        return {name: place for place, name in enumerate(self.names or ())}

    def _target(self, value: Any, where: str) -> Any:
        if self.form == "name":
            assert self.names is not None
            place = self.places.get(value)
            if place is None:
                raise FedspanError(f"{where} has the label {value!r}{nearest(str(value), self.names)}")
            return place
        number = _number(value)
        if self.form == "number":
            if number is None:
                comma = isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip())
                hint = " with a decimal point" if comma else ""
                raise FedspanError(f"{where} has the label {value!r}: expected a finite number{hint} (regression)")
            return number
        if number is None or number != int(number) or not 0 <= number < self.num_labels:
            raise FedspanError(f"{where} has the label {value!r}: expected 0..{self.num_labels - 1}")
        return int(number)


def learn_labels(raw: Sequence[Any], source: str, regression: bool, names: tuple[str, ...] | None) -> Labels:
    """Return the meaning of the training data's labels.

    Whole numbers (also as text, as in CSV) are ids and must be exactly 0..n-1; other texts, 1 and 2 among them, are
    names, with their place in sorted order as id. A regression takes any numbers. Given `names`, whole numbers index
    them, and some of the names may have no example. Fractions, texts that stand for a missing value, and names that
    differ only in spaces, in upper and lower case or as spellings of one number are no classes.

    Parameters
    ----------
    regression
        The metric that the settings name compares numbers (see :func:`fedspan.data.metrics.is_regression`).

    Raises
    ------
    FedspanError
        When a label is missing or the labels fit none of these.
    """
    _check_present(raw, source)
    if regression:
        return Labels("number", 1)
    values = set(raw)
    if len(values) == 1:
        raise FedspanError(f"{source} has the single label {raw[0]!r}: expected two or more")
    ids = _whole_numbers(values)
    if ids is not None:
        size = len(ids) if names is None else len(names)
        if ids <= set(range(size)):
            return Labels("id", size, names)
    if all(isinstance(value, str) for value in values) and not any(map(_is_fraction, values)):
        _check_names(values, source)
        return _named(values)
    raise FedspanError(_misfit(values, ids, source))


def check_label_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes that the settings give, `data.label_names`, in the order of their ids.

    Raises
    ------
    FedspanError
        For fewer than two, one that is given twice, or two that a reader would take for one.
    """
    if len(set(names)) != len(names) or len(names) < 2:
        raise FedspanError(f"data.label_names = {list(names)}: expected two or more different names")
    _check_names(names, "data.label_names")
    return tuple(names)


def given_labels(raw: Sequence[Any], source: str, names: Sequence[str]) -> Labels:
    """Return labels whose classes the settings name, whichever of them the rows have.

    The rows have these names, or whole numbers that are their places.

    Raises
    ------
    FedspanError
        Naming a label that is neither.
    """
    known = check_label_names(names)
    _check_present(raw, source)
    values = set(raw)
    if all(isinstance(value, str) and value in known for value in values):
        return Labels("name", len(known), known)
    ids = _whole_numbers(values)
    if ids is not None and ids <= set(range(len(known))):
        return Labels("id", len(known), known)
    wrong = sorted((value for value in values if value not in known), key=str)
    raise FedspanError(f"{source} has the label {wrong[0]!r}: expected those of data.label_names, {_some(known)}")


def _check_type(value: Any, row: int, source: str) -> None:
    if not isinstance(value, str | int | float | None):
        form = type(value).__name__
        raise FedspanError(f"row {row} of {source} has a {form} as label: expected text or number")


def _check_present(raw: Sequence[Any], source: str) -> None:
    good: set[tuple[type, Any]] = set()
    for row, value in enumerate(raw, 1):
        _check_type(value, row, source)
        if (type(value), value) in good:
            continue
        if value is None or (isinstance(value, str) and not value.strip()):
            raise FedspanError(f"row {row} of {source} has no label: expected one")
        if isinstance(value, float) and math.isnan(value):
            raise FedspanError(f"row {row} of {source} has among all labels nan, a missing value: expected a class")
        if isinstance(value, str) and value.strip().lower() in _MISSING:
            raise FedspanError(
                f"row {row} of {source} has the label {value!r}, which stands for a missing value: expected a class; "
                "leave such rows out, or name the class in another way"
            )
        good.add((type(value), value))


def _is_fraction(value: Any) -> bool:
    """Return whether a label is a number that is not whole, which no class is called."""
    if isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()):
        return True
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return False
    return not math.isfinite(number) or number != int(number)


def _check_names(names: Iterable[str], source: str) -> None:
    """Refuse names that a reader would take for one.

    Raises
    ------
    FedspanError
        Naming two that differ only in spaces, or in upper and lower case, or are one number (pandas writes the whole
        numbers of a column as 1.0 as soon as one is missing), and one that is no text.
    """
    seen: dict[str | float, str] = {}
    for name in sorted(names):
        if not name.isascii() and any(0xD800 <= ord(character) < 0xE000 for character in name):
            raise FedspanError(f"{source} has the label {name!r} with half a surrogate pair: expected text")
        number = _number(name)
        if number is not None and (other := seen.setdefault(number, name)) != name:
            raise FedspanError(
                f"{source} has the labels {other!r} and {name!r}, which are one number: expected one spelling of a "
                "class"
            )
        other = seen.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if other != name:
            raise FedspanError(
                f"{source} has the labels {other!r} and {name!r}, which differ only in spaces or in upper and lower "
                "case: expected one spelling of a class, or names that differ in more"
            )


def _whole_numbers(values: Iterable[Any]) -> set[int] | None:
    """Return the values as integers, or None where one of them is not a whole number."""
    numbers = [_number(value) for value in values]
    if any(number is None or number != int(number) for number in numbers):
        return None
    return {int(number) for number in numbers if number is not None}


def _misfit(values: Iterable[Any], ids: set[int] | None, source: str) -> str:
    """Return why these labels are neither ids nor names."""
    if ids is not None:
        return f"{source} has the labels {_some(ids)}: expected 0..n-1 with none missing"
    if any(isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()) for value in values):
        return f"{source} has labels with a decimal comma such as {_some(values)}: expected a decimal point in numbers"
    if any(_number(value) is None for value in values):
        return f"{source} has the labels {_some(values)}: expected all names or all whole numbers"
    numeric = " or ".join(name for name, metric in METRICS.items() if metric.needs == "numbers")
    return f"{source} has fractional labels such as {_some(values)}: for regression set data.metrics to {numeric}"


def _named(values: Iterable[str]) -> Labels:
    names = tuple(sorted(values))
    return Labels("name", len(names), names)


def _number(value: Any) -> float | None:
    """Return `value` as a finite number, or None; Python's 1_0 for ten is none in a table."""
    if isinstance(value, str) and "_" in value:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an integer of JSON may be larger than any float
        return None
    return number if math.isfinite(number) else None


def _some(values: Iterable[Any]) -> str:
    shown = sorted(values, key=lambda value: (str(type(value)), value))
    return ", ".join(repr(value) for value in shown[:5]) + (", …" if len(shown) > 5 else "")
