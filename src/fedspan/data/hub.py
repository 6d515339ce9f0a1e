"""Datasets by name from the Hugging Face hub; the only file that imports `datasets`, and only when asked."""

from __future__ import annotations

from typing import Any

from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError, one_line


def read_splits(
    name: str, subset: str | None, train: str, test: str | None, label_column: str
) -> tuple[Table, Table | None]:
    """Read the training split of a hub dataset, and its test split.

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
    FedspanError
        One line: `datasets` is missing, or what was not reachable and how to give local files instead.
    """
    label = f"{name} ({subset})" if subset else name
    splits = _loaded(name, subset, label)
    if test is None:
        test = next((split for split in ("test", "validation") if split in splits), None)
    for key, split in (("train", train), ("test", test)):
        if split is not None and split not in splits:
            names = ", ".join(splits)
            raise FedspanError(f"dataset {label} has no split {split!r} (data.{key}): expected one of {names}")

    def table(split: str) -> Table:
        return _table(splits[split], f"{label}, {split}", label_column)

    return table(train), None if test is None else table(test)


def _loaded(name: str, subset: str | None, label: str) -> Any:
    """Return the splits of a dataset by their names."""
    try:
        import datasets
    except ImportError:
        raise FedspanError(f"loading {name} needs the datasets library: pip install 'fedspan[hub]'") from None
    try:
        return datasets.load_dataset(name, subset)
    # The library, the hub client and the network raise a dozen unrelated types.
    except Exception as error:
        reason = one_line(error)[:200]
        raise FedspanError(
            f"dataset {label} could not be read: {reason}; without a network give local files: data.train and data.test"
        ) from None


def _table(split: Any, source: str, label_column: str) -> Table:
    names = getattr(split.features.get(label_column), "names", None)  # of a ClassLabel
    columns = {column: list(split[column]) for column in split.column_names}
    return Table(source, columns, label_names=None if names is None else tuple(names))
