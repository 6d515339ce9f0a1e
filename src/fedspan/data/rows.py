"""Plain containers of examples, before any tokenizer or image processor has seen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedspan.data.strings import joined, taken

Kind = Literal["instruction", "classification", "image"]
"""The kinds of data: a prompt and its answer, one or two texts and a label, or an image and a label."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Raw examples of one split, as columns of equal length.

    Attributes
    ----------
    kind
        The kind of every example.
    inputs
        Instruction: ``(instruction, input)``; classification: ``(text,)`` or ``(text, text)``;
        image: uint8 arrays (H, W, 3) or (H, W), or one stacked array of them. Texts of files are kept compactly, as
        :class:`fedspan.data.strings.Tuples`.
    targets
        Instruction: the answer; otherwise the label's id, or a float for regression.
    fields
        The task, category or source of each example; ``""`` where the data does not name one.
    """

    kind: Kind
    inputs: Sequence[Any] | np.ndarray
    targets: Sequence[Any]
    fields: Sequence[str]

    def __post_init__(self) -> None:
        sizes = len(self.inputs), len(self.targets), len(self.fields)
        if len(set(sizes)) != 1:
            raise ValueError(f"inputs, targets and fields have lengths {sizes}: expected equal lengths")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Return the rows at `indices`, in that order."""
        return Rows(
            self.kind,
            taken(self.inputs, indices),
            taken(self.targets, indices),
            taken(self.fields, indices),
        )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return all rows of `parts` (at least one, all of one kind), one part after the other."""
    return Rows(
        parts[0].kind,
        _joined_inputs(parts),
        joined([part.targets for part in parts]),
        joined([part.fields for part in parts]),
    )


def _joined_inputs(parts: Sequence[Rows]) -> Sequence[Any] | np.ndarray:
    """Return one stacked array where every part has images of one size, otherwise a list."""
    inputs: list[Any] = [part.inputs for part in parts]
    arrays = [part for part in inputs if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts) and len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    return joined(inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """The data of a whole run: training, test and unseen rows, labels and metrics.

    Attributes
    ----------
    kind
        The kind of all rows.
    train, test
        Rows to be divided among the clients, and rows held out for the evaluation of every model.
    unseen
        Rows that are evaluated but never trained on (tasks or clients kept apart), if any.
    client_files
        One array of indices into `train` for each training file; None unless the data came from files.
    label_names
        The names behind the label ids, where the data has names.
    num_labels
        Number of classes; 1 for regression; 0 for instruction data.
    metrics
        Names in :data:`fedspan.data.metrics.METRICS`; the first is the one that a summary shows.
    client_names
        A name for each training file, as :func:`fedspan.data.files.names_of` gives it; None unless the data came from
        several files.
    client_tests
        One array of indices into `test` for each training file: the rows that were held out of it, or are those of the
        test file of the same name. None unless the data came from files.
    ids_in_data
        The label ids are the data's own; otherwise names were given ids in their sorted order.
    validation
        Rows kept back from the training data to compare rounds by, if any.
    made_up
        There is no data here: the one row is made up, to try a base on.
    """

    kind: Kind
    train: Rows
    test: Rows
    unseen: Rows | None
    client_files: tuple[np.ndarray, ...] | None
    label_names: tuple[str, ...] | None
    num_labels: int
    metrics: tuple[str, ...]
    client_names: tuple[str, ...] | None = None
    client_tests: tuple[np.ndarray, ...] | None = None
    ids_in_data: bool = False
    validation: Rows | None = None
    made_up: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the kind, the rows of each split, the number of classes and their names, as plain values."""
        rows = {} if self.made_up else {"train": len(self.train), "test": len(self.test)}
        if self.unseen is not None:
            rows["unseen"] = len(self.unseen)
        if self.validation is not None:
            rows["validation"] = len(self.validation)
        classes = None if self.kind == "instruction" or self.num_labels == 1 else self.num_labels
        names = None if classes is None or self.label_names is None else list(self.label_names)
        return {"kind": self.kind, "rows": rows, "num_classes": classes, "label_names": names}
