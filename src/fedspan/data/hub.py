"""Datasets by name from the Hugging Face hub; the only file that imports `datasets`, and only when asked."""

from __future__ import annotations

from typing import Any

from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError


def read_splits(
    name: str, subset: str | None, train: str, test: str | None, label_column: str
) -> tuple[Table, Table | None]:
    """The training split of a hub dataset, and its test split.

    Parameters
    ----------
    name, subset
        Repository (or local folder) and configuration.
    train
        Name of the training split.
    test
        Name of the test split; None takes ``test`` if there is one, otherwise ``validation``, otherwise none.
    label_column
        Column whose class names, where the dataset knows them, are kept with the table.

    Raises
    ------
    ValueError
        One line: `datasets` is missing, or what was not reachable and how to give local files instead.
    """
    try:
        import datasets
    except ImportError:
        raise FedspanError(f"loading {name} needs the datasets library: pip install 'fedspan[hub]'") from None
    label = f"{name} ({subset})" if subset else name
    try:
        splits: Any = datasets.load_dataset(name, subset)
    # The library, the hub client and the network raise a dozen unrelated types.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FedspanError(
            f"dataset {label} could not be read: {reason}; without a network give local files: data.train and data.test"
        ) from None
    if train not in splits:
        raise FedspanError(f"dataset {label} has no split {train!r} (data.train): expected one of {', '.join(splits)}")
    if test is None:
        test = next((split for split in ("test", "validation") if split in splits), None)
    elif test not in splits:
        raise FedspanError(f"dataset {label} has no split {test!r} (data.test): expected one of {', '.join(splits)}")
    tables = [_table(splits[split], f"{label}, {split}", label_column) for split in (train, test) if split]
    return tables[0], tables[1] if test else None


def _table(split: Any, source: str, label_column: str) -> Table:
    names = getattr(split.features.get(label_column), "names", None)  # of a ClassLabel
    columns = {column: list(split[column]) for column in split.column_names}
    return Table(source, columns, label_names=None if names is None else tuple(names))
