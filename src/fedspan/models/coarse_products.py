"""Matrix products of a frozen float32 base in bfloat16; adapters, heads, activations and the loss stay in float32.

A processor with instructions for bfloat16 multiplies it several times as fast as float32. The weights are rounded once
and kept beside the float32 ones, which evaluation uses: a run's base, its digest and its figures are those of float32.
In training every frozen linear layer computes y = bf16(x) bf16(W)ᵀ + b, and its backward pass bf16(g) bf16(W), each
rounded to bfloat16 and returned as float32. The output layer stays in float32, for the sake of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedspan.models.federated_model import FederatedModel
from fedspan.models.layers import base_layer, is_conv1d


def frozen_linears(model: FederatedModel) -> dict[str, Any]:
    """Return the linear layers of the base, in float32, that nothing trains: all but heads and the output layer."""
    trained = {id(p) for p in model.dense_parameters.values()}
    base: Any = model.model
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return {
        name: layer
        for name, layer in base.named_modules()
        if (type(layer) is nn.Linear or is_conv1d(layer))
        and ".lora_" not in name
        and layer is not output
        and layer.weight.dtype == torch.float32
        and id(layer.weight) not in trained
    }


@contextmanager
def products_in(model: FederatedModel, dtype: torch.dtype) -> Iterator[None]:
    """Compute the products of the frozen layers in this type inside; in float32 nothing changes.

    A patch on the base is then added beside the layers in float32: in the rounded weights it would be lost.
    """
    if dtype == torch.float32:
        yield
        return
    rounded = rounded_weights(model, dtype)
    model.products = dtype
    try:
        for layer, weight in rounded:
            layer.forward = partial(_product, layer, weight)
        yield
    finally:
        model.products = torch.float32
        for layer, _ in rounded:
            vars(layer).pop("forward", None)  # which uncovers the method of its class


def rounded_weights(model: FederatedModel, dtype: torch.dtype) -> list[tuple[Any, Tensor]]:
    """Return the frozen layers with their untouched weights in this type, (m, n); made once for each device.

    Made before other processes are started, they are in memory once.
    """
    if not model.rounded or any(kept.device != layer.weight.device for layer, kept in model.rounded):
        # Before any layer is replaced by one of many clients.
        names = {id(base_layer(layer)): name for name, layer in model.layers.items()}
        model.rounded = []
        for layer in frozen_linears(model).values():
            weight = model.untouched_weight(names.get(id(layer), ""), layer)
            kept = (weight.T if is_conv1d(layer) else weight).detach().to(dtype).contiguous()
            model.rounded.append((layer, kept))
    return model.rounded


def _product(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    y = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if layer.bias is None else y + layer.bias
