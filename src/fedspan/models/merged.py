"""Adapters folded into the base while nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.models.experts import AdaptedExperts, Expert
from fedspan.models.federated_model import FederatedModel
from fedspan.models.layers import base_layer, factors_of, is_conv1d

LARGEST = 2**25
"""Entries of all adapted weights together up to which folding pays: it costs a copy of them, in memory and time, and
saves two products of three in every layer."""


@contextmanager
def merged(model: FederatedModel) -> Iterator[None]:
    """Run the model with W + s·B·A as one weight; up to rounding its layers compute the same in three products.

    Nothing of the model is written to. A base in a coarser type or in few bits keeps its adapters beside it, because
    the sum would be rounded to that type; so do large bases, where the adapters' share of the work is small and the
    copy is not.
    """
    held = model.layers.items() if model.trains == "adapter" else ()
    adapted = {name: base_layer(layer) for name, layer in held if not isinstance(layer, Expert)}
    small = sum(layer.weight.numel() for layer in adapted.values()) <= LARGEST
    if not small or any(layer.weight.dtype != torch.float32 for layer in adapted.values()):
        adapted = {}
    groups = [layer for layer in model.model.modules() if isinstance(layer, AdaptedExperts)]
    originals = {name: model.model.get_submodule(name) for name in adapted}
    try:
        for name, layer in adapted.items():
            model.model.set_submodule(name, _with_weight(layer, _sum(layer, model.layers[name])))
        with ExitStack() as stack:
            for group in groups:
                stack.enter_context(group.folded())
            yield
    finally:
        for name, layer in originals.items():
            model.model.set_submodule(name, layer)


@torch.no_grad()
def _sum(layer: Any, adapted: Any) -> Tensor:
    a, b = factors_of(adapted)
    (scaling,) = adapted.scaling.values()
    scaled = b * scaling
    weight: Tensor = layer.weight
    return torch.addmm(weight, a.T, scaled.T) if is_conv1d(layer) else torch.addmm(weight, scaled, a)


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return the layer with another weight; everything else is shared."""
    other = copy.copy(layer)
    other._parameters = {**layer._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return other
