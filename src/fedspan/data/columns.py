"""From a table's columns to examples: their kind, and the columns they are read from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedspan.config import DataConfig
from fedspan.data.conversations import column_of, read_conversations
from fedspan.data.images import as_images, find_column, is_image_file
from fedspan.data.rows import Kind, Rows
from fedspan.data.strings import Strings, Tuples
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_TEXT_COLUMNS = (("text",), ("sentence",), ("sentence1", "sentence2"))  # tried in this order
_IMAGE_NAMES = ("images", "x", "img")
_LABEL_NAMES = ("labels", "y")


def infer_kind(table: Table, config: DataConfig) -> Kind:
    """Return the kind of a table's examples: `config.kind`, or the kind that its columns indicate.

    An answer column (``data.output_column``) or a column of conversations makes instruction data; otherwise an image
    column makes images; otherwise a label column makes classification. A column of text is one of images only under the
    name that ``data.image_column`` gives, and where its first value is the name of an image file.

    Raises
    ------
    FedspanError
        Naming the columns that there are, when none of these is among them.
    """
    if config.kind is not None:
        return config.kind
    if config.output_column in table.columns or column_of(table, config) is not None:
        return "instruction"
    if any(_holds_images(table, name, config.image_column) for name in (config.image_column, *_IMAGE_NAMES)):
        return "image"
    if config.label_column in table.columns:
        return "classification"
    raise FedspanError(
        f"{table.source} has the columns {', '.join(table.columns)}: expected {config.output_column!r} "
        f"(data.output_column), 'messages' (data.messages_column), {config.image_column!r} (data.image_column) or "
        f"{config.label_column!r} (data.label_column)"
    )


def _holds_images(table: Table, name: str, image_column: str) -> bool:
    values = table.columns.get(name)
    if values is None or isinstance(values, np.ndarray):
        return values is not None
    first = next((value for value in values if value is not None), None)
    if isinstance(first, str):
        return name == image_column and is_image_file(first)
    return not isinstance(first, int | float | None)


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
    if kind == "instruction":
        inputs, answers = _instructions(table, config)
        return Rows(kind, inputs, answers, _fields(table, config))
    if kind == "classification":
        texts = [_texts(table, name, "data.text_columns") for name in _text_names(table, config)]
        inputs = Tuples(texts)
        targets = _labels(table.column(config.label_column, "data.label_column"), table.source)
    else:
        name = find_column(table, config.image_column, _IMAGE_NAMES, "data.image_column")
        images = table.column(name, "data.image_column")
        inputs = as_images(images, table.source, table.root, config.image_range)
        label = find_column(table, config.label_column, _LABEL_NAMES, "data.label_column")
        targets = _labels(table.column(label, "data.label_column"), table.source)
    return Rows(kind, inputs, targets, _fields(table, config))


def _instructions(table: Table, config: DataConfig) -> tuple[Sequence[Any], Sequence[str]]:
    name = column_of(table, config)
    if name is not None:
        conversations = read_conversations(table, name)
        return conversations, [conversation.answer.content for conversation in conversations]
    names = {"instruction_column": config.instruction_column, "input_column": config.input_column}
    if not any(names.values()):
        raise FedspanError("data.instruction_column and data.input_column are both empty: expected at least one")
    empty = Strings(np.zeros(0, dtype=np.uint8), np.zeros(table.num_rows, dtype=np.int64))
    parts: list[Sequence[str]] = []
    for key, name in names.items():
        if name and name not in table.columns:
            raise FedspanError(
                f'{table.source} has no column {name!r} (data.{key}; "" if there is none){nearest(name, table.columns)}'
            )
        parts.append(_texts(table, name, f"data.{key}", optional=True) if name else empty)
    return Tuples(parts), _texts(table, config.output_column, "data.output_column")


def _text_names(table: Table, config: DataConfig) -> Sequence[str]:
    if config.text_columns:
        if len(config.text_columns) > 2:
            raise FedspanError(f"data.text_columns = {list(config.text_columns)}: expected one text or a pair")
        return config.text_columns
    for names in _TEXT_COLUMNS:
        if all(name in table.columns for name in names):
            return names
    raise FedspanError(f"{table.source} has no column 'text' (data.text_columns){nearest('text', table.columns)}")


def _texts(table: Table, name: str, key: str, optional: bool = False) -> Strings:
    values = table.column(name, key)
    texts = values if isinstance(values, Strings) else Strings.of(_each_text(values, name, key, table, optional))
    row = texts.surrogate()
    if row is not None:
        raise FedspanError(
            f"row {row + 1} of {table.source}: {name!r} ({key}) holds half a surrogate pair, which is no character: "
            "expected text"
        )
    if not optional and table.num_rows and not any(text.strip() for text in texts):
        raise FedspanError(f"{table.source}: {name!r} ({key}) is empty in every row: expected text")
    return texts


def _each_text(values: Iterable[Any], name: str, key: str, table: Table, optional: bool) -> Iterable[str]:
    for row, value in enumerate(values, 1):
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        if missing and optional:
            value = ""
        elif missing or not isinstance(value, str | int | float | np.str_) or isinstance(value, bool):
            form = "null" if value is None else "NaN" if missing else type(value).__name__
            raise FedspanError(f"row {row} of {table.source}: {name!r} ({key}) is {form}: expected text")
        yield str(value)


def _fields(table: Table, config: DataConfig) -> list[str]:
    name = config.field_column
    if name is None:
        if "task" not in table.columns:
            return [""] * table.num_rows
        name = "task"
    return _shared(str(value) for value in _plain(table.column(name, "data.field_column")))


def _labels(values: Sequence[Any] | np.ndarray, source: str) -> list[Any]:
    """Return a column of labels as Python values, of which equal ones are one object.

    Raises
    ------
    FedspanError
        For an array of another shape than (N,) or (N, 1), as a one-hot code is.
    """
    if isinstance(values, np.ndarray):
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            one_hot = values.ndim == 2 and np.isin(values, (0, 1)).all() and (values.sum(axis=1) == 1).all()
            hint = "; one-hot labels become class ids by numpy.argmax(labels, axis=1)" if one_hot else ""
            raise FedspanError(
                f"{source} holds labels of shape {values.shape}: expected one for each row, (N,) or (N, 1){hint}"
            )
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8", "backslashreplace")
    return _shared(_plain(values))


def _shared(values: Iterable[Any]) -> list[Any]:
    """Return a list in which equal texts are one object, since a column has few different ones."""
    known: dict[str, str] = {}
    return [known.setdefault(value, value) if isinstance(value, str) else value for value in values]


def _plain(values: Sequence[Any] | np.ndarray) -> Iterable[Any]:
    """Return Python values instead of numpy's."""
    return values.tolist() if isinstance(values, np.ndarray) else values
