"""Small passes by whose values a base is tried: adapters in which both factors count, rows of any length, gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedspan.data import Encoded
from fedspan.data.encoded import IGNORED
from fedspan.methods.messages import Broadcast, Factors, Recipe
from fedspan.models.federated_model import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.support.seeding import generator

_CLOSE = {torch.float32: 2e-3, torch.float64: 2e-3}
_COARSE = 0.1
"""Largest relative difference of a client's gradient: rounding is far below it, and another client's row far above."""
Batch = Mapping[str, Tensor]


def tolerance(model: FederatedModel) -> float:
    """Return the relative difference of a gradient up to which two ways of computing it count as one."""
    kinds = {p.dtype for p in model.model.parameters() if p.is_floating_point()}
    return max(_CLOSE.get(kind, _COARSE) for kind in kinds)


def probe(model: FederatedModel, client: int) -> Broadcast:
    """Return an adapter of its own for each client, in which both factors count."""
    rng = generator("rowwise", client)
    adapter = {}
    for name, held in model.adapter().items():
        b = torch.randn(held.b.shape, generator=rng) / held.rank**0.5
        a = torch.randn(held.a.shape, generator=rng) / held.a.shape[1] ** 0.5
        adapter[name] = Factors(b, a, 0.25)
    dense = {name: t + 0.05 * torch.randn(t.shape, generator=rng) for name, t in model.dense().items()}
    return Broadcast(adapter, dense=dense, recipe=Recipe())


def of_length(batch: Batch, length: int, shorter: int, rows: int, data: Encoded) -> dict[str, Tensor]:
    """Return the batch with rows of `length` tokens, the first `rows` of them `shorter` by that much and padded."""
    pad = data.texts.pad if data.texts is not None else 0
    count = len(batch["input_ids"])
    lengths = [length - shorter if row < rows else length for row in range(count)]
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids = torch.full_like(mask, pad)
    for row, (real, own) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        ids[row, : lengths[row]] = _stretched(real[own.bool()], lengths[row])
    made = {**batch, "input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in made:
        made["token_type_ids"] = torch.zeros_like(mask)
    if "decoder_input_ids" in made:
        made["decoder_input_ids"] = ids
    if made["labels"].ndim == 2:
        made["labels"] = ids.masked_fill(mask == 0, IGNORED)
    return made


def _stretched(tokens: Tensor, length: int) -> Tensor:
    """Return a row of that length with the row's own first and last tokens, which some models look for."""
    if len(tokens) < 3 or length < 3:
        return tokens.repeat(-(-length // len(tokens)))[-length:]
    inner = tokens[1:-1].repeat(-(-length // (len(tokens) - 2)))[: length - 2]
    return torch.cat([tokens[:1], inner, tokens[-1:]])


def gradients(model: FederatedModel, sent: Broadcast, batch: Batch, packed: bool = False) -> dict[str, Tensor]:
    """Return the gradients of one client alone, as local training computes them, its rows packed or padded."""
    model.load(sent)
    chosen = model.trainable(sent.recipe)
    model.model.eval()
    try:
        torch.autograd.backward(client_losses(model, batch, packed=packed).sum())
        return {name: _grad(p) for name, p in chosen.items()}
    finally:
        # A pass that breaks off leaves nothing to the first step of training either.
        for p in chosen.values():
            p.requires_grad_(False)
            p.grad = None


def _grad(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    return torch.zeros_like(parameter) if grad is None else grad.detach().float().clone()


def apart(alone: Mapping[str, Tensor], together: Mapping[str, Tensor]) -> float:
    """Return ‖g − g'‖ / ‖g‖ over all tensors; 0 where both are zero."""
    difference = sum(float((alone[name] - together[name]).square().sum()) for name in alone)
    whole = sum(float(grad.square().sum()) for grad in alone.values())
    return (difference / whole) ** 0.5 if whole else float(difference > 0)
