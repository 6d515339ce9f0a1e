"""From the settings under `[data]` to a corpus: which rows are read, and which split each of them belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedspan.config import DataConfig
from fedspan.data import hub
from fedspan.data.builtin import USUAL_METRICS
from fedspan.data.columns import infer_kind, to_rows
from fedspan.data.files import names_of, read_files
from fedspan.data.images import has_split
from fedspan.data.labels import Labels, given_labels, learn_labels
from fedspan.data.metrics import (
    GLUE_COLUMNS,
    GLUE_METRICS,
    GLUE_NUM_LABELS,
    check_metric,
    default_metrics,
    is_regression,
    register_own,
)
from fedspan.data.no_rows import without_rows
from fedspan.data.partition import rows_by_number
from fedspan.data.rows import Corpus, Kind, Rows, concatenate
from fedspan.data.splits import evaluated_on_training, hold_out, keep_apart, limited, undivided, with_validation
from fedspan.data.strings import joined
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_TASK_SIZES = {"train": 150, "test": 20}  # generated examples of one builtin task


def load(config: DataConfig, seed: int) -> Corpus:
    """Read, split and label the data of a run.

    * Without test data, a share `holdout` of the training rows becomes the test data. An npz that holds a
      test split is its own test data, and so is the test or validation split of a hub dataset.
    * A row whose field is one of `unseen_values` is neither trained on nor part of the test data. The unseen
      data holds, of each such value, its rows of the test data, or of the training data when the test data has
      none; and the rows of the `unseen` files.
    * With `test_from_training`, this share of the training rows, drawn by the seed, takes the place of the test data,
      and there is no unseen data.
    * `max_train` limits the training data, `max_test` the test data and the unseen data, each by a draw that
      depends on `seed` alone. The order of rows is kept.
    * `glue/NAME` with `train` files reads these instead of the hub, in GLUE's columns unless `text_columns`
      says otherwise. With `hub:NAME` and `glue/NAME`, a word in `train` or `test` that is not a file name is the
      name of a split.

    Parameters
    ----------
    config
        The settings.
    seed
        Non-negative; the same seed gives the same corpus.

    Raises
    ------
    FedspanError
        One line naming the setting, file, column or row that is wrong and what was expected.
    """
    if seed < 0:
        raise ValueError(f"seed = {seed}: expected 0 or more")
    if config.task.startswith("builtin:"):
        _check_builtin(config)
    if config.task == "builtin:tasks":
        corpus = _builtin_tasks(config, seed)
    elif config.task == "builtin:digits":
        corpus = _builtin_digits(config, seed)
    elif config.task.startswith("glue/"):
        corpus = _glue(config, config.task.removeprefix("glue/"), seed)
    elif config.task.startswith("hub:"):
        corpus = _from_tables(*_hub_tables(config, config.task.removeprefix("hub:"), config.subset), config, seed)
    elif config.task == "files":
        corpus = _files(config, seed)
    else:
        raise FedspanError(
            f"data.task = {config.task!r}: expected builtin:tasks, builtin:digits, glue/NAME, hub:NAME or files"
        )
    if config.kind not in (None, corpus.kind):
        raise FedspanError(f"data.kind = {config.kind!r}: {config.task} is {corpus.kind} data")
    corpus = _with_metrics(corpus, config.metrics)
    if config.test_from_training:
        corpus = evaluated_on_training(corpus, config.test_from_training, seed)
    return with_validation(limited(corpus, config.max_train, config.max_test, seed), config.validation, seed)


def load_no_rows(config: DataConfig) -> Corpus:
    """Return what the settings say of data that is elsewhere: see `fedspan.data.no_rows`.

    Raises
    ------
    FedspanError
        Where they leave its kind or its labels open, or name a metric that does not fit.
    """
    register_own(config.metrics, config.kind or "classification")
    corpus = without_rows(config)
    corpus = replace(corpus, metrics=default_metrics(corpus.kind, corpus.num_labels))
    return _with_metrics(corpus, config.metrics)


def _check_builtin(config: DataConfig) -> None:
    for key in ("train", "test", "unseen"):
        if getattr(config, key):
            names = list(getattr(config, key))
            raise FedspanError(f"data.{key} = {names} with data.task = {config.task!r}: expected data.task = 'files'")
    field = "task" if config.task == "builtin:tasks" else None
    if config.field_column not in (None, field):
        available = f"only the field {field!r}" if field else "no field"
        raise FedspanError(f"data.field_column = {config.field_column!r}: {config.task} has {available}")


def _builtin_tasks(config: DataConfig, seed: int) -> Corpus:
    from fedspan.data.builtin.tasks import TASKS, examples

    def rows(names: Sequence[str], split: str) -> Rows:
        records = [row for name in names for row in examples(name, _TASK_SIZES[split], seed, split)]
        pairs = [(row["instruction"], row["input"]) for row in records]
        return Rows("instruction", pairs, [row["output"] for row in records], [row["task"] for row in records])

    seen = [name for name, task in TASKS.items() if task.seen]
    unseen = rows([name for name in TASKS if name not in seen], "test")
    splits = keep_apart(undivided(rows(seen, "train"), rows(seen, "test"), unseen), config.unseen_values)
    assert splits.test is not None
    return Corpus(
        "instruction", splits.train, splits.test, splits.unseen, None, None, 0, USUAL_METRICS["builtin:tasks"]
    )


def _builtin_digits(config: DataConfig, seed: int) -> Corpus:
    from fedspan.data.builtin import digits

    loaded = digits.load(seed)
    train, test = (
        Rows("image", images, labels.tolist(), [""] * len(labels))
        for images, labels in (
            (loaded.train_images, loaded.train_labels),
            (loaded.test_images, loaded.test_labels),
        )
    )
    splits, names = keep_apart(undivided(train, test, None), config.unseen_values), loaded.class_names
    assert splits.test is not None
    return Corpus(
        "image", splits.train, splits.test, splits.unseen, None, names, len(names), USUAL_METRICS["builtin:digits"]
    )


def _glue(config: DataConfig, name: str, seed: int) -> Corpus:
    if name not in GLUE_METRICS:
        raise FedspanError(f"data.task = 'glue/{name}' is not a GLUE task{nearest(name, GLUE_METRICS)}")
    metrics = GLUE_METRICS[name]
    official = config.model_copy(
        update={
            "kind": "classification",
            "text_columns": config.text_columns or GLUE_COLUMNS[name],
            "metrics": config.metrics or metrics[:1],
        }
    )
    if config.train and _is_file(config.train[0]):
        corpus = _files(official, seed)
    else:
        test = config.test or ("validation_matched" if name == "mnli" else "validation",)
        tables = _hub_tables(official.model_copy(update={"test": test}), "nyu-mll/glue", name)
        corpus = _from_tables(*tables, official, seed)
    if corpus.num_labels != GLUE_NUM_LABELS[name]:
        raise FedspanError(
            f"the training data of glue/{name} has {corpus.num_labels} labels: expected {GLUE_NUM_LABELS[name]}"
        )
    return replace(corpus, metrics=metrics)


def _is_file(name: str) -> bool:
    return "." in name or "/" in name or Path(name).exists()


def _hub_tables(config: DataConfig, name: str, subset: str | None) -> tuple[list[Table], list[Table], list[Table]]:
    for key, names in (("train", config.train), ("test", config.test)):
        if len(names) > 1:
            raise FedspanError(f"data.{key} = {list(names)}: expected the name of one split")
    if config.unseen:
        raise FedspanError(f"data.unseen = {list(config.unseen)} needs data.task = 'files'; use data.unseen_values")
    train_split = config.train[0] if config.train else "train"
    test_split = config.test[0] if config.test else None
    train, test = hub.read_splits(name, subset, train_split, test_split, config.label_column)
    return [train], [] if test is None else [test], []


def _files(config: DataConfig, seed: int) -> Corpus:
    if not config.train:
        raise FedspanError(f"data.task = {config.task!r} with no data.train: expected at least one file or folder")
    test_names = config.test
    if not test_names and len(config.train) == 1 and config.train[0].lower().endswith(".npz"):
        test_names = config.train if has_split(Path(config.train[0]).expanduser(), "test") else ()
    named = {"train": config.train, "test": test_names, "unseen": config.unseen}
    train, test, unseen = (read_files(names, split, config) for split, names in named.items())
    clients = names_of(config.train) if len(config.train) > 1 else None
    return replace(
        _from_tables(train, test, unseen, config, seed, _same_names(clients, test_names)), client_names=clients
    )


def _same_names(clients: Sequence[str] | None, test_names: Sequence[str]) -> list[int] | None:
    """Return which training file each test file is named after; None where one is named after none."""
    tests = names_of(test_names)
    if not clients or not tests or not set(tests) <= set(clients):
        return None
    places = dict(reversed([(name, place) for place, name in enumerate(clients)]))  # of two files of a name the first
    return [places[name] for name in tests]


@dataclass(frozen=True, slots=True)
class _Part:
    """The rows of one table, with what is needed of the table."""

    source: str
    rows: Rows
    label_names: tuple[str, ...] | None


def _from_tables(
    train: Iterable[Table],
    test: Iterable[Table],
    unseen: Iterable[Table],
    config: DataConfig,
    seed: int,
    test_files: Sequence[int] | None = None,
) -> Corpus:
    kind, parts = _parts((train, test, unseen), config)
    register_own(config.metrics, kind)
    num_labels, names, ids = 0, None, False
    if kind != "instruction":
        labels = _labels_of(parts[0], config)
        num_labels, names = labels.num_labels, labels.names
        # The order of names that the settings give is no accident either.
        ids = labels.form == "id" or bool(config.label_names)
        parts = [[_labelled(part, labels) for part in split] for split in parts]
    rows = [[part.rows for part in split] for split in parts]
    origin, tested = _numbers(rows[0], None), None if test_files is None else _numbers(rows[1], test_files)
    held, apart = (concatenate(split) if split else None for split in rows[1:])
    splits = keep_apart(undivided(concatenate(rows[0]), held, apart, origin, tested), config.unseen_values)
    if splits.test is None:
        splits = hold_out(splits, config.holdout, seed)
    assert splits.test is not None
    files, tests = (rows_by_number(part, len(rows[0])) for part in (splits.files, splits.test_files))
    metrics = default_metrics(kind, num_labels)
    return Corpus(
        kind,
        splits.train,
        splits.test,
        splits.unseen,
        files,
        names,
        num_labels,
        metrics,
        client_tests=tests,
        ids_in_data=ids,
    )


def _parts(splits: Sequence[Iterable[Table]], config: DataConfig) -> tuple[Kind, list[list[_Part]]]:
    """Return the kind of the first training table, and every split's parts; of a table no more is kept."""
    kind: Kind | None = None
    parts: list[list[_Part]] = []
    for tables in splits:
        parts.append([])
        for table in tables:
            kind = kind or infer_kind(table, config)
            parts[-1].append(_Part(table.source, to_rows(table, kind, config), table.label_names))
    assert kind is not None
    return kind, parts


