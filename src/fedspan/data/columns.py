"""From a table's columns to examples: what kind they are, which columns say what, and label ids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedspan.config import DataConfig
from fedspan.data.images import as_images, find_column
from fedspan.data.rows import Kind, Rows
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_REGRESSION_METRICS = ("pearson", "spearman")
_TEXT_COLUMNS = (("text",), ("sentence",), ("sentence1", "sentence2"))  # tried in this order
_IMAGE_NAMES = ("images", "x", "img")
_LABEL_NAMES = ("labels", "y")


def infer_kind(table: Table, config: DataConfig) -> Kind:
    """What a table holds: `config.kind`, or what its columns tell.

    An answer column (``data.output_column``) makes instruction data; otherwise an image column makes
    images; otherwise a label column makes classification.

    Raises
    ------
    ValueError
        Naming the columns found, when none of these is there.
    """
    if config.kind is not None:
        return config.kind
    if config.output_column in table.columns:
        return "instruction"
    if any(name in table.columns for name in (config.image_column, *_IMAGE_NAMES)):
        return "image"
    if config.label_column in table.columns:
        return "classification"
    raise FedspanError(
        f"{table.source} has the columns {', '.join(table.columns)}: expected {config.output_column!r} "
        f"(data.output_column), {config.image_column!r} (data.image_column) or {config.label_column!r} "
        "(data.label_column)"
    )


def to_rows(table: Table, kind: Kind, config: DataConfig) -> Rows:
    """The examples of a table, with labels as they stand there (see :func:`label_ids`).

    ``instruction_column = ""`` or ``input_column = ""`` says that the data has no such column; a null input
    is an empty one. Without `text_columns`, classification reads `text`, `sentence`, or `sentence1` and
    `sentence2`, whichever is there first. The field is `field_column`, by default `task` where present.

    Raises
    ------
    ValueError
        Naming a missing column and the nearest one, or the row with an unusable value.
    """
    inputs: Sequence[Any] | np.ndarray
    targets: Sequence[Any] | np.ndarray
    if kind == "instruction":
        inputs, targets = _instructions(table, config)
    elif kind == "classification":
        texts = [_texts(table, name, "data.text_columns") for name in _text_names(table, config)]
        inputs = list(zip(*texts, strict=True))
        targets = table.column(config.label_column, "data.label_column")
    else:
        name = find_column(table, config.image_column, _IMAGE_NAMES, "data.image_column")
        inputs = as_images(table.column(name, "data.image_column"), table.source, table.root)
        label = find_column(table, config.label_column, _LABEL_NAMES, "data.label_column")
        targets = table.column(label, "data.label_column")
    return Rows(kind, inputs, _plain(targets), _fields(table, config))


def _instructions(table: Table, config: DataConfig) -> tuple[list[tuple[str, str]], list[str]]:
    names = {"instruction_column": config.instruction_column, "input_column": config.input_column}
    if not any(names.values()):
        raise FedspanError("data.instruction_column and data.input_column are both empty: expected at least one")
    empty = [""] * table.num_rows
    parts = []
    for key, name in names.items():
        if name and name not in table.columns:
            raise FedspanError(
                f'{table.source} has no column {name!r} (data.{key}; "" says that there is none)'
                f"{nearest(name, table.columns)}"
            )
        parts.append(_texts(table, name, f"data.{key}", optional=True) if name else empty)
    return list(zip(*parts, strict=True)), _texts(table, config.output_column, "data.output_column")


def _text_names(table: Table, config: DataConfig) -> Sequence[str]:
    if config.text_columns:
        if len(config.text_columns) > 2:
            raise FedspanError(f"data.text_columns = {list(config.text_columns)}: expected one text or a pair")
        return config.text_columns
    for names in _TEXT_COLUMNS:
        if all(name in table.columns for name in names):
            return names
    raise FedspanError(f"{table.source} has no column 'text' (data.text_columns){nearest('text', table.columns)}")


def _texts(table: Table, name: str, key: str, optional: bool = False) -> list[str]:
    texts = []
    for row, value in enumerate(table.column(name, key), 1):
        if value is None and optional:
            value = ""
        if not isinstance(value, str | int | float | np.str_) or isinstance(value, bool):
            found = "null" if value is None else type(value).__name__
            raise FedspanError(f"row {row} of {table.source}: {name!r} ({key}) is {found}: expected text")
        texts.append(str(value))
    return texts


def _fields(table: Table, config: DataConfig) -> list[str]:
    name = config.field_column
    if name is None:
        if "task" not in table.columns:
            return [""] * table.num_rows
        name = "task"
    return [str(value) for value in _plain(table.column(name, "data.field_column"))]


def _plain(values: Sequence[Any] | np.ndarray) -> list[Any]:
    """Python values instead of numpy's."""
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


