"""The memory of one training step, computed from the base's configuration: for devices that are not at hand.

A skeleton without values (torch's device `meta`) goes through a forward pass with its adapters, and every tensor that
autograd keeps for the backward pass is counted, each storage once. What else a step needs is added as terms. With
checkpointing only every block's input is kept, and the tensors of one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedspan.models.build import attach
from fedspan.models.loading import read_config, seeded, skeleton
from fedspan.models.selection import linear_layers

_NF4_BYTES = 0.5 + 4 / 64
"""Of one weight: four bits, and a float32 scale for every block of 64."""
_INT8_BYTES = 1.0
_TRAINED = 4 * 4
"""Bytes of one trained number: itself, its gradient and AdamW's two moments, in float32."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """The terms of a training step's memory, in bytes."""

    base: int
    """The frozen base."""
    adapters: int
    """Factors, their gradients and the optimizer's state."""
    kept: int
    """Kept for the backward pass from its beginning."""
    block: int
    """With checkpointing: the tensors of the block that is computed again; otherwise 0."""
    passing: int
    """Gradients of the largest activations, or of the logits, and one dequantised weight."""

    @property
    def total(self) -> int:
        """All of them, in bytes."""
        return self.base + self.adapters + self.kept + self.block + self.passing


def step_memory(
    base: str | Any,
    *,
    rank: int,
    batch_size: int,
    tokens: int,
    dtype: str = "float32",
    quantise: str = "none",
    checkpointing: bool = False,
) -> StepMemory:
    """Return the memory of one step of a causal language model with adapters on all linear layers.

    Parameters
    ----------
    base
        The name of a base, of which the configuration is read, or a configuration of transformers.
    tokens
        Length of every row; all of its tokens are learnt from, which is the most that there can be.
    dtype, quantise
        As under `[model]`.

    Raises
    ------
    FedspanError
        When the configuration cannot be read.
    """
    config = read_config(base) if isinstance(base, str) else base
    plain, model = _skeleton(config, getattr(torch, dtype), rank)
    counted = _Kept.of(model, torch.zeros(batch_size, tokens, dtype=torch.int64, device="meta"))
    held = [_bytes(name, p, plain, quantise) for name, p in model.named_parameters() if ".lora_" not in name]
    trained = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    block = max(counted.blocks, default=0) if checkpointing else 0
    kept = counted.outside + (sum(counted.inputs) if checkpointing else sum(counted.blocks))
    largest_weight = max(p.numel() for p in plain.values()) * torch.finfo(getattr(torch, dtype)).bits // 8
    # The last of these, once the backward pass has left the output layer.
    inside = 2 * counted.largest + (largest_weight if quantise != "none" else 0)
    return StepMemory(int(sum(held)), _TRAINED * trained, kept, block, max(inside, counted.logits))


def _skeleton(config: Any, dtype: torch.dtype, rank: int) -> tuple[dict[str, Tensor], Any]:
    """Return the weights of the adapted layers by name, and a model without values, with adapters in float32."""
    base = skeleton(config, dtype)
    with seeded("adapter"), torch.device("meta"):
        targets = linear_layers(base, ())
        weights: dict[str, Any] = {f"{name}.weight": layer.weight for name, layer in targets.items()}
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        model, layers = attach(base, targets, rank, False, 0.0)
    for layer in layers.values():
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            # In float32, whatever the base's type is.
            factor.weight = nn.Parameter(torch.empty_like(factor.weight, dtype=torch.float32))
    model.train()
    return weights, model


def _bytes(name: str, parameter: Tensor, adapted: dict[str, Tensor], quantise: str) -> float:
    """Return the bytes of one frozen weight; linear layers beside the output layer are quantised."""
    if name.replace(".base_layer.", ".") in adapted and quantise != "none":
        return parameter.numel() * (_NF4_BYTES if quantise == "nf4" else _INT8_BYTES)
    return float(parameter.numel() * parameter.element_size())


@dataclass(slots=True)
class _Kept:
    """Counts the bytes that autograd keeps in a pass, block by block."""

    blocks: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    """Of each block."""
    outside: int = 0
    largest: int = 0
    """The largest tensor that is kept."""
    logits: int = 0
    """Gradients of the logits, in their own type and in float32, beside the logits themselves."""
    _seen: dict[int, Tensor] = field(default_factory=dict)
    _inside: bool = False

    @classmethod
    def of(cls, model: Any, ids: Tensor) -> _Kept:
        counted = cls()
        for parameter in model.parameters():
            counted._seen[_storage(parameter)] = parameter
        handles: list[Any] = []
        for layer in _blocks(model):
            handles.append(layer.register_forward_pre_hook(counted._enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(counted._leave))
        try:
            with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(counted._save, lambda x: x):
                # A mask of its own, since transformers would look at values to see whether one is needed.
                mask = torch.ones(1, 1, *2 * ids.shape[1:], dtype=torch.bool, device=ids.device)
                counted._seen[_storage(mask)] = mask
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        finally:
            for handle in handles:
                handle.remove()
        counted.logits = logits.numel() * (2 * logits.element_size() + 4)
        return counted

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        hidden = args[0] if args else options["hidden_states"]
        self.inputs.append(hidden.numel() * hidden.element_size())
        self.blocks.append(0)
        self._inside = True

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside = False

    def _save(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key in self._seen:
            return tensor
        self._seen[key] = tensor  # held, so that no other tensor takes its place
        size = tensor.untyped_storage().nbytes()
        if self._inside:
            self.blocks[-1] += size
            self.largest = max(self.largest, size)
        else:
            self.outside += size
        return tensor


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps what a fused kernel keeps: its inputs and its output, never all the weights."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            apply: Callable[..., Tensor] = _Attention.apply  # torch gives it no type
            return apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Return the layers of the model: its longest list of modules."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])
