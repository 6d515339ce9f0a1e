"""A client's batches, and the gradients of each, in one piece or in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from fedspan.client.length_parts import parts, worth_a_part
from fedspan.config import EngineConfig, LocalConfig
from fedspan.data import Encoded
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses, num_answer_tokens
from fedspan.support.seeding import generator


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A batch that passes through the model at once, or a part of one."""

    batch: dict[str, torch.Tensor]
    """As `Encoded.batch` returns it, on the model's device."""
    packed: bool = False
    """Its rows lie end to end in the model's blocks."""

    @property
    def count(self) -> int:
        """The answer tokens of instruction data, otherwise the rows."""
        labels = self.batch["labels"]
        return int(num_answer_tokens(self.batch)) if labels.ndim == 2 else len(labels)


def batches(num_examples: int, batch_size: int, steps: int, rng: torch.Generator) -> Iterator[list[int]]:
    """Yield `steps` batches of indices, without replacement within each pass over the data."""
    order: list[int] = []
    size = min(batch_size, num_examples)
    for _ in range(steps):
        if not order:
            order = torch.randperm(num_examples, generator=rng).tolist()
        yield order[:size]
        order = order[size:]


@contextmanager
def autocast(model: FederatedModel, engine: EngineConfig) -> Iterator[None]:
    """Compute the base's matrix products inside in the type that the settings ask for."""
    with ExitStack() as stack:
        for kind in model.device_types if engine.autocast != "none" else ():
            stack.enter_context(torch.autocast(kind, torch.bfloat16))
        yield


def add_gradients(
    model: FederatedModel, parts: Sequence[Part], engine: EngineConfig, scale: float = 1.0
) -> torch.Tensor:
    """Add the gradients of a batch's mean loss, times `scale`, to those of the weights; return the loss.

    Parameters
    ----------
    parts
        The batch, or several parts of it, which pass one after the other: the activations of one part are in memory at
        a time. Each counts by its answer tokens (or rows), so that the sum is that of the batch in one piece.
    """
    counts = [part.count for part in parts]
    total = torch.zeros((), device=model.device)
    for part, count in zip(parts, counts, strict=True):
        if count == 0 and len(parts) > 1:
            continue  # whose mean is not a number
        with autocast(model, engine):
            loss = client_losses(model, part.batch, packed=part.packed).sum()
        if len(parts) > 1:
            loss = loss * (count / sum(counts))
        total += loss.detach().to(total.device)
        torch.autograd.backward(loss * scale if scale != 1 else loss)
    return total


def schedule(
    model: FederatedModel,
    examples: Encoded,
    steps: int,
    config: LocalConfig,
    engine: EngineConfig,
    key: tuple[object, ...],
) -> Iterator[list[Part]]:
    """Yield the batches of a client's examples, each in the parts that it is trained in, on the model's device.

    A wide client's rows are packed where the base can do that, in as many parts as the settings ask for: that takes the
    fewest tokens and the fewest kernels. Otherwise they are taken in parts of similar lengths.
    """
    lengths = examples.lengths.tolist()
    # A compiled pass would be compiled again for every shape.
    worth = None if engine.compile else worth_a_part(model, examples, config.batch_size)
    packed = worth is not None and model.packed is not None and not engine.checkpointing
    for indices in batches(len(examples), config.batch_size, steps, generator(*key, "batches")):
        if worth is None or packed or config.accumulate > 1:
            cut = [part for part in np.array_split(indices, config.accumulate) if len(part)]
        else:
            cut = [np.asarray(indices)[part] for part in parts([lengths[i] for i in indices], worth)]
        found = []
        for part in cut:
            # Rows of one length have no padding to leave out.
            own = packed and len({lengths[i] for i in part}) > 1
            batch = {name: value.to(model.device) for name, value in examples.batch(part).items()}
            found.append(Part(batch, own))
        yield found
