"""The lowest layers of a base, where nothing is trained: their output is computed once for each example and kept.

With adapters in the upper layers alone (`adapter.layers`), layers 0 to k − 1 give the same hidden states for a row in
every step, provided that nothing in them is dropped at random. The pass of a batch then begins at layer k, with the
rows' kept states in place of its input. A row's states are computed by themselves, without padding: they depend on
nothing but the row, so that neither the batch in which it first occurs, nor the process, nor which rows there is room
for changes a bit of a run. They differ from those of a whole batch by rounding.

Embeddings, masks and positions are computed as always; only the calls of the layers below k are left out.

Shapes: b rows of t tokens or patches, padded on the right; t_i of row i; h the width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.methods.messages import Recipe
from fedspan.models.blocks import BLOCK_ERRORS, NotApplicable, blocks_of, hidden_of, place_of, with_hidden
from fedspan.models.federated_model import FederatedModel
from fedspan.models.loading import seeded
from fedspan.models.losses import client_losses, pass_inputs

_PER_TOKEN = ("input_ids", "token_type_ids", "attention_mask")
_CLOSE = 1e-3
"""Largest relative difference of a loss between the two ways; wider types differ by less, bfloat16 by about this."""


class _Reached(Exception):
    """Ends a pass once the input of layer k is known."""


@dataclass(slots=True)
class FrozenPrefix:
    """The lowest layers of one base, and the hidden states above them of the rows that have occurred."""

    model: FederatedModel
    below: Sequence[nn.Module]
    """Layers 0 to k − 1."""
    first: nn.Module
    """Layer k."""
    room: int
    """Bytes that the states may take."""
    returns: Sequence[Callable[[Tensor], Any]] = ()
    """For each layer below, the form in which it returns hidden states."""
    held: dict[Any, Tensor] = field(default_factory=dict)
    """Precision and digest of a row -> its states (t_i, h)."""
    used: int = 0
    on: bool = False
    """A training pass is under way."""

    @contextmanager
    def training(self) -> Iterator[None]:
        """Leave the lowest layers out of the passes inside."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    @contextmanager
    def reading(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Begin the pass of this batch at layer k, with the states of its rows."""
        if not self.on:
            yield
            return
        states = [self._states(row) for row in _rows(batch)]
        for layer, form in zip(self.below, self.returns, strict=True):
            layer.forward = partial(_skipped, form)
        handle = self.first.register_forward_pre_hook(partial(_replaced, states), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            for layer in self.below:
                vars(layer).pop("forward", None)  # which uncovers the method of its class

    def _states(self, row: Mapping[str, Tensor]) -> Tensor:
        """Return the states of one row, (t_i, h); kept while there is room."""
        digest = hashlib.sha256()
        for name, value in sorted(row.items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.contiguous().numpy().tobytes())
        key = (self.model.products, digest.digest())
        kept = self.held.get(key)
        if kept is None:
            kept = self.compute(row)[0]
            size = kept.numel() * kept.element_size()
            if self.used + size <= self.room:
                self.held[key] = kept
                self.used += size
        return kept

    @torch.no_grad()
    def compute(self, row: Mapping[str, Tensor]) -> Tensor:
        """Return the input of layer k for a row without padding, (1, t_i, h)."""
        return input_of(self.model, self.first, row)


def find(model: FederatedModel, example: Mapping[str, Tensor], megabytes: int) -> FrozenPrefix | None:
    """Return the lowest layers that nothing is trained in; None where there are none.

    Parameters
    ----------
    example
        A batch of two rows of the data, on which it is tried.
    megabytes
        Room for the states of rows.

    Raises
    ------
    NotApplicable
        Where there are such layers, but their output is not the same in every step, or cannot be put in.
    """
    found = _blocks(model)
    if found is None or not megabytes:
        return None
    blocks, k = found
    prefix = FrozenPrefix(model, blocks[:k], blocks[k], megabytes * 2**20)
    if model.places:
        raise NotApplicable("the base's layers lie on several devices")
    if model.device.type != "cpu":
        raise NotApplicable("steps on a GPU have fixed shapes")
    if model.padding_matters:
        raise NotApplicable("padding changes this model's results")
    if getattr(model.model.config, "is_encoder_decoder", False):
        raise NotApplicable("the base has an encoder and a decoder")
    try:
        _check_frozen(prefix, example)
        prefix.returns = _forms(prefix, example)
        _check_same(prefix, example)
    except BLOCK_ERRORS:
        raise NotApplicable("its layers do not take the hidden states of the layer before alone") from None
    return prefix


def input_of(model: FederatedModel, layer: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the hidden states that a layer receives in a pass over a batch, (b, t, h); the pass ends there."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append(hidden_of(args, options))
        raise _Reached

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model.model(**pass_inputs(model, batch))
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise ValueError("the layer was not reached")


def _blocks(model: FederatedModel) -> tuple[Sequence[nn.Module], int] | None:
    """Return the list of layers that all adapters are in, and the lowest with an adapter, where it is not the first."""
    if model.trains != "adapter":
        return None
    found = [place_of(name) for name in model.layers]
    places = [place for place in found if place is not None]
    lowest = min((number for _, number in places), default=0)
    if len(places) < len(found) or lowest == 0:
        return None
    blocks = blocks_of(model.model, (path for path, _ in places))
    return None if blocks is None else (blocks, lowest)


def _check_frozen(prefix: FrozenPrefix, example: Mapping[str, Tensor]) -> None:
    """Check that layer k's input is the same in every step of training."""
    model = prefix.model
    model.trainable(Recipe())
    with model.training():
        seen = []
        for number in range(2):
            with seeded("prefix", number):
                seen.append(input_of(model, prefix.first, example))
    if seen[0].requires_grad:
        raise NotApplicable("weights below them are trained")
    if not torch.equal(seen[0], seen[1]):
        raise NotApplicable("the base drops at random there; model.dropout = false turns that off")


def _forms(prefix: FrozenPrefix, example: Mapping[str, Tensor]) -> list[Callable[[Tensor], Any]]:
    """Return the form in which each layer below k returns hidden states."""
    forms: list[Callable[[Tensor], Any]] = []

    def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            forms.append(_as_it_is)
        elif type(output) is tuple and isinstance(output[0], Tensor) and all(x is None for x in output[1:]):
            forms.append(partial(_in_tuple, len(output)))
        else:
            raise TypeError(type(output).__name__)

    handles = [layer.register_forward_hook(hook) for layer in prefix.below]
    try:
        with torch.no_grad():
            prefix.compute(next(_rows(example)))
    finally:
        for handle in handles:
            handle.remove()
    return forms


def _check_same(prefix: FrozenPrefix, example: Mapping[str, Tensor]) -> None:
    """Check that the loss of a batch is the same from the states that are put in: later layers see nothing else."""
    model = prefix.model
    model.model.eval()
    with torch.no_grad():
        whole = client_losses(model, example)
        model.prefix = prefix
        try:
            with prefix.training():
                begun = client_losses(model, example)
        finally:
            model.prefix = None
    if not torch.allclose(whole, begun, rtol=_CLOSE):
        raise ValueError("another loss")
    prefix.held.clear()
    prefix.used = 0


def _rows(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield every row of a batch without padding, as a batch of one; labels are left out."""
    names = [name for name in batch if name in _PER_TOKEN or name == "pixel_values"]
    for i in range(len(batch["labels"])):
        row = {name: batch[name][i : i + 1] for name in names}
        if "attention_mask" in row:
            length = int(row["attention_mask"].sum())
            row = {name: value[:, :length] for name, value in row.items()}
        yield row


def _skipped(form: Callable[[Tensor], Any], *args: Any, **options: Any) -> Any:
    return form(hidden_of(args, options))


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def _in_tuple(length: int, hidden: Tensor) -> tuple[Any, ...]:
    return (hidden, *[None] * (length - 1))


def _replaced(
    states: Sequence[Tensor], layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the rows' states in place of a layer's input; zeros where rows are padded, which nothing looks at."""
    given = hidden_of(args, options)
    hidden = given.new_zeros(given.shape)
    for row, state in zip(hidden, states, strict=True):
        row[: len(state)] = state
    return with_hidden(args, options, hidden)
