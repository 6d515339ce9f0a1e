"""Rows for a model that is already trained: its labels are known, and rows need not have any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedspan.config import DataConfig
from fedspan.data.columns import infer_kind, to_rows
from fedspan.data.conversations import column_of
from fedspan.data.files import read_files
from fedspan.data.json_rows import ABSENT
from fedspan.data.labels import Labels
from fedspan.data.rows import Corpus, Kind, Rows, concatenate
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError

_LABEL_NAMES = ("labels", "y")


@dataclass(frozen=True, slots=True)
class KnownLabels:
    """The labels of a trained model."""

    num_labels: int
    """Number of classes; 1 for regression; 0 for instruction data."""
    names: tuple[str, ...] | None
    """In the order of their ids; None where they have no names."""

    def meaning(self, raw: Sequence[Any]) -> Labels:
        """Return the meaning of a table's labels: the model's names, or its ids where none of them is such a name."""
        if self.num_labels == 1:
            return Labels("number", 1)
        if self.names is None or not (set(map(str, raw)) & set(self.names)):
            numbers = all(str(value).strip().lstrip("+").isdigit() for value in raw)
            if self.names is None or numbers:
                return Labels("id", self.num_labels, self.names)
        return Labels("name", self.num_labels, self.names)


@dataclass(frozen=True, slots=True, eq=False)
class NewRows:
    """Rows to be predicted."""

    rows: Rows
    labelled: np.ndarray
    """Of each row whether it has a label (or an answer); the target of another is a placeholder. (N,) bool"""
    tables: tuple[Table, ...]
    """The tables that they are from, in their order, as they were read."""

    def corpus(self, labels: KnownLabels, metrics: tuple[str, ...], ids_in_data: bool = True) -> Corpus:
        """Return them as test data; of the training data, which nothing is trained on, there is one row.

        Parameters
        ----------
        ids_in_data
            The training data had label ids, so that a head without names was kept.
        """
        first = self.rows.take([0])
        names = labels.names if labels.num_labels > 1 else None
        return Corpus(
            self.rows.kind, first, self.rows, None, None, names, labels.num_labels, metrics, ids_in_data=ids_in_data
        )


def read_new_rows(
    files: Sequence[str], config: DataConfig, kind: Kind | None, labels: KnownLabels, *, unlabelled: bool
) -> NewRows:
    """Read files of rows for a trained model.

    Parameters
    ----------
    kind
        The model's; None: as the first table's columns say.
    unlabelled
        Rows, or whole files, may lack the label (or the answer); otherwise each needs one.

    Raises
    ------
    FedspanError
        As in training; for a label that the model does not know.
    """
    parts: list[Rows] = []
    known: list[np.ndarray] = []
    tables: list[Table] = []
    for table in read_files(files, "test", config, loose=unlabelled):
        kind = kind or infer_kind(table, config)
        filled, labelled = (
            _filled(table, config, kind, labels) if unlabelled else (table, np.ones(table.num_rows, bool))
        )
        rows = to_rows(filled, kind, config)
        if kind != "instruction":
            own = [value for value, has in zip(rows.targets, labelled, strict=True) if has]
            meaning = labels.meaning(own)
            # A placeholder is an id, whatever the labels are.
            targets: list[Any] = [0.0 if meaning.form == "number" else 0] * len(rows)
            for place, target in zip(np.flatnonzero(labelled).tolist(), meaning.ids(own, table.source), strict=True):
                targets[place] = target
            rows = replace(rows, targets=targets)
        parts.append(rows)
        known.append(labelled)
        tables.append(table)
    if not parts:
        raise FedspanError("--data: expected at least one file")
    return NewRows(concatenate(parts), np.concatenate(known), tuple(tables))


def _filled(table: Table, config: DataConfig, kind: Kind, labels: KnownLabels) -> tuple[Table, np.ndarray]:
    """Return the table with placeholders for labels or answers that are not there, and which rows have their own."""
    placeholder: int | str
    if kind == "instruction":
        if column_of(table, config) is not None:
            return table, np.ones(table.num_rows, dtype=bool)
        name, placeholder = config.output_column, _some_text(table, config)
    else:
        usual = (config.label_column, *(_LABEL_NAMES if kind == "image" else ()))
        name = next((one for one in usual if one in table.columns), config.label_column)
        placeholder = 0 if labels.names is None else labels.names[0]
    values: Iterable[Any] = table.columns.get(name, ())
    if isinstance(values, np.ndarray):
        return table, np.ones(table.num_rows, dtype=bool)
    given = list(values) or [None] * table.num_rows
    missing = [value is None or value is ABSENT or value == "" or value != value for value in given]
    columns: Mapping[str, Any] = {
        **table.columns,
        name: [placeholder if gone else value for value, gone in zip(given, missing, strict=True)],
    }
    return replace(table, columns=columns), ~np.asarray(missing)


def _some_text(table: Table, config: DataConfig) -> str:
    """Return a character that the prompts have, to stand for an answer: as short as can be, since prompts give way."""
    for name in (config.instruction_column, config.input_column):
        for value in table.columns.get(name, ()):
            if isinstance(value, str) and value.strip():
                return value.strip()[0]
    return "0"
