"""Checks that adapter folders belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from fedspan.adapters.state_dict import Adapter
from fedspan.support.errors import FedspanError

Missing = Literal["refuse", "zero"]
"""The treatment of modules and whole weights that only some adapters have."""


def check_compatible(labels: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that cannot be averaged: other bases, modules, shapes or whole weights.

    Raises
    ------
    FedspanError
        Naming, by its label, the first adapter that differs from the first of all, and the difference.
    """
    first = adapters[0]
    for label, adapter in zip(labels[1:], adapters[1:], strict=True):
        if _base(adapter) != _base(first):
            bases = f"{label} adapts {_base(adapter)!r}, {labels[0]} adapts {_base(first)!r}"
            raise FedspanError(
                f"{bases}: expected one base model, or --base NAME (base=NAME) where these are names of one"
            )
        _same_names(label, labels[0], "adapts other modules", adapter.factors, first.factors)
        _same_names(label, labels[0], "saves other whole weights", adapter.dense, first.dense)
        _same_shapes(label, labels[0], _deltas(adapter), _deltas(first))
        _same_shapes(label, labels[0], _shapes(adapter), _shapes(first))
        _same_frozen(label, labels[0], adapter, first)
        _same_stacks(label, labels[0], adapter, first)
        for what in ("embeddings", "fan_in_fan_out", "ensure_weight_tying"):
            mine, theirs = _trait(adapter, what), _trait(first, what)
            if mine != theirs:
                raise FedspanError(f"{label}: {what} is {mine!r}: expected {theirs!r}, as in {labels[0]}")
    _check_tasks(labels, adapters)


def _check_tasks(labels: Sequence[str], adapters: Sequence[Adapter]) -> None:
    # An adapter made without a task type fits them all.
    tasks = {a.config.get("task_type"): label for label, a in zip(labels, adapters, strict=True)}
    tasks.pop(None, None)
    if len(tasks) > 1:
        given = " and ".join(f"{task!r} in {label}" for task, label in tasks.items())
        raise FedspanError(f"task_type is {given}: expected one")


def _deltas(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: (f.b.shape[0], f.a.shape[1]) for name, f in adapter.factors.items()}


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()}


def _same_shapes(
    label: str, first: str, mine: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in mine.items():
        if shape != theirs[name]:
            raise FedspanError(f"{label}: {name} is {shape}: expected {theirs[name]}, as in {first}")


def _same_frozen(label: str, first_label: str, adapter: Adapter, first: Adapter) -> None:
    for name, tensor in adapter.frozen.items():
        if not torch.equal(tensor, first.frozen.get(name, tensor)):
            raise FedspanError(f"{label}: the base's {name} is not that of {first_label}: expected one base")


def _same_stacks(label: str, first_label: str, adapter: Adapter, first: Adapter) -> None:
    """Refuse experts of other parameters: PEFT's paths say their place in a module, not their names."""
    mine, theirs = (sorted(a.config.get("target_parameters") or ()) if a.stacks else [] for a in (adapter, first))
    if mine != theirs or dict(adapter.stacks) != dict(first.stacks):
        raise FedspanError(f"{label}: target_parameters is {mine}: expected {theirs}, as in {first_label}")


def _base(adapter: Adapter) -> str | None:
    revision = adapter.config.get("revision")
    return f"{adapter.base_model}@{revision}" if revision not in (None, "main") else adapter.base_model


def _trait(adapter: Adapter, what: str) -> Any:
    if what == "embeddings":
        return sorted(adapter.embeddings)
    return bool(adapter.config.get(what))


def _same_names(label: str, first: str, problem: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    odd = sorted(mine.keys() ^ theirs.keys())
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise FedspanError(
            f"{label} {problem} than {first} ({', '.join(odd[:3])}{more}): expected the same ones, "
            "or --missing zero (missing='zero')"
        )
