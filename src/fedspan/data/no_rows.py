"""The data of a server that has none: what it must know of its sites' rows, from the settings alone.

A base is tried on a row before it is used, so there is one that is made up. Nothing is trained or judged on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedspan.config import DataConfig
from fedspan.data.labels import check_label_names
from fedspan.data.metrics import is_regression
from fedspan.data.rows import Corpus, Rows
from fedspan.support.errors import FedspanError

_SIDE = 64
"""Pixels of a made-up image's side; processors resize it."""


def has_none(config: DataConfig) -> bool:
    """Return whether the settings name no rows at all: `task = "files"` without any file."""
    return config.task == "files" and not (config.train or config.test or config.unseen)


def without_rows(config: DataConfig) -> Corpus:
    """Return a corpus with the labels that the settings name, and no rows but a made-up one.

    Raises
    ------
    FedspanError
        Where the settings leave the kind of the data or the names of its classes open.
    """
    if config.kind is None:
        raise FedspanError(
            "data.kind is not set: a server without data needs it; expected instruction, classification or image"
        )
    regression = is_regression(config.metrics, config.kind)
    if config.kind != "instruction" and not regression and not config.label_names:
        raise FedspanError(
            "data.label_names is empty: a server without data needs the names of the classes, in the order of their ids"
        )
    names = check_label_names(config.label_names) if config.label_names and not regression else None
    num_labels = 0 if config.kind == "instruction" else 1 if regression else len(config.label_names)
    columns = max(1, len(config.text_columns))
    made_up: dict[str, tuple[Any, Any]] = {
        "instruction": (("a", "a"), "a"),
        "classification": (("a",) * columns, 0.0 if regression else 0),
        "image": (np.zeros((_SIDE, _SIDE, 3), dtype=np.uint8), 0),
    }
    given, target = made_up[config.kind]
    rows = Rows(config.kind, [given], [target], [""])
    return Corpus(config.kind, rows, rows, None, None, names, num_labels, (), ids_in_data=True, made_up=True)
