"""The label names beside adapters of classifiers: one list for all, since heads are averaged row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedspan.adapters.peft_folder import LABELS_NAME
from fedspan.data.label_names import label_entries, made_up
from fedspan.support import standard_json
from fedspan.support.errors import FedspanError, one_line

Entries = dict[str, Any]
"""Entries of a configuration of transformers: num_labels, id2label, label2id, problem_type."""


def common_labels(folders: Sequence[Path]) -> Entries | None:
    """Return the labels of all adapters; None where none of them says any.

    A folder without names (an adapter from elsewhere, or LABEL_0 and so on) agrees with any names of as many labels.

    Raises
    ------
    FedspanError
        For other names, another order or another number of labels, and for a file that holds no labels.
    """
    held = [(folder, names) for folder in folders if (names := _names(folder)) is not None]
    if not held:
        return None
    chosen, names = next(((f, n) for f, n in held if not made_up(n)), held[0])
    for folder, own in held:
        if len(own) != len(names) or (own != names and not made_up(own)):
            raise FedspanError(
                f"{folder}: its labels are {_listed(own)}: expected {_listed(names)}, as in {chosen}, because "
                f"heads are averaged row by row"
            )
    return label_entries(len(names), names)


def as_file(entries: Entries) -> bytes:
    """Return the entries as the text of a labels file."""
    return (standard_json.dumps(entries, indent=2) + "\n").encode()


def set_labels(config: Any, entries: Entries) -> None:
    """Give a configuration of transformers these labels.

    Raises
    ------
    FedspanError
        Where the model has another number of them.
    """
    if config.num_labels != entries["num_labels"]:
        raise FedspanError(
            f"the adapters name {entries['num_labels']} labels, and the model has {config.num_labels}: expected as many"
        )
    config.id2label = {int(i): name for i, name in entries["id2label"].items()}
    config.label2id = dict(entries["label2id"])
    config.problem_type = entries["problem_type"]


def _names(folder: Path) -> list[str] | None:
    """Return the names in the order of their ids; None without a file."""
    file = folder / LABELS_NAME
    if not file.is_file():
        return None
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        numbered = entries["id2label"]
        names = [numbered[str(i)] for i in range(len(numbered))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FedspanError(
            f"{file} holds no labels ({one_line(error, 100)}): expected id2label with the ids 0, 1, …"
        ) from None
    if not names or not all(isinstance(name, str) for name in names):
        raise FedspanError(f"{file} holds no labels ({one_line(names, 100)}): expected id2label with names")
    return names


def _listed(names: Sequence[str]) -> str:
    return one_line(", ".join(names), 100)
