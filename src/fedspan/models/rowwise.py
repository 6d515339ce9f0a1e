"""A proof by values that a model computes every row of a batch as it would alone.

No model declares it, and shapes do not show it: where there are as many rows as tokens, a layer that holds the tokens
first looks like one that holds the rows first. So a few rows with different adapters are trained in one pass, at
several lengths and with padding, and every client's gradients are compared with those of its own rows alone.

Shapes: C clients of b rows each; t tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedspan.data import Encoded
from fedspan.data.encoded import IGNORED
from fedspan.methods.messages import Broadcast, Factors, Recipe
from fedspan.models.federated_model import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.models.stacked import Stack, head_layers, stacked
from fedspan.models.streams import NotRowwise
from fedspan.support.errors import FedspanError, first_line
from fedspan.support.seeding import generator

_CLOSE = {torch.float32: 2e-3, torch.float64: 2e-3}
_COARSE = 0.1
"""Largest relative difference of a client's gradient: rounding is far below it, and another client's row far above."""
Batch = Mapping[str, Tensor]


def reason_against(model: FederatedModel, data: Encoded, num_clients: int, rows: int) -> str | None:
    """Return why rows of different adapters cannot share a pass, or None where their gradients were found to be right.

    Parameters
    ----------
    data
        Examples to take the first and the last rows of.
    num_clients, rows
        C and b. Text is tried with as many tokens as there are rows, and with more.

    Adapter and dense weights are afterwards what they were; a patch is gone.
    """
    if model.experts:
        return "experts compute the tokens of all rows together (adapter.target_parameters)"
    try:
        head_layers(model)
    except FedspanError as error:
        return str(error)
    before = Broadcast(model.adapter(), dense=model.dense(), recipe=Recipe())
    try:
        return _differences(model, data, num_clients, rows)
    finally:
        model.load(before)


def _differences(model: FederatedModel, data: Encoded, num_clients: int, rows: int) -> str | None:
    """Return why gradients of several adapters in one pass are not those of each alone, None where they are."""
    sent = [_broadcast(model, k) for k in range(num_clients)]
    for batch in _batches(data, num_clients, rows):
        moved = {name: value.to(model.device) for name, value in batch.items()}
        try:
            alone = [_alone(model, sent[k], _own(moved, k, num_clients)) for k in range(num_clients)]
            together = _together(model, sent, moved)
        except NotRowwise as error:
            return str(error)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            return f"the model cannot compute several adapters in one pass ({first_line(error).partition('. ')[0]})"
        worst = max(_apart(x, y) for x, y in zip(alone, together, strict=True))
        if not worst <= _tolerance(model):
            return f"the model mixes the rows of a batch: gradients differ by {100 * worst:.2g} % from those alone"
    return None


def _tolerance(model: FederatedModel) -> float:
    kinds = {p.dtype for p in model.model.parameters() if p.is_floating_point()}
    return max(_CLOSE.get(kind, _COARSE) for kind in kinds)


def _broadcast(model: FederatedModel, client: int) -> Broadcast:
    """Return an adapter of its own for each client, in which both factors count."""
    rng = generator("rowwise", client)
    adapter = {}
    for name, held in model.adapter().items():
        b = torch.randn(held.b.shape, generator=rng) / held.rank**0.5
        a = torch.randn(held.a.shape, generator=rng) / held.a.shape[1] ** 0.5
        adapter[name] = Factors(b, a, 0.25)
    dense = {name: t + 0.05 * torch.randn(t.shape, generator=rng) for name, t in model.dense().items()}
    return Broadcast(adapter, dense=dense, recipe=Recipe())


def _batches(data: Encoded, num_clients: int, rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of C·b rows: of as many tokens, of more with padding; images as they are."""
    count = num_clients * rows
    places = [0, len(data) - 1]
    batch = data.batch([places[i % 2] for i in range(count)])
    if "input_ids" not in batch:
        yield batch
        return
    for length, shorter in ((count, 0), (count + 3, 2)):
        yield _of_length(batch, length, shorter, rows, data)


def _of_length(batch: Batch, length: int, shorter: int, rows: int, data: Encoded) -> dict[str, Tensor]:
    """Return the batch with rows of `length` tokens, the first client's `shorter` by that much and padded."""
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


def _own(batch: Batch, client: int, num_clients: int) -> dict[str, Tensor]:
    """Return one client's rows, without padding that they all have."""
    rows = len(batch["labels"]) // num_clients
    own = {name: value[client * rows : (client + 1) * rows] for name, value in batch.items()}
    if "attention_mask" not in own:
        return own
    length = int(own["attention_mask"].sum(dim=1).max())
    return {name: value[:, :length] if value.ndim == 2 else value for name, value in own.items()}


def _alone(model: FederatedModel, sent: Broadcast, batch: Batch) -> dict[str, Tensor]:
    """Return the gradients of one client alone, as local training computes them."""
    model.load(sent)
    chosen = model.trainable(sent.recipe)
    model.model.eval()
    torch.autograd.backward(client_losses(model, batch).sum())
    grads = {name: _grad(p) for name, p in chosen.items()}
    for p in chosen.values():
        p.requires_grad_(False)
        p.grad = None
    return grads


def _grad(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    return torch.zeros_like(parameter) if grad is None else grad.detach().float().clone()


def _together(model: FederatedModel, sent: list[Broadcast], batch: Batch) -> list[dict[str, Tensor]]:
    """Return every client's gradients from one pass over all of them."""
    with stacked(model, sent) as stack, _without_dropout(stack):
        model.model.eval()
        stack.activate(len(sent))
        grads = stack.trained.grads
        assert grads is not None
        grads.zero_()
        torch.autograd.backward(client_losses(model, batch, len(sent)).sum())
        stack.gather_gradients()
        return [_by_name(stack, k) for k in range(len(sent))]


@contextmanager
def _without_dropout(stack: Stack) -> Iterator[None]:
    """Keep the adapters' own dropout, which is not one of the model's layers, out of the comparison."""
    kept = [layer.dropout for layer in stack.linears.values()]
    for layer in stack.linears.values():
        layer.dropout = 0.0
    try:
        yield
    finally:
        for layer, dropout in zip(stack.linears.values(), kept, strict=True):
            layer.dropout = dropout


def _by_name(stack: Stack, client: int) -> dict[str, Tensor]:
    grads = {}
    for name in stack.trained.places:
        _, grad = stack.trained.view(name, client + 1)
        assert grad is not None
        grads[name] = grad[client].clone()
    return grads


def _apart(alone: Mapping[str, Tensor], together: Mapping[str, Tensor]) -> float:
    """Return ‖g − g'‖ / ‖g‖ over all tensors; 0 where both are zero."""
    apart = sum(float((alone[name] - together[name]).square().sum()) for name in alone)
    whole = sum(float(grad.square().sum()) for grad in alone.values())
    return (apart / whole) ** 0.5 if whole else float(apart > 0)
