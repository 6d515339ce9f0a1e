"""The adapter that a server's clients share: its modules, heads and LoRA settings, and its state dicts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedspan.adapters.peft_folder import load
from fedspan.adapters.state_dict import (
    PREFIX,
    Adapter,
    adapter_of,
    adapter_of_model,
    check_finite,
    tensors_of,
    without_adapter_name,
)
from fedspan.methods.messages import Factors, Template
from fedspan.methods.patches import Patch, patch_dense
from fedspan.support.errors import FedspanError
from fedspan.support.scalars import whole


@dataclass(frozen=True, slots=True)
class Layout:
    """The properties that all clients' adapters share: the template's shapes, names, heads and storage."""

    template: Template
    adapter_name: str = "default"
    """The adapter's name in the clients' models."""
    heads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Trained whole weights (`modules_to_save`) and their shapes."""
    modules_to_save: tuple[str, ...] = ()
    embeddings: frozenset[str] = frozenset()
    """The adapted modules that are embeddings."""
    fan_in_fan_out: bool = False
    """Base weights are stored as (in, out): GPT-2's Conv1D."""

    def read(self, where: str, state_dict: Mapping[str, Tensor]) -> tuple[Adapter, int]:
        """Return the adapter in a client's state dict, and its rank.

        Raises
        ------
        FedspanError
            When it is not of this layout, whatever its rank.
        """
        _check_state_dict(where, state_dict, "a state dict, as get_peft_model_state_dict gives it")
        if inside := [key for key in state_dict if ".parametrizations." in key]:
            raise FedspanError(f"{where}: {inside[0]!r} is of a model within `training`: expected one after it")
        tensors = {key: tensor.detach().cpu() for key, tensor in state_dict.items()}
        tensors = without_adapter_name(tensors, self.adapter_name)
        rank = next((t.shape[0] for key, t in tensors.items() if ".lora_A" in key or ".lora_embedding_A" in key), 1)
        adapter = adapter_of(where, self._config(rank), tensors)
        if odd := sorted(adapter.embeddings ^ self.embeddings):
            raise FedspanError(f"{where}: {odd[0]} is an embedding here or in the base: expected it in both")
        deltas = {name: (f.b.shape[0], f.a.shape[1]) for name, f in adapter.factors.items()}
        _same(where, "adapter", deltas, self.template.modules)
        _same(where, "whole weight", {name: tuple(t.shape) for name, t in adapter.dense.items()}, self.heads)
        return adapter, rank

    def read_gradient(self, where: str, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the adapted weights, (m, n) by module, from those by the weights' names.

        Raises
        ------
        FedspanError
            When a gradient is missing, unknown, of another shape than the weight, no floats, or not finite.
        """
        _check_state_dict(where, gradient, "gradients by the weights' names")
        modules = {self.base_name(module): module for module in self.template.modules}
        if odd := sorted(gradient.keys() ^ modules.keys()):
            problem = "is no gradient that is asked for" if odd[0] in gradient else "is missing"
            raise FedspanError(f"{where}: {odd[0]!r} {problem}: expected gradients of the {len(modules)} base weights")
        check_finite(where, gradient)
        read: dict[str, Tensor] = {}
        for key, grad in gradient.items():
            module = modules[key]
            shape = self._stored(module, self.template.modules[module])
            if tuple(grad.shape) != shape or not grad.is_floating_point():
                given = f"{tuple(grad.shape)} of {grad.dtype}"
                raise FedspanError(f"{where}: the gradient of {key!r} is {given}: expected {shape} of floats")
            grad = grad.detach().cpu()
            read[module] = grad.mT.contiguous() if self._is_transposed(module) else grad
        return {module: read[module] for module in self.template.modules}

    def base_name(self, module: str) -> str:
        """Return the name of the module's own weight in the PEFT model."""
        return f"{PREFIX}{module}.base_layer.weight"

    def write(self, factors: Mapping[str, Factors], dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of an adapter and heads, as `peft.set_peft_model_state_dict` takes it."""
        return tensors_of(factors, dense, self.embeddings)

    def base_weight(self, module: str, patch: Patch) -> tuple[str, Tensor]:
        """Return a patch as an addition to the base's weight: its name in the PEFT model, and the whole matrix."""
        delta = patch_dense(patch)
        if self._is_transposed(module):
            delta = delta.mT
        return self.base_name(module), delta.contiguous().clone()

    def factor_names(self, side: str) -> tuple[str, ...]:
        """Return the names that PEFT gives to factor "A" or "B" in this adapter."""
        names = (f"lora_{side}", f"lora_embedding_{side}")
        return names if self.embeddings else names[:1]

    def parameter_name(self, module: str, side: str) -> str:
        """Return the name of a module's factor "a" or "b" among the parameters of the PEFT model."""
        if module in self.embeddings:
            return f"{PREFIX}{module}.lora_embedding_{side.upper()}.{self.adapter_name}"
        return f"{PREFIX}{module}.lora_{side.upper()}.{self.adapter_name}.weight"

    def _is_transposed(self, module: str) -> bool:
        return self.fan_in_fan_out or module in self.embeddings

    def _stored(self, module: str, shape: tuple[int, int]) -> tuple[int, int]:
        return shape[::-1] if self._is_transposed(module) else shape

    def _config(self, rank: int) -> dict[str, Any]:
        return {
            "r": rank,
            "lora_alpha": self.template.alpha,
            "use_rslora": self.template.rslora,
            "modules_to_save": list(self.modules_to_save),
        }


def _check_state_dict(where: str, state_dict: object, expected: str) -> None:
    """Refuse anything but a mapping of dense tensors."""
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise FedspanError(f"{where}: a {kind}: expected {expected}")
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise FedspanError(f"{where}: {key!r} is a {type(tensor).__name__}: expected a tensor")
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device" if tensor.is_meta else "sparse"
            raise FedspanError(f"{where}: tensor {key!r} is {kind}: expected a dense tensor with values")


def layout_of(
    base: Any, max_rank: int | None, seed: int | None, adapter_name: str
) -> tuple[Layout, Mapping[str, Tensor]]:
    """Return the layout of a base, and the values of its heads.

    Parameters
    ----------
    base
        A PEFT model, an adapter folder, a template, or shapes by module.
    max_rank
        The template's rank; none: the base's own.
    seed
        The template's seed; none: the base's own, or 0.

    Raises
    ------
    FedspanError
        When the base is none of these, or has no one rank and scaling for all modules.
    """
    changes: dict[str, Any] = {}
    if max_rank is not None:
        changes["rank"] = max_rank = whole("max_rank", max_rank, 1)
    if seed is not None:
        changes["seed"] = whole("seed", seed, 0)
    if isinstance(base, Template | Mapping):
        return Layout(replace(_template(base, max_rank), **changes), adapter_name), {}
    adapter = load(Path(base)) if isinstance(base, str | os.PathLike) else adapter_of_model(base, adapter_name)
    return _of_adapter(adapter, changes, adapter_name), {n: t.detach().clone() for n, t in adapter.dense.items()}


def _template(base: Template | Mapping[str, tuple[int, int]], max_rank: int | None) -> Template:
    if isinstance(base, Template):
        return base
    if max_rank is None:
        raise FedspanError("base is shapes by module: expected max_rank=, the largest rank of a client, with it")
    return Template({name: _shape(name, shape) for name, shape in base.items()}, max_rank)


def _shape(name: str, given: Any) -> tuple[int, int]:
    try:
        m, n = (whole("size", size, 1) for size in given)
    except (TypeError, ValueError):
        kind = f"a {type(given).__name__}" if isinstance(given, Tensor) else repr(given)
        raise FedspanError(f"base: {name!r} has shape {kind}: expected two whole numbers, (m, n)") from None
    return m, n


def _of_adapter(adapter: Adapter, changes: Mapping[str, Any], adapter_name: str) -> Layout:
    config = adapter.config
    if adapter.stacks:
        raise FedspanError(
            f"base: target_parameters = {list(config['target_parameters'])} adapts experts, whose factors PEFT holds "
            "in one pair: expected adapters on modules, or `fedspan run` with adapter.target_parameters"
        )
    shapes = {name: (f.b.shape[0], f.a.shape[1]) for name, f in adapter.factors.items()}
    template = Template(shapes, config["r"], float(config["lora_alpha"]), bool(config.get("use_rslora")))
    for name, f in adapter.factors.items():
        if f.rank != template.rank or not math.isclose(f.scaling, template.scaling(f.rank), rel_tol=1e-9):
            raise FedspanError(
                f"base: {name} has rank {f.rank} and scaling {f.scaling:g} by a rank_pattern or alpha_pattern: "
                f"expected rank {template.rank} and scaling {template.scaling(template.rank):g} for every module"
            )
    for name, tensor in adapter.dense.items():
        if not tensor.is_floating_point():
            raise FedspanError(f"base: {name} is {tensor.dtype}: expected floating-point weights in modules_to_save")
    return Layout(
        replace(template, **changes),
        adapter_name,
        {name: tuple(tensor.shape) for name, tensor in adapter.dense.items()},
        adapter.modules_to_save,
        adapter.embeddings,
        bool(config.get("fan_in_fan_out")),
    )


def _same(where: str, what: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    odd = sorted(given.keys() ^ expected.keys())
    if odd:
        problem = "missing" if odd[0] in expected else "not the server's"
        raise FedspanError(f"{where}: the {what} of {odd[0]} is {problem}: expected {len(expected)} as in the base")
    for name, shape in given.items():
        if shape != tuple(expected[name]):
            raise FedspanError(f"{where}: the {what} of {name} has shape {shape}: expected {tuple(expected[name])}")
