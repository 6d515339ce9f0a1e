"""From a table's columns to examples: their kind, the columns they are read from, and label ids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedspan.config import DataConfig
from fedspan.data.conversations import column_of, read_conversations
from fedspan.data.images import as_images, find_column
from fedspan.data.metrics import METRICS
from fedspan.data.rows import Kind, Rows
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_TEXT_COLUMNS = (("text",), ("sentence",), ("sentence1", "sentence2"))  # tried in this order
_IMAGE_NAMES = ("images", "x", "img")
_LABEL_NAMES = ("labels", "y")


def infer_kind(table: Table, config: DataConfig) -> Kind:
    """Return the kind of a table's examples: `config.kind`, or the kind that its columns indicate.

    An answer column (``data.output_column``) or a column of conversations makes instruction data; otherwise an image
    column makes images; otherwise a label column makes classification.

    Raises
    ------
    FedspanError
        Naming the columns that there are, when none of these is among them.
    """
    if config.kind is not None:
        return config.kind
    if config.output_column in table.columns or column_of(table, config) is not None:
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
    """Return the examples of a table, with its labels unchanged (see :meth:`Labels.ids`).

    ``instruction_column = ""`` or ``input_column = ""`` means that the data has no such column; a null input
    is an empty one. Without `text_columns`, classification reads the first of `text`, `sentence`, and `sentence1`
    with `sentence2` that the table has. The field is `field_column`, by default `task` where present.

    Raises
    ------
    FedspanError
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


def _instructions(table: Table, config: DataConfig) -> tuple[Sequence[Any], list[str]]:
    name = column_of(table, config)
    if name is not None:
        conversations = read_conversations(table, name)
        return conversations, [conversation.answer.content for conversation in conversations]
    names = {"instruction_column": config.instruction_column, "input_column": config.input_column}
    if not any(names.values()):
        raise FedspanError("data.instruction_column and data.input_column are both empty: expected at least one")
    empty = [""] * table.num_rows
    parts = []
    for key, name in names.items():
        if name and name not in table.columns:
            raise FedspanError(
                f'{table.source} has no column {name!r} (data.{key}; "" if there is none){nearest(name, table.columns)}'
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
            form = "null" if value is None else type(value).__name__
            raise FedspanError(f"row {row} of {table.source}: {name!r} ({key}) is {form}: expected text")
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
    """Return Python values instead of numpy's."""
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


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


def learn_labels(raw: Sequence[Any], source: str, regression: bool, names: tuple[str, ...] | None) -> Labels:
    """Return the meaning of the training data's labels.

    Whole numbers (also as text, as in CSV) are ids and must be exactly 0..n-1; other texts are names, with their
    place in sorted order as id. A regression takes any numbers. Given `names`, whole numbers index them, and some of
    the names may have no example.

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
    if all(isinstance(value, str) for value in values):
        return _named(values)
    raise FedspanError(_misfit(values, ids, source))


def _check_present(raw: Sequence[Any], source: str) -> None:
    for row, value in enumerate(raw, 1):
        if value is None or value == "":
            raise FedspanError(f"row {row} of {source} has no label: expected one")
        if not isinstance(value, str | int | float):
            raise FedspanError(f"row {row} of {source} has a {type(value).__name__} as label: expected text or number")


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
    if any(_number(value) is None for value in values):
        return f"{source} has the labels {_some(values)}: expected all names or all whole numbers"
    numeric = " or ".join(name for name, metric in METRICS.items() if metric.needs == "numbers")
    return f"{source} has fractional labels such as {_some(values)}: for regression set data.metric to {numeric}"


def _named(values: Iterable[str]) -> Labels:
    names = tuple(sorted(values))
    return Labels("name", len(names), names)


def _number(value: Any) -> float | None:
    """Return `value` as a finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an integer of JSON may be larger than any float
        return None
    return number if math.isfinite(number) else None


def _some(values: Iterable[Any]) -> str:
    shown = sorted(values, key=lambda value: (str(type(value)), value))
    return ", ".join(repr(value) for value in shown[:5]) + (", …" if len(shown) > 5 else "")
