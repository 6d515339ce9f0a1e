"""From the settings under `[data]` to a corpus: where rows come from, and which are kept for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedspan.config import DataConfig
from fedspan.data import hub
from fedspan.data.columns import infer_kind, learn_labels, to_rows
from fedspan.data.images import folder_table, has_split, npz_table
from fedspan.data.metrics import GLUE_COLUMNS, GLUE_METRICS, GLUE_NUM_LABELS
from fedspan.data.rows import Corpus, Kind, Rows, concatenate
from fedspan.data.tables import Table, read_table
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_TASK_SIZES = {"train": 150, "test": 20}  # generated examples of one builtin task
_HOLDOUT, _MAX_TRAIN, _MAX_TEST, _MAX_UNSEEN = range(4)  # purposes of a generator

_METRICS_OF: Mapping[Kind, tuple[str, ...]] = {
    "instruction": ("rouge_l", "exact_match", "token_f1", "perplexity"),
    "classification": ("accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"),
    "image": ("accuracy", "f1", "macro_f1", "matthews"),
}
_DEFAULT_METRICS: Mapping[Kind, tuple[str, ...]] = {
    "instruction": ("rouge_l", "exact_match"),
    "classification": ("accuracy",),
    "image": ("accuracy",),
}


def load(config: DataConfig, seed: int) -> Corpus:
    """Read, split and label the data of a run.

    * Without test data, a share `holdout` of the training rows becomes the test data. An npz that holds a
      test split is its own test data, and so is the test or validation split of a hub dataset.
    * A row whose field is one of `unseen_values` is neither trained on nor part of the test data. The unseen
      data has, of each such value, its rows of the test data, or of the training data when the test data has
      none; and the rows of the `unseen` files.
    * `max_train` limits the training data, `max_test` the test data and the unseen data, each by a draw that
      depends on `seed` alone. The order of rows is kept.
    * `glue/NAME` with `train` files reads these instead of the hub, in GLUE's columns unless `text_columns`
      says otherwise. With `hub:NAME` and `glue/NAME`, a word in `train` or `test` that is no file name is the
      name of a split.

    Parameters
    ----------
    config
        The settings.
    seed
        Non-negative; the same seed gives the same corpus.

    Raises
    ------
    ValueError
        One line naming the setting, file, column or row that is wrong and what was expected.
    """
    if seed < 0:
        raise FedspanError(f"seed = {seed}: expected 0 or more")
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
    return _limited(_with_metric(corpus, config.metric), config, seed)


def _check_builtin(config: DataConfig) -> None:
    for key in ("train", "test", "unseen"):
        if getattr(config, key):
            names = list(getattr(config, key))
            raise FedspanError(f"data.{key} = {names} with data.task = {config.task!r}: expected data.task = 'files'")
    field = "task" if config.task == "builtin:tasks" else None
    if config.field_column not in (None, field):
        found = f"only the field {field!r}" if field else "no field"
        raise FedspanError(f"data.field_column = {config.field_column!r}: {config.task} has {found}")


def _builtin_tasks(config: DataConfig, seed: int) -> Corpus:
    from fedspan.data.builtin.tasks import TASKS, examples

    def rows(names: Sequence[str], split: str) -> Rows:
        found = [row for name in names for row in examples(name, _TASK_SIZES[split], seed, split)]
        pairs = [(row["instruction"], row["input"]) for row in found]
        return Rows("instruction", pairs, [row["output"] for row in found], [row["task"] for row in found])

    seen = [name for name, task in TASKS.items() if task.seen]
    unseen = rows([name for name in TASKS if name not in seen], "test")
    train, test, unseen_too = _keep_apart(rows(seen, "train"), rows(seen, "test"), unseen, config)
    return Corpus("instruction", train, test, unseen_too, None, None, 0, ("exact_match", "rouge_l"))


def _builtin_digits(config: DataConfig, seed: int) -> Corpus:
    from fedspan.data.builtin import digits

    found = digits.load(seed)
    train, test = (
        Rows("image", images, labels.tolist(), [""] * len(labels))
        for images, labels in (
            (found.train_images, found.train_labels),
            (found.test_images, found.test_labels),
        )
    )
    train, test, unseen = _keep_apart(train, test, None, config)
    names = found.class_names
    return Corpus("image", train, test, unseen, None, names, len(names), ("accuracy",))


def _glue(config: DataConfig, name: str, seed: int) -> Corpus:
    if name not in GLUE_METRICS:
        raise FedspanError(f"data.task = 'glue/{name}' is no GLUE task{nearest(name, GLUE_METRICS)}")
    metrics = GLUE_METRICS[name]
    official = config.model_copy(
        update={
            "kind": "classification",
            "text_columns": config.text_columns or GLUE_COLUMNS[name],
            "metric": config.metric or metrics[0],
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
        test_names = config.train if has_split(Path(config.train[0]), "test") else ()
    train, test, unseen = (
        [_read(Path(name).expanduser(), split) for name in names]
        for split, names in (("train", config.train), ("test", test_names), ("unseen", config.unseen))
    )
    return _from_tables(train, test, unseen, config, seed)


def _read(path: Path, split: str) -> Table:
    if not path.exists():
        raise FedspanError(f"data.{split}: {path} does not exist")
    if path.is_dir():
        return folder_table(path)
    return npz_table(path, split) if path.name.lower().endswith(".npz") else read_table(path)


def _from_tables(
    train: Sequence[Table], test: Sequence[Table], unseen: Sequence[Table], config: DataConfig, seed: int
) -> Corpus:
    tables = [*train, *test, *unseen]
    kind = infer_kind(train[0], config)
    rows = [to_rows(table, kind, config) for table in tables]
    num_labels, names = 0, None
    if kind != "instruction":
        source = ", ".join(table.source for table in train[:2]) + (", …" if len(train) > 2 else "")
        raw = [label for part in rows[: len(train)] for label in part.targets]
        labels = learn_labels(raw, source, config.metric, train[0].label_names)
        num_labels, names = labels.num_labels, labels.names
        rows = [
            replace(part, targets=labels.ids(part.targets, table.source))
            for part, table in zip(rows, tables, strict=True)
        ]
    first_test, first_unseen = len(train), len(train) + len(test)
    learned = concatenate(rows[:first_test])
    held = concatenate(rows[first_test:first_unseen]) if test else None
    apart = concatenate(rows[first_unseen:]) if unseen else None
    origin = np.repeat(np.arange(len(train)), [len(part) for part in rows[:first_test]])
    kept, learned_rows, held, apart = _apart(learned, held, apart, config)
    if held is None:
        share, rest = _held_out(len(kept), config.holdout, seed)
        kept, learned_rows, held = kept[rest], learned_rows.take(rest), learned_rows.take(share)
    files = tuple(np.flatnonzero(origin[kept] == file) for file in range(len(train)))
    metrics = ("pearson", "spearman") if num_labels == 1 else _DEFAULT_METRICS[kind]
    return Corpus(kind, learned_rows, held, apart, files, names, num_labels, metrics)


def _keep_apart(train: Rows, test: Rows, unseen: Rows | None, config: DataConfig) -> tuple[Rows, Rows, Rows | None]:
    _, train, kept, apart = _apart(train, test, unseen, config)
    return train, test if kept is None else kept, apart


def _apart(
    train: Rows, test: Rows | None, unseen: Rows | None, config: DataConfig
) -> tuple[np.ndarray, Rows, Rows | None, Rows | None]:
    """Indices of the training rows kept, then the three without and with the rows of `unseen_values`."""
    if not config.unseen_values:
        return np.arange(len(train)), train, test, unseen
    known = {*train.fields, *(test.fields if test else ()), *(unseen.fields if unseen else ())} - {""}
    if not known:
        raise FedspanError(
            f"data.unseen_values = {list(config.unseen_values)}: the data has no field; expected data.field_column"
        )
    for value in config.unseen_values:
        if value not in known:
            raise FedspanError(f"data.unseen_values: no row has the value {value!r}{nearest(value, known)}")
    kept, apart = _divide(train, config.unseen_values)
    test_kept, test_apart = _divide(test, config.unseen_values) if test else (None, np.arange(0))
    if not len(kept) or (test_kept is not None and not len(test_kept)):
        raise FedspanError(
            f"data.unseen_values = {list(config.unseen_values)} leaves no "
            f"{'test' if len(kept) else 'training'} rows: expected some"
        )
    parts = [] if unseen is None else [unseen]
    tested = {test.fields[i] for i in test_apart.tolist()} if test else set()
    if test:
        parts.append(test.take(test_apart))
    parts.append(train.take([i for i in apart.tolist() if train.fields[i] not in tested]))
    test = test.take(test_kept) if test and test_kept is not None else test
    return kept, train.take(kept), test, concatenate([part for part in parts if len(part)])


def _divide(rows: Rows, values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    named = np.isin(np.asarray(rows.fields, dtype=str), values)
    return np.flatnonzero(~named), np.flatnonzero(named)


def _held_out(num_rows: int, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices held out, and the others; at least one each."""
    if num_rows < 2:
        raise FedspanError(
            f"the training data has {num_rows} row: expected 2 or more to hold out test data, or data.test"
        )
    size = min(max(1, round(holdout * num_rows)), num_rows - 1)
    order = np.random.default_rng([seed, _HOLDOUT]).permutation(num_rows)
    return np.sort(order[:size]), np.sort(order[size:])


