"""A client's batches, and the gradients of each, in one piece or in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from fedspan.client.length_parts import parts, worth_a_part
from fedspan.config import EngineConfig, LocalConfig
from fedspan.data import Encoded
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses, num_answer_tokens
from fedspan.support.seeding import generator

Batch = dict[str, torch.Tensor]


def batches(num_examples: int, batch_size: int, steps: int, rng: torch.Generator) -> Iterator[list[int]]:
    """Yield `steps` batches of indices, without replacement within each pass over the data."""
    order: list[int] = []
    size = min(batch_size, num_examples)
    for _ in range(steps):
        if not order:
            order = torch.randperm(num_examples, generator=rng).tolist()
        yield order[:size]
        order = order[size:]


def autocast(model: FederatedModel, engine: EngineConfig) -> AbstractContextManager[Any]:
    """Return a context in which the base's matrix products have the type that the settings ask for."""
    if engine.autocast == "none":
        return nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


def add_gradients(
    model: FederatedModel, parts: Sequence[Batch], engine: EngineConfig, scale: float = 1.0
) -> torch.Tensor:
    """Add the gradients of a batch's mean loss, times `scale`, to those of the weights; return the loss.

    Parameters
    ----------
    parts
        The batch, or several parts of it, which pass one after the other: the activations of one part are in memory at
        a time. Each counts by its answer tokens (or rows), so that the sum is that of the batch in one piece.
    """
    counts = [_count(part) for part in parts]
    total = torch.zeros((), device=model.device)
    for part, count in zip(parts, counts, strict=True):
        if count == 0 and len(parts) > 1:
            continue  # whose mean is not a number
        with autocast(model, engine):
            loss = client_losses(model, part).sum()
        if len(parts) > 1:
            loss = loss * (count / sum(counts))
        total += loss.detach()
        torch.autograd.backward(loss * scale if scale != 1 else loss)
    return total


def _count(part: Batch) -> int:
    """Return the answer tokens of instruction data, otherwise the rows."""
    return int(num_answer_tokens(part)) if part["labels"].ndim == 2 else len(part["labels"])


def schedule(
    model: FederatedModel,
    examples: Encoded,
    steps: int,
    config: LocalConfig,
    engine: EngineConfig,
    key: tuple[object, ...],
) -> Iterator[list[Batch]]:
    """Yield the batches of a client's examples, each in the parts that it is trained in, on the model's device."""
    lengths = examples.lengths.tolist()
    # A compiled pass would be compiled again for every shape.
    whole = config.accumulate > 1 or engine.compile
    worth = None if whole else worth_a_part(model, examples, config.batch_size)
    for indices in batches(len(examples), config.batch_size, steps, generator(*key, "batches")):
        if worth is None:
            cut = [part for part in np.array_split(indices, config.accumulate) if len(part)]
        else:
            cut = [np.asarray(indices)[part] for part in parts([lengths[i] for i in indices], worth)]
        yield [{name: value.to(model.device) for name, value in examples.batch(part).items()} for part in cut]
