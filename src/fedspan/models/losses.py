"""The training loss, client by client, of a batch that may hold the rows of several clients.

Shapes: C clients of b rows each, client by client; t tokens of the longest row; V the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedspan.models.federated_model import FederatedModel

_IGNORED = -100


def client_losses(
    model: FederatedModel, batch: Mapping[str, Tensor], num_clients: int = 1, real: Tensor | None = None
) -> Tensor:
    """Return each client's mean loss over its own answer tokens (or rows), as transformers computes it for them alone.

    Only the positions with a label reach the output layer, which for a large vocabulary is most of a small model's
    work and memory.

    Parameters
    ----------
    batch
        A batch of `Encoded.batch`, (C·b, …) and padded on the right, on the model's device.
    real
        (C·b,) false for rows that only fill a client up to b; None where all rows count.

    Returns
    -------
    Tensor
        (C,)
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if "use_cache" in inspect.signature(model.model.forward).parameters:
        inputs["use_cache"] = False  # nothing is generated
    if model.kind != "instruction":
        logits = model.model(**inputs).logits
        return _row_losses(logits.float(), labels, num_clients, real)
    if real is not None:
        labels = labels.masked_fill(~real[:, None], _IGNORED)
    # With padding on the right alone, causal attention never looks at it: no mask, and a faster kernel.
    del inputs["attention_mask"]
    wanted = labels[:, 1:] != _IGNORED  # (C·b, t − 1)
    with _only(model.model, wanted):
        logits = model.model(**inputs).logits  # (tokens, V)
    losses = F.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="none")
    if num_clients == 1:
        # Not through _means, whose sum adds in another order: a client alone has the bits of a plain mean.
        return losses.mean()[None]
    owner = torch.arange(num_clients, device=losses.device).repeat_interleave(wanted.shape[0] // num_clients)
    return _means(losses, owner[:, None].expand_as(wanted)[wanted], num_clients)


def _row_losses(logits: Tensor, labels: Tensor, num_clients: int, real: Tensor | None) -> Tensor:
    if logits.shape[1] == 1:
        losses = (logits[:, 0] - labels.float()).square()
    else:
        losses = F.cross_entropy(logits, labels, reduction="none")
    if num_clients == 1:
        return losses.mean()[None]
    owner = torch.arange(num_clients, device=losses.device).repeat_interleave(len(losses) // num_clients)
    if real is not None:
        losses, owner = losses[real], owner[real]
    return _means(losses, owner, num_clients)


def _means(losses: Tensor, owner: Tensor, num_clients: int) -> Tensor:
    counts = torch.bincount(owner, minlength=num_clients)
    return losses.new_zeros(num_clients).index_add(0, owner, losses) / counts


@contextmanager
def _only(model: Any, wanted: Tensor) -> Iterator[None]:
    """Give the output layer the last hidden states at `wanted` (rows, t − 1) alone, as (tokens, hidden)."""

    def select(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:, :-1][wanted],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