def _with_metric(corpus: Corpus, metric: str | None) -> Corpus:
    """Put the metric asked for first."""
    if metric is None:
        return corpus
    possible = _METRICS_OF[corpus.kind]
    if metric not in possible:
        raise FedspanError(f"data.metric = {metric!r} for {corpus.kind} data{nearest(metric, possible)}")
    if metric == "f1" and corpus.num_labels != 2:
        raise FedspanError(f"data.metric = 'f1' needs 2 labels, the data has {corpus.num_labels}: use 'macro_f1'")
    return replace(corpus, metrics=(metric, *(name for name in corpus.metrics if name != metric)))


def _limited(corpus: Corpus, config: DataConfig, seed: int) -> Corpus:
    kept = _draw(len(corpus.train), config.max_train, seed, _MAX_TRAIN)
    place = np.full(len(corpus.train), -1)
    place[kept] = np.arange(len(kept))
    files = corpus.client_files
    test = corpus.test.take(_draw(len(corpus.test), config.max_test, seed, _MAX_TEST))
    unseen = corpus.unseen
    if unseen is not None:
        unseen = unseen.take(_draw(len(unseen), config.max_test, seed, _MAX_UNSEEN))
    return replace(
        corpus,
        train=corpus.train.take(kept),
        test=test,
        unseen=unseen,
        client_files=None if files is None else tuple(place[file][place[file] >= 0] for file in files),
    )


def _draw(num_rows: int, limit: int | None, seed: int, purpose: int) -> np.ndarray:
    if limit is None or limit >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng([seed, purpose]).choice(num_rows, size=limit, replace=False))
