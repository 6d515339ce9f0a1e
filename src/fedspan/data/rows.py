"""Plain containers of examples, before any tokenizer or image processor has seen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedspan.support.errors import FedspanError

Kind = Literal["instruction", "classification", "image"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Raw examples of one split: columns of equal length.

    Attributes
    ----------
    kind
        What an example is.
    inputs
        Instruction: ``(instruction, input)``; classification: ``(text,)`` or ``(text, text)``;
        image: uint8 arrays (H, W, 3) or (H, W), or one stacked array of them.
    targets
        Instruction: the answer; otherwise the label's id, or a float for regression.
    fields
        What each example belongs to (its task, category or source); ``""`` where nothing says.
    """

    kind: Kind
    inputs: Sequence[Any] | np.ndarray
    targets: Sequence[Any]
    fields: Sequence[str]

    def __post_init__(self) -> None:
        sizes = len(self.inputs), len(self.targets), len(self.fields)
        if len(set(sizes)) != 1:
            raise FedspanError(f"inputs, targets and fields have lengths {sizes}: expected equal lengths")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        inputs = self.inputs
        return Rows(
            self.kind,
            inputs[np.asarray(indices, dtype=np.int64)]
            if isinstance(inputs, np.ndarray)
            else [inputs[i] for i in indices],
            [self.targets[i] for i in indices],
            [self.fields[i] for i in indices],
        )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows of `parts` (at least one, of one kind), one after the other."""
    arrays = [part.inputs for part in parts if isinstance(part.inputs, np.ndarray)]
    stackable = len(arrays) == len(parts) and len({array.shape[1:] for array in arrays}) == 1
    return Rows(
        parts[0].kind,
        np.concatenate(arrays) if stackable else [row for part in parts for row in part.inputs],
        [target for part in parts for target in part.targets],
        [field for part in parts for field in part.fields],
    )


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Everything a run learns from and is measured on.

    Attributes
    ----------
    train, test
        Rows to be spread over clients, and rows held out for everyone.
    unseen
        Rows evaluated but never trained on (tasks or clients kept apart), if any.
    client_files
        One array of indices into `train` for each training file; none unless the data came from files.
    label_names
        The names behind the label ids, when the data has names.
    num_labels
        Number of classes; 1 for regression; 0 for instruction data.
    metrics
        Names in :data:`fedspan.data.metrics.METRICS`; the first is the one a summary shows.
    """

    kind: Kind
    train: Rows
    test: Rows
    unseen: Rows | None
    client_files: tuple[np.ndarray, ...] | None
    label_names: tuple[str, ...] | None
    num_labels: int
    metrics: tuple[str, ...]
