"""The evaluation of a model on held-out data: the loss and the task's metrics.

The data is cut into batches by its lengths alone, each batch is predicted by itself, and the figures are computed from
all predictions in the batches' order: the figures have the same bits whichever process predicts which batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedspan.client.generation import generate
from fedspan.data import Encoded
from fedspan.data.metric_blocks import RowResults
from fedspan.data.metrics import METRICS
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses, num_answer_tokens
from fedspan.models.merged import merged
from fedspan.models.padding import row_logits


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of a model for one batch, and its loss."""

    loss: float
    """Sum over the `count` tokens or examples."""
    count: int
    """Answer tokens of instruction data, otherwise examples."""
    values: list[Any]
    """One for every example, in the batch's order: a text, a class or a number. Empty for instruction data where no
    metric needs generated text."""
    probabilities: list[list[float]] = field(default_factory=list)
    """Those of all classes for every example, where a metric needs them."""


class Figures(dict[str, float]):
    """The loss and the metrics of one evaluation by their names, and the predictions that they were computed from."""

    def __init__(self, figures: Mapping[str, float], rows: RowResults) -> None:
        super().__init__(figures)
        self.rows = rows
        self.predicted = rows.predicted
        """One for every example, in the examples' order, as in `Predictions`."""
        self.references = rows.references


def evaluate(
    model: FederatedModel,
    examples: Encoded,
    metrics: Sequence[str],
    processor: Any,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> Figures:
    """Return `loss` and every metric of the model as it is loaded.

    Instruction data is scored on text that the model generates greedily from the prompt, not on the argmax under
    teacher forcing. The loss is the mean over answer tokens (or examples).
    """
    cut = batches(examples, batch_size)
    tokens = max_new_tokens if needs_text(examples, metrics) else 0
    wanted = needs_probabilities(metrics)
    return figures(examples, metrics, cut, predict(model, examples, cut, processor, tokens, wanted))


def batches(examples: Encoded, batch_size: int) -> list[list[int]]:
    """Return indices in batches from the longest examples to the shortest, so that a batch holds little padding."""
    lengths = examples.lengths.tolist()
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def spread_rows(rows: np.ndarray, most: int | None) -> np.ndarray:
    """Return at most that many of the rows, spread over all of them, which may be sorted by task."""
    if most is None or most >= len(rows):
        return rows
    chosen: np.ndarray = rows[[int(i * len(rows) / most) for i in range(most)]]
    return chosen


def needs_text(examples: Encoded, metrics: Sequence[str]) -> bool:
    """Return whether one of these metrics needs text that the model generates."""
    return examples.kind == "instruction" and any(METRICS[name].needs == "texts" for name in metrics)


def needs_probabilities(metrics: Sequence[str]) -> bool:
    """Return whether one of these metrics needs the probabilities of the classes."""
    return any(METRICS[name].needs == "probabilities" for name in metrics)


@torch.no_grad()
def predict(
    model: FederatedModel,
    examples: Encoded,
    cut: Sequence[Sequence[int]],
    processor: Any,
    max_new_tokens: int,
    probabilities: bool = False,
) -> list[Predictions]:
    """Return the predictions of the model, as it is loaded, for each of these batches.

    Parameters
    ----------
    max_new_tokens
        Longest text that is generated for instruction data; 0 generates none and computes the loss alone.
    probabilities
        Return those of the classes too, where there are classes.
    """
    model.model.eval()
    with merged(model):
        computed = [_predict(model, examples, indices, processor, max_new_tokens) for indices in cut]
    # Read once all are under way: a device would be idle while Python looks at a batch's figures.
    return [_read(*one, probabilities) for one in computed]


def _read(
    loss: Tensor, weight: Tensor | int, count: Tensor | int, values: Tensor | list[Any], probabilities: bool
) -> Predictions:
    shares: list[list[float]] = []
    if isinstance(values, Tensor) and values.ndim == 2:
        shares = values.double().softmax(dim=1).tolist() if probabilities else []
        values = values.argmax(dim=1)
    listed = values.tolist() if isinstance(values, Tensor) else values
    return Predictions(float(loss) * int(weight), int(count), listed, shares)


def _predict(
    model: FederatedModel, examples: Encoded, indices: Sequence[int], processor: Any, max_new_tokens: int
) -> tuple[Tensor, Tensor | int, Tensor | int, Tensor | list[Any]]:
    """Return a loss and its factor, the count and the texts, numbers or logits of one batch, on the model's device."""
    batch = {name: value.to(model.device) for name, value in examples.batch(indices).items()}
    if examples.kind == "instruction":
        count = num_answer_tokens(batch)
        loss = client_losses(model, batch)
        texts = generate(model, examples, indices, processor, max_new_tokens) if max_new_tokens else []
        return loss, count, count, texts
    labels = batch.pop("labels")
    logits = row_logits(model.model, batch, model.padding_matters).float()
    labels = labels.to(logits.device)
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels, reduction="sum"), 1, len(indices), logits[:, 0]
    return F.cross_entropy(logits, labels, reduction="sum"), 1, len(indices), logits


def figures(
    examples: Encoded, metrics: Sequence[str], cut: Sequence[Sequence[int]], predictions: Sequence[Predictions]
) -> Figures:
    """Return `loss` and every metric, from the predictions for all batches of `cut`, in their order.

    A figure that the examples do not determine is NaN.
    """
    losses, counts = [p.loss for p in predictions], [p.count for p in predictions]
    values = in_order(cut, [p.values for p in predictions])
    references = examples.references
    shares = in_order(cut, [p.probabilities for p in predictions])
    pairs: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
        "losses": (losses, counts),
        "probabilities": (shares, references),
    }
    result = {"loss": sum(losses) / max(sum(counts), 1)}
    for name in metrics:
        result[name] = METRICS[name].value(*pairs.get(METRICS[name].needs, (values, references)))
    return Figures(result, RowResults(losses, counts, values, references, shares))


def in_order(cut: Sequence[Sequence[int]], by_batch: Sequence[Sequence[Any]]) -> list[Any]:
    """Return what was predicted batch by batch in the order of the examples; nothing, where nothing was predicted."""
    by_example: dict[int, Any] = {}
    for indices, values in zip(cut, by_batch, strict=True):
        by_example |= zip(indices, values, strict=False)  # no values at all, where only the loss was computed
    return [by_example[i] for i in sorted(by_example)]