def _numbers(parts: Sequence[Rows], files: Sequence[int] | None) -> np.ndarray:
    """Return the number of each row's file; None: files are numbered in their order."""
    numbers = np.asarray(range(len(parts)) if files is None else files, dtype=np.int32)
    return np.repeat(numbers, [len(part) for part in parts])


def _labelled(part: _Part, labels: Labels) -> _Part:
    return replace(part, rows=replace(part.rows, targets=labels.ids(part.rows.targets, part.source)))


def _labels_of(parts: Sequence[_Part], config: DataConfig) -> Labels:
    """Return the meaning of the training data's labels; test and unseen data may not add any."""
    source = ", ".join(part.source for part in parts[:2]) + (", …" if len(parts) > 2 else "")
    raw = joined([part.rows.targets for part in parts])
    regression = is_regression(config.metrics, parts[0].rows.kind)
    if config.label_names and not regression:
        return given_labels(raw, source, config.label_names)
    return learn_labels(raw, source, regression, parts[0].label_names)


def _with_metrics(corpus: Corpus, metrics: Sequence[str]) -> Corpus:
    """Return the corpus with the metrics that the settings name before its usual ones."""
    register_own(metrics, corpus.kind)
    for name in metrics:
        check_metric(name, corpus.kind, corpus.num_labels)
    return replace(corpus, metrics=tuple(dict.fromkeys((*metrics, *corpus.metrics))))
