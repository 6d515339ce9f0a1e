"""The division of rows into training, test and unseen data: values kept apart, a share held out, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedspan.data.rows import Corpus, Rows, concatenate
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

# The purpose of a draw, part of its generator's seed: no two draws share a stream.
_HOLDOUT, _MAX_TRAIN, _MAX_TEST, _MAX_UNSEEN, _VALIDATION, _FROM_TRAINING = range(6)


@dataclass(frozen=True, slots=True, eq=False)
class Splits:
    """The rows of a corpus, as far as they are divided.

    Attributes
    ----------
    train, test, unseen
        The rows of each split; None for test or unseen data that there is none of (yet).
    files
        The number of the training file that each training row is from.
    test_files
        The same of each test row; -1 for one that is from no training file nor from one that is named after it.
    """

    train: Rows
    test: Rows | None
    unseen: Rows | None
    files: np.ndarray
    test_files: np.ndarray


def undivided(
    train: Rows,
    test: Rows | None,
    unseen: Rows | None,
    files: np.ndarray | None = None,
    test_files: np.ndarray | None = None,
) -> Splits:
    """Return the rows as the source divides them; without `files`, all training rows are from one."""
    of_train = np.zeros(len(train), dtype=np.int64) if files is None else files
    of_test = np.full(0 if test is None else len(test), -1) if test_files is None else test_files
    return Splits(train, test, unseen, of_train, of_test)


def keep_apart(splits: Splits, values: Sequence[str]) -> Splits:
    """Move the rows whose field is one of `values` out of the training and test data, into the unseen data.

    Of a value that the test data has, its test rows are moved and its training rows dropped: rows of the test data
    are preferred, because other results on that data were measured on them.

    Raises
    ------
    FedspanError
        When no row has one of the values, or when no training or test rows would be left.
    """
    if not values:
        return splits
    _check_values(splits, values)
    kept, apart = _divide(splits.train, values)
    train, test, test_files = splits.train.take(kept), splits.test, splits.test_files
    unseen = [] if splits.unseen is None else [splits.unseen]
    tested: set[str] = set()
    if splits.test is not None:
        test_kept, test_apart = _divide(splits.test, values)
        test, moved = splits.test.take(test_kept), splits.test.take(test_apart)
        test_files = test_files[test_kept]
        tested = set(moved.fields)
        unseen.append(moved)
    unseen.append(splits.train.take([i for i in apart.tolist() if splits.train.fields[i] not in tested]))
    _check_rest(train, test, values)
    unseen_rows = concatenate([part for part in unseen if len(part)])
    return Splits(train, test, unseen_rows, splits.files[kept], test_files)


def _check_rest(train: Rows, test: Rows | None, values: Sequence[str]) -> None:
    for name, rows in (("training", train), ("test", test)):
        if rows is not None and not len(rows):
            raise FedspanError(f"data.unseen_values = {list(values)} leaves no {name} rows: expected some")


def _check_values(splits: Splits, values: Sequence[str]) -> None:
    parts = [part for part in (splits.train, splits.test, splits.unseen) if part is not None]
    known = {field for part in parts for field in part.fields} - {""}
    if not known:
        raise FedspanError(
            f"data.unseen_values = {list(values)}: the data names no field of its rows; expected data.field_column"
        )
    for value in values:
        if value not in known:
            raise FedspanError(f"data.unseen_values: no row has the value {value!r}{nearest(value, known)}")


def _divide(rows: Rows, values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rows with other fields, and of those whose field is one of `values`."""
    named = np.isin(np.asarray(rows.fields, dtype=str), values)
    return np.flatnonzero(~named), np.flatnonzero(named)


def hold_out(splits: Splits, share: float, seed: int) -> Splits:
    """Make a share of the training rows, drawn at random, the test data; both have at least one row.

    Raises
    ------
    FedspanError
        When there are fewer than two training rows.
    """
    num_rows = len(splits.train)
    if num_rows < 2:
        raise FedspanError(
            f"the training data has {num_rows} row: expected 2 or more to hold out test data, or data.test"
        )
    train, test = _apart(num_rows, share, seed, _HOLDOUT)
    files = splits.files
    return Splits(splits.train.take(train), splits.train.take(test), splits.unseen, files[train], files[test])


def evaluated_on_training(corpus: Corpus, share: float, seed: int) -> Corpus:
    """Return the corpus with a share of its training rows, drawn at random, as its test data, and no unseen data.

    Raises
    ------
    FedspanError
        When there are fewer than two training rows.
    """
    num_rows = len(corpus.train)
    _check_divisible(num_rows, "data.test_from_training", share)
    train, test = _apart(num_rows, share, seed, _FROM_TRAINING)
    return replace(
        corpus,
        train=corpus.train.take(train),
        test=corpus.train.take(test),
        unseen=None,
        client_files=_moved(corpus.client_files, train, num_rows),
        client_tests=_moved(corpus.client_files, test, num_rows),
    )


def limited(corpus: Corpus, max_train: int | None, max_test: int | None, seed: int) -> Corpus:
    """Return the corpus with at most `max_train` training rows, and `max_test` test and unseen rows, in their order."""
    kept = _draw(len(corpus.train), max_train, seed, _MAX_TRAIN)
    tested = _draw(len(corpus.test), max_test, seed, _MAX_TEST)
    unseen = corpus.unseen
    if unseen is not None:
        unseen = _taken(unseen, _draw(len(unseen), max_test, seed, _MAX_UNSEEN))
    return replace(
        corpus,
        train=_taken(corpus.train, kept),
        test=_taken(corpus.test, tested),
        unseen=unseen,
        client_files=_moved(corpus.client_files, kept, len(corpus.train)),
        client_tests=_moved(corpus.client_tests, tested, len(corpus.test)),
    )


def with_validation(corpus: Corpus, share: float, seed: int) -> Corpus:
    """Return the corpus with a share of its training rows, drawn at random, as validation data.

    Raises
    ------
    FedspanError
        When there are fewer than two training rows.
    """
    num_rows = len(corpus.train)
    if not share:
        return corpus
    _check_divisible(num_rows, "data.validation", share)
    train, validation = _apart(num_rows, share, seed, _VALIDATION)
    return replace(
        corpus,
        train=corpus.train.take(train),
        validation=corpus.train.take(validation),
        client_files=_moved(corpus.client_files, train, num_rows),
    )


def _check_divisible(num_rows: int, name: str, share: float) -> None:
    if num_rows < 2:
        raise FedspanError(f"{name} = {share}: the training data has {num_rows} row; expected 2 or more")


def _apart(num_rows: int, share: float, seed: int, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices of the rows that stay, and of a share of them drawn at random; at least one of each."""
    size = min(max(1, round(share * num_rows)), num_rows - 1)
    order = np.random.default_rng([seed, purpose]).permutation(num_rows)
    return np.sort(order[size:]), np.sort(order[:size])


def _taken(rows: Rows, kept: np.ndarray) -> Rows:
    return rows if len(kept) == len(rows) else rows.take(kept)  # a copy of all rows would be one too many in memory


def _moved(parts: tuple[np.ndarray, ...] | None, kept: np.ndarray, num_rows: int) -> tuple[np.ndarray, ...] | None:
    """Return arrays of row numbers as numbers among the rows that are kept."""
    if parts is None:
        return None
    place = np.full(num_rows, -1)
    place[kept] = np.arange(len(kept))
    return tuple(place[part][place[part] >= 0] for part in parts)


def _draw(num_rows: int, limit: int | None, seed: int, purpose: int) -> np.ndarray:
    if limit is None or limit >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng([seed, purpose]).choice(num_rows, size=limit, replace=False))
