"""Adapters of unlike make-up brought to one: the same base by name, the same modules, the same whole weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from fedspan.adapters.compatibility import Missing
from fedspan.adapters.state_dict import Adapter
from fedspan.methods.messages import Factors
from fedspan.support.errors import FedspanError


def check_missing(missing: str) -> None:
    """Refuse a value of `missing` that is none."""
    if missing not in get_args(Missing):
        raise FedspanError(f"missing = {missing!r}: expected {' or '.join(map(repr, get_args(Missing)))}")


def of_base(adapters: Sequence[Adapter], base: str | None) -> list[Adapter]:
    """Return the adapters as ones of this base, whatever name they have for it; without a base as they are."""
    if base is None:
        return list(adapters)
    dropped = {"revision"}  # of the other name
    named = {"base_model_name_or_path": base}
    return [replace(a, config={k: v for k, v in a.config.items() if k not in dropped} | named) for a in adapters]


def filled(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[Adapter]:
    """Return the adapters with what some of them lack.

    A module that an adapter does not adapt gets factors of zeros: it left the base's weight as it is, so that is
    exactly its change. A whole weight that it does not save gets the weighted mean of those that are saved: the base's
    own is in no adapter, so the result is the mean over those that have one.
    """
    _check_experts(adapters)
    zeros = _zeros(adapters)
    embeddings = frozenset().union(*(a.embeddings for a in adapters))
    means = _means(adapters, weights)
    whole: dict[str, Any] = {}
    if any(bool(a.config.get("fan_in_fan_out")) for a in adapters):
        # An adapter of embeddings alone does not say how the linear layers are stored.
        whole["fan_in_fan_out"] = True
    result = []
    for a in adapters:
        factors = {name: a.factors.get(name, zero) for name, zero in zeros.items()}
        dense = {name: a.dense.get(name, mean) for name, mean in means.items()}
        result.append(Adapter(factors, dense, {**a.config, **whole}, embeddings, a.frozen, a.stacks))
    return result


def _check_experts(adapters: Sequence[Adapter]) -> None:
    """Refuse to fill in experts: which parameter a path is for depends on the others that are adapted beside it."""
    if any(dict(a.stacks) != dict(adapters[0].stacks) for a in adapters):
        raise FedspanError("missing = 'zero': the adapters adapt other experts: expected the same target_parameters")


def _zeros(adapters: Sequence[Adapter]) -> dict[str, Factors]:
    """Return zero factors of every module, of the rank and scaling of the first adapter that has it."""
    zeros: dict[str, Factors] = {}
    for adapter in adapters:
        for name, f in adapter.factors.items():
            if name not in zeros:
                # A is kept: rules that need one A of all adapters find it, and B·A is zero anyway.
                zeros[name] = Factors(f.b.new_zeros(f.b.shape), f.a, f.scaling)
    return zeros


def _means(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    held: dict[str, list[tuple[float, Tensor]]] = {}
    for weight, adapter in zip(weights, adapters, strict=True):
        for name, tensor in adapter.dense.items():
            held.setdefault(name, []).append((weight, tensor))
    return {name: _mean(name, pairs) for name, pairs in held.items()}


def _mean(name: str, pairs: Sequence[tuple[float, Tensor]]) -> Tensor:
    first = pairs[0][1]
    if odd := [t for _, t in pairs if t.shape != first.shape]:
        raise FedspanError(f"{name} is {tuple(odd[0].shape)} and {tuple(first.shape)}: expected one shape")
    if len(pairs) == 1 or not first.is_floating_point():
        return first  # whole numbers that differ are refused when they are put together
    total = sum(weight for weight, _ in pairs)
    return sum(((weight / total) * t.double() for weight, t in pairs), first.double() * 0).to(first.dtype)
