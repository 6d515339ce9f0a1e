"""A proof by values that a model computes every row of a batch as it would alone.

No model declares it, and shapes do not show it: where there are as many rows as tokens, a layer that holds the tokens
first looks like one that holds the rows first. So a few rows with different adapters are trained in one pass, at
several lengths and with padding, and every client's gradients are compared with those of its own rows alone.

Shapes: C clients of b rows each; t tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Recipe
from fedspan.models.blocks import BLOCK_ERRORS
from fedspan.models.federated_model import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.models.probes import Batch, apart, gradients, of_length, probe, tolerance
from fedspan.models.stacked import Stack, head_layers, stacked
from fedspan.models.streams import NotRowwise
from fedspan.support.errors import FedspanError, first_line


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
    sent = [probe(model, k) for k in range(num_clients)]
    for batch in _batches(data, num_clients, rows):
        moved = {name: value.to(model.device) for name, value in batch.items()}
        try:
            alone = [gradients(model, sent[k], _own(moved, k, num_clients)) for k in range(num_clients)]
            together = _together(model, sent, moved)
        except NotRowwise as error:
            return str(error)
        except BLOCK_ERRORS as error:
            return f"the model cannot compute several adapters in one pass ({first_line(error).partition('. ')[0]})"
        worst = max(apart(x, y) for x, y in zip(alone, together, strict=True))
        if not worst <= tolerance(model):
            return f"the model mixes the rows of a batch: gradients differ by {100 * worst:.2g} % from those alone"
    return None


def _batches(data: Encoded, num_clients: int, rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of C·b rows: of as many tokens, of more with padding; images as they are."""
    count = num_clients * rows
    places = [0, len(data) - 1]
    batch = data.batch([places[i % 2] for i in range(count)])
    if "input_ids" not in batch:
        yield batch
        return
    for length, shorter in ((count, 0), (count + 3, 2)):
        yield of_length(batch, length, shorter, rows, data)


def _own(batch: Batch, client: int, num_clients: int) -> dict[str, Tensor]:
    """Return one client's rows, without padding that they all have."""
    rows = len(batch["labels"]) // num_clients
    own = {name: value[client * rows : (client + 1) * rows] for name, value in batch.items()}
    if "attention_mask" not in own:
        return own
    length = int(own["attention_mask"].sum(dim=1).max())
    return {name: value[:, :length] if value.ndim == 2 else value for name, value in own.items()}


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
