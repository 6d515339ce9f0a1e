"""Access to one layer: its orientation, its adapter, and a patch beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.methods.messages import Factors
from fedspan.methods.patches import Patch, patch_tensors

_SLOT = "default"
"""PEFT's name for the one adapter that is ever attached."""


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether it is GPT-2's linear layer, which stores its weight as (n, m)."""
    return type(layer).__name__ == "Conv1D"


def base_layer(layer: Any) -> Any:
    """Return the plain layer inside a PEFT layer, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def shape_of(layer: Any) -> tuple[int, int]:
    """Return (m, n) = (out_features, in_features), whichever way the layer stores its weight."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features  # a quantised weight has no such shape
    rows, columns = layer.weight.shape
    return (columns, rows) if is_conv1d(layer) else (rows, columns)


def factors_of(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return (A, B) of a PEFT layer: the parameters themselves, not copies."""
    return layer.lora_A[_SLOT].weight, layer.lora_B[_SLOT].weight


def dropout_of(layer: Any) -> float:
    """Return the share of a PEFT layer's input that its adapter drops in training."""
    return float(getattr(layer.lora_dropout[_SLOT], "p", 0.0))


def set_adapter(layer: Any, factors: Factors) -> None:
    """Give the layer new parameters on its device, of any rank, so that nothing of the client before is left."""
    device = base_layer(layer).weight.device
    layer.lora_A[_SLOT].weight = nn.Parameter(factors.a.detach().float().to(device, copy=True))
    layer.lora_B[_SLOT].weight = nn.Parameter(factors.b.detach().float().to(device, copy=True))
    layer.r[_SLOT] = factors.rank
    layer.scaling[_SLOT] = factors.scaling


def read_adapter(layer: Any) -> Factors:
    """Return a copy of the layer's adapter."""
    a, b = factors_of(layer)
    return Factors(b.detach().cpu().clone(), a.detach().cpu().clone(), layer.scaling[_SLOT])


def beside(patch: Patch, device: torch.device) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that adds x·ΔWᵀ to the layer's output in float32, for a base in a coarser type."""
    moved = [factor.float().to(device) for factor in patch_tensors(patch).values()]

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        extra = inputs[0].float()
        for factor in reversed(moved):  # x Aᵀ Bᵀ: the m×n product is never formed
            extra = extra @ factor.T
        return (output.float() + extra).to(output.dtype)

    return hook


def in_float32(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the output of a half-precision body for a head that is trained in float32; a forward pre-hook."""
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def output_in(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """Return a forward hook that converts a layer's output to the type of the layers around it."""

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output

    return hook


def inputs_in(
    dtype: torch.dtype,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return a forward pre-hook that converts a model's inputs, for convolutions that take no other type."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    return hook
