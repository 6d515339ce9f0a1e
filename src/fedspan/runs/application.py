"""The application of a trained model to new data: its figures there, and its prediction for every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.client.evaluation import batches, in_order, predict
from fedspan.client.executors import EvaluationTask, InlineExecutor, WorkContext
from fedspan.data import Encoded
from fedspan.data.class_metrics import ClassReport, class_report
from fedspan.data.predictions_file import check_out, kept_columns, original_rows, write_predictions
from fedspan.runs.trained import Trained, find_trained
from fedspan.support.activity import report
from fedspan.support.files import StrPath

_AT_ONCE = 4096
"""Rows whose predictions are held before they are written."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of a trained model on new data."""

    metrics: dict[str, float]
    """Name of a metric, or `loss` -> its value; NaN where the rows do not determine it."""
    rows: int
    classes: ClassReport | None
    """Confusion matrix, precision and recall; None without classes."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Predicted:
    """A file of predictions that was written."""

    out: Path
    rows: int
    notes: tuple[str, ...]


def evaluate(
    model: StrPath, data: Sequence[StrPath], *, settings: Sequence[str] = (), base: str | None = None
) -> Evaluation:
    """Evaluate a trained model on the rows of these files, all of which need labels (or answers).

    On the test rows of a run its figures are those of the summary, to the bit.

    Parameters
    ----------
    model
        The folder of a finished run, or of a PEFT adapter.
    data
        Files or folders of rows, as `data.test` takes them.
    settings
        `KEY=VALUE` of settings on data, evaluation, base and device, such as ``data.metrics=auroc``.
    base
        The base of an adapter, where its own name does not lead to it.

    Raises
    ------
    FedspanError
        For anything wrong with the model or the data.
    """
    trained = find_trained(Path(model), settings, base)
    rows = trained.read([str(name) for name in data], unlabelled=False)
    context, broadcast, notes = trained.context(rows, trained.chosen_metrics(rows.rows.kind))
    report(f"evaluating {len(rows.rows):,} rows")
    (figures,) = InlineExecutor(context).evaluate([EvaluationTask(broadcast)])
    classes = None
    if trained.labels.num_labels > 1:
        classes = class_report(figures.predicted, figures.references, _names(trained))
    return Evaluation(dict(figures), len(figures.references), classes, notes)


def predict_rows(
    model: StrPath,
    data: Sequence[StrPath],
    out: StrPath,
    *,
    force: bool = False,
    settings: Sequence[str] = (),
    base: str | None = None,
) -> Predicted:
    """Write a trained model's prediction for every row of these files, beside the row's own columns.

    Rows need no label. A prediction is the name of a class (its id, where it has no name) with the probabilities, a
    number, or the generated answer.

    Parameters
    ----------
    out
        A new file that ends in .jsonl or .csv.
    force
        Replace it where it exists.
    model, data, settings, base
        As for `evaluate`.

    Raises
    ------
    FedspanError
        For anything wrong with the model or the data, or a file that exists.
    """
    path, files = Path(out), [str(name) for name in data]
    check_out(path, files, force)
    trained = find_trained(Path(model), settings, base)
    rows = trained.read(files, unlabelled=True)
    names = kept_columns(rows.tables)
    context, broadcast, notes = trained.context(rows, ())
    context.model.load(broadcast)
    found = _predictions(context, trained)
    originals = original_rows(rows.tables, names)
    count = write_predictions(path, names, (own | new for own, new in zip(originals, found, strict=True)))
    return Predicted(path, count, notes)


def _predictions(context: WorkContext, trained: Trained) -> Iterator[dict[str, Any]]:
    """Yield the prediction of every row, in their order."""
    examples = context.data["test"]
    for start in range(0, len(examples), _AT_ONCE):
        report(f"predicting {len(examples):,} rows", start)
        part = examples.subset(np.arange(start, min(start + _AT_ONCE, len(examples))))
        yield from _of_part(context, part, trained)


def _of_part(context: WorkContext, part: Encoded, trained: Trained) -> Iterator[dict[str, Any]]:
    cut = batches(part, context.evaluation.batch_size)
    tokens = context.evaluation.max_new_tokens if part.kind == "instruction" else 0
    found = predict(context.model, part, cut, context.processor, tokens, True)
    values = in_order(cut, [p.values for p in found])
    if trained.labels.num_labels < 2:
        yield from ({"prediction": value} for value in values)
        return
    names = _names(trained)
    for value, shares in zip(values, in_order(cut, [p.probabilities for p in found]), strict=True):
        by_name = dict(zip(names, shares, strict=True))
        label = names[value] if trained.labels.names is not None else value
        yield {"prediction": label, "probability": shares[value], "probabilities": by_name}


def _names(trained: Trained) -> list[str]:
    labels = trained.labels
    return list(labels.names or map(str, range(labels.num_labels)))
