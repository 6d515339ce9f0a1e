"""The training loss, client by client, of a batch that may hold the rows of several clients.

Shapes: C clients of b rows each, client by client; t tokens of the longest row; V the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedspan.models.federated_model import FederatedModel
from fedspan.models.padding import equal_lengths, row_logits

_IGNORED = -100
_TARGETS = ("labels", "weights", "positions")


def client_losses(
    model: FederatedModel,
    batch: Mapping[str, Tensor],
    num_clients: int = 1,
    real: Tensor | None = None,
    *,
    packed: bool = False,
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
    packed
        Let the rows lie end to end inside the blocks, without padding (`models.packed_rows`).

    Returns
    -------
    Tensor
        (C,)
    """
    if model.padding_matters and model.kind == "instruction" and num_clients == 1:
        return _equal_length_loss(model, batch)
    with (
        nullcontext() if model.prefix is None else model.prefix.reading(batch),
        # After the prefix, whose states the first block that is computed is given padded.
        model.packed.packing(batch) if packed else nullcontext(),
    ):
        return _client_losses(model, batch, num_clients, real)


def _equal_length_loss(model: FederatedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over all answer tokens, (1,), from passes over rows of equal length."""
    losses, counts = [], []
    for _, part in equal_lengths(batch):
        losses.append(_client_losses(model, part, 1, None))
        counts.append((part["labels"][:, 1:] != _IGNORED).sum())
    weights = torch.stack(counts).to(losses[0].device)
    return (torch.cat(losses) * weights).sum()[None] / weights.sum()


def _client_losses(model: FederatedModel, batch: Mapping[str, Tensor], num_clients: int, real: Tensor | None) -> Tensor:
    inputs, labels = pass_inputs(model, batch), batch["labels"]
    if model.kind != "instruction":
        logits = row_logits(model.model, inputs, model.padding_matters)
        return _row_losses(logits.float(), labels.to(logits.device), num_clients, real)
    if real is not None:
        labels = labels.masked_fill(~real[:, None], _IGNORED)
    if _has_encoder(batch):
        last = None  # the answer's tokens are moved already
    else:
        labels, last = labels[:, 1:], -1
    wanted = labels != _IGNORED  # (C·b, t − 1), of an encoder-decoder (C·b, u)
    with _selecting(model.model, lambda hidden: hidden[:, :last][wanted.to(hidden.device)]):
        logits = model.model(**inputs).logits  # (tokens, V)
    # The output layer may be on another device than the embeddings, which the batch went to.
    losses = F.cross_entropy(logits.float(), labels[wanted].to(logits.device), reduction="none")
    if num_clients == 1:
        # Not through _means, whose sum adds in another order: a client alone has the bits of a plain mean.
        return losses.mean()[None]
    owner = torch.arange(num_clients, device=losses.device).repeat_interleave(wanted.shape[0] // num_clients)
    return _means(losses, owner[:, None].expand_as(wanted)[wanted], num_clients)


def pass_inputs(model: FederatedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of the model's `forward` for a batch."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    if "use_cache" in inspect.signature(model.model.forward).parameters:
        inputs["use_cache"] = False  # nothing is generated
    if model.kind == "instruction" and not _has_encoder(batch):
        # With padding on the right alone, causal attention never looks at it: no mask, and a faster kernel.
        del inputs["attention_mask"]
    return inputs


def num_answer_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the number of tokens that the loss of a batch of instruction data is the mean over."""
    labels = batch["labels"] if _has_encoder(batch) else batch["labels"][:, 1:]
    return (labels != _IGNORED).sum()


def _has_encoder(batch: Mapping[str, Tensor]) -> bool:
    """Return whether a batch has prompts and answers apart, for an encoder and a decoder."""
    return "decoder_input_ids" in batch


def _row_losses(logits: Tensor, labels: Tensor, num_clients: int, real: Tensor | None) -> Tensor:
    losses = _each_row(logits, labels)
    if num_clients == 1:
        return losses.mean()[None]
    owner = torch.arange(num_clients, device=losses.device).repeat_interleave(len(losses) // num_clients)
    if real is not None:
        losses, owner = losses[real], owner[real]
    return _means(losses, owner, num_clients)


def _each_row(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return (logits[:, 0] - labels.float()).square()
    return F.cross_entropy(logits, labels, reduction="none")


def fixed_shape_losses(model: FederatedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what :func:`client_losses` returns, by operations whose shapes do not depend on the batch's values.

    A device that runs ahead of Python can then be given the whole step at once: nothing is read back from it.

    Parameters
    ----------
    batch
        One of those that :func:`fixed_shape_batches` returns, on the model's device.

    Returns
    -------
    Tensor
        (C,) this batch's part of the clients' losses; 0 for a client without a real row.
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in _TARGETS}
    weights = batch["weights"]  # (C, b), or (C, a) for instruction data
    if "use_cache" in inspect.signature(model.model.forward).parameters:
        inputs["use_cache"] = False
    if "positions" not in batch:
        losses = _each_row(model.model(**inputs).logits.float(), batch["labels"])
    else:
        with _selecting(model.model, lambda hidden: hidden.flatten(0, 1).index_select(0, batch["positions"])):
            logits = model.model(**inputs).logits  # (C·a, V)
        losses = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
    return (losses.view_as(weights) * weights).sum(dim=1)


def fixed_shape_batches(
    parts: Sequence[tuple[Mapping[str, Tensor], Tensor, int]], pad: int, round_up: Callable[[int], int]
) -> list[dict[str, Tensor]]:
    """Return one step's rows for :func:`fixed_shape_losses`, whose results for all parts add up to the clients' losses.

    Parameters
    ----------
    parts
        A batch of `Encoded.batch` (C·b, …), client by client; which of its rows are real, (C, b), the others only
        filling it; and the number of tokens to pad it to on the right, at least the longest row's.
    pad
        The token that the rows are padded with.
    round_up
        Gives the number of answer tokens a of a client that a batch is to hold, from the largest that it needs.
    """
    fixed = [_fixed_shape(batch, real, length, pad, round_up) for batch, real, length in parts]
    totals = sum(batch["weights"].sum(dim=1, keepdim=True) for batch in fixed)
    assert isinstance(totals, Tensor)
    for batch in fixed:
        batch["weights"] /= totals.clamp(min=1)
    return fixed


def _fixed_shape(
    batch: Mapping[str, Tensor], real: Tensor, length: int, pad: int, round_up: Callable[[int], int]
) -> dict[str, Tensor]:
    padding = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0, "decoder_input_ids": pad}
    fixed = {
        name: F.pad(value, (0, length - value.shape[1]), value=padding[name]) if name in padding else value
        for name, value in batch.items()
    }
    num_clients, width = real.shape
    if batch["labels"].ndim == 1:
        return fixed | {"weights": real.float()}
    shift = 0 if _has_encoder(batch) else 1  # a token's place in the labels minus the place that predicts it
    if shift:
        del fixed["attention_mask"]  # causal attention never looks at padding on the right
    t = batch["labels"].shape[1]
    wanted = (batch["labels"][:, shift:] != _IGNORED) & real.flatten()[:, None]
    wanted = wanted.view(num_clients, width * (t - shift))
    num_answers = wanted.sum(dim=1)
    most = round_up(int(num_answers.max()))
    # The wanted places first, in their order; those behind them count for nothing.
    places = torch.sort(wanted.byte(), dim=1, descending=True, stable=True).indices[:, :most]
    places = F.pad(places, (0, most - places.shape[1]))
    rows = places // (t - shift) + width * torch.arange(num_clients)[:, None]
    columns = places % (t - shift)
    labels = batch["labels"][rows, columns + shift]
    answered = torch.arange(most) < num_answers[:, None]  # (C, a)
    return fixed | {
        "positions": (rows * length + columns).flatten(),
        "labels": labels.masked_fill(~answered, 0).flatten(),
        "weights": answered.float(),
    }


def _means(losses: Tensor, owner: Tensor, num_clients: int) -> Tensor:
    counts = torch.bincount(owner, minlength=num_clients)
    return losses.new_zeros(num_clients).index_add(0, owner, losses) / counts


@contextmanager
def _selecting(model: Any, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give the output layer only what `select` takes of the last hidden states, (rows, t, hidden)."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (select(inputs[0]),)

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
