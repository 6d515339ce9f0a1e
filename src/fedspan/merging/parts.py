"""The parts of a merged adapter: updates in common form, averaged whole weights, and the common configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedspan.adapters.lora_config import CARRIED
from fedspan.adapters.state_dict import Adapter
from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Factors
from fedspan.support.errors import FedspanError


def delta_of(f: Factors) -> LowRank:
    """Return s·B·A in float64 where the file has it, in float32 otherwise."""
    delta = f.delta()
    dtype = torch.promote_types(delta.b.dtype, delta.a.dtype)
    return LowRank(delta.b.to(dtype), delta.a.to(dtype))


def largest_rank(adapters: Sequence[Adapter]) -> int:
    """Return the largest rank of any module of the adapters."""
    return max(f.rank for adapter in adapters for f in adapter.factors.values())


def mean_delta(adapters: Sequence[Adapter], shares: Sequence[float], module: str) -> LowRank:
    """Return T = Σ p_k s_k B_k A_k of one module."""
    return lowrank.stack([delta_of(adapter.factors[module]) for adapter in adapters], shares)


def whole_weights(labels: Sequence[str], adapters: Sequence[Adapter], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged whole weights, of these means; those that are bitwise equal everywhere stay so."""
    dense: dict[str, Tensor] = {}
    for name, tensor in adapters[0].dense.items():
        odd = [label for label, x in zip(labels, adapters, strict=True) if not torch.equal(x.dense[name], tensor)]
        if not odd:
            dense[name] = tensor
        elif tensor.is_floating_point():
            dense[name] = means[name]
        else:
            raise FedspanError(f"{odd[0]}: {name} is {tensor.dtype} and differs from {labels[0]}'s: expected equality")
    return dense


def frozen_weights(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Return the weights of the base that any adapter saves beside an adapted embedding."""
    return {name: tensor for adapter in adapters for name, tensor in adapter.frozen.items()}


def common_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the entries of the configuration that the merged adapter keeps."""
    first = adapters[0].config
    saved = dict.fromkeys(name for adapter in adapters for name in adapter.modules_to_save)
    config = {key: first[key] for key in CARRIED if first.get(key) is not None}
    return {
        **config,
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "task_type": next((t for a in adapters if (t := a.config.get("task_type"))), None),
        "modules_to_save": list(saved),
        "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
        **({"target_parameters": list(first["target_parameters"])} if adapters[0].stacks else {}),
    }