@dataclass(frozen=True, slots=True)
class Labels:
    """How raw labels become targets: they are ids, names (in the order of their ids), or plain numbers."""

    form: Literal["id", "name", "number"]
    num_labels: int
    names: tuple[str, ...] | None = None

    def ids(self, raw: Iterable[Any], source: str) -> list[int] | list[float]:
        """Targets of `raw` labels.

        Raises
        ------
        ValueError
            Naming the row and its label, when the training data has no such label.
        """
        return [self._target(value, f"row {row} of {source}") for row, value in enumerate(raw, 1)]

    def _target(self, value: Any, where: str) -> Any:
        if self.form == "name":
            assert self.names is not None
            if value not in self.names:
                raise FedspanError(f"{where} has the label {value!r}{nearest(str(value), self.names)}")
            return self.names.index(value)
        number = _number(value)
        if self.form == "number":
            if number is None:
                raise FedspanError(f"{where} has the label {value!r}: expected a finite number (regression)")
            return number
        if number is None or number != int(number) or not 0 <= number < self.num_labels:
            raise FedspanError(f"{where} has the label {value!r}: expected 0..{self.num_labels - 1}")
        return int(number)


def learn_labels(raw: Sequence[Any], source: str, metric: str | None, names: tuple[str, ...] | None) -> Labels:
    """What the labels of the training data stand for.

    Whole numbers (also as text, as in CSV) are ids and must be exactly 0..n-1; other texts are names and get
    their place in sorted order as id. Fractions need ``data.metric`` to be pearson or spearman, which
    makes any numbers a regression. Given `names`, whole numbers index them.

    Raises
    ------
    ValueError
        When a label is missing or the labels fit none of these.
    """
    for row, value in enumerate(raw, 1):
        if value is None or value == "":
            raise FedspanError(f"row {row} of {source} has no label: expected one")
        if not isinstance(value, str | int | float):
            raise FedspanError(f"row {row} of {source} has a {type(value).__name__} as label: expected text or number")
    if metric in _REGRESSION_METRICS:
        return Labels("number", 1)
    values = set(raw)
    if len(values) == 1:
        raise FedspanError(f"{source} has the single label {raw[0]!r}: expected two or more")
    numbers = {_number(value) for value in values}
    whole = {int(number) for number in numbers if number is not None and number == int(number)}
    if len(whole) == len(numbers):
        size = len(names) if names is not None else len(whole)
        if whole != set(range(size)) and (names is None or not whole <= set(range(size))):
            if all(isinstance(value, str) for value in values):
                return _named(values)
            raise FedspanError(f"{source} has the labels {_some(whole)}: expected 0..n-1 with none missing")
        return Labels("id", size, names)
    if all(isinstance(value, str) for value in values):
        return _named(values)
    if None in numbers:
        raise FedspanError(f"{source} has the labels {_some(values)}: expected all names or all whole numbers")
    raise FedspanError(
        f"{source} has fractional labels such as {_some(values)}: for regression set data.metric to "
        f"{' or '.join(_REGRESSION_METRICS)}"
    )


def _named(values: Iterable[str]) -> Labels:
    names = tuple(sorted(values))
    return Labels("name", len(names), names)


def _number(value: Any) -> float | None:
    """`value` as a finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _some(values: Iterable[Any]) -> str:
    shown = sorted(values, key=lambda value: (str(type(value)), value))
    return ", ".join(repr(value) for value in shown[:5]) + (", …" if len(shown) > 5 else "")
