"""Contexts for a client's own work on its PEFT model: a gradient of the base's weights, and training within a subspace.

PEFT itself is not needed: parameters are found by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedspan.algebra import lowrank
from fedspan.methods.messages import Subspace
from fedspan.support.errors import FedspanError


def parameters_of(model: Any, names: list[str]) -> dict[str, nn.Parameter]:
    """Return these parameters of a model.

    Raises
    ------
    FedspanError
        When the model is none, or lacks one of them.
    """
    if not isinstance(model, nn.Module):
        raise FedspanError(f"a {type(model).__name__}: expected a PEFT model")
    # A tied weight has several names.
    held = dict(model.named_parameters(remove_duplicate=False))
    if missing := [name for name in names if name not in held]:
        inside = any(".parametrizations." in name for name in held)
        problem = "is within `training` already" if inside else f"has no parameter {missing[0]!r}"
        raise FedspanError(f"the model {problem}: expected a PEFT model with the modules and the adapter of the base")
    return {name: held[name] for name in names}


@contextmanager
def collecting(model: Any, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Let these weights and nothing else collect gradients; on leaving, the dictionary holds them, in float32.

    The model is in evaluation mode meanwhile, without dropout. Afterwards everything is as it was.

    Raises
    ------
    FedspanError
        For a weight that is not in floating point, or that no backward pass has reached.
    """
    weights = parameters_of(model, names)
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise FedspanError(f"{name} is held as {weight.dtype}: expected a floating-point base for its gradient")
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    gradient: dict[str, Tensor] = {}
    try:
        model.requires_grad_(False).eval()
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        yield gradient
        for name, weight in weights.items():
            if weight.grad is None:
                raise FedspanError(f"{name} has no gradient: expected a backward pass through the model")
            gradient[name] = lowrank.promote(weight.grad.detach()).cpu().clone()
    finally:
        for p, free, grad in before:
            p.requires_grad_(free)
            p.grad = grad
        for module, mode in modes:
            module.training = mode


@contextmanager
def training_only(model: Any, free: Mapping[str, bool], subspaces: Mapping[str, Subspace]) -> Iterator[None]:
    """Freeze the factors that are not free, and let those with a subspace X = X₀ + basis·Z train Z alone.

    X₀ is the value that the model holds now. The parameter object stays the same one, so that an optimizer may be made
    before or inside the context; it holds Z inside, which starts at zero, and X outside.

    Parameters
    ----------
    free
        By the factors' parameter names, whether they are trained.
    subspaces
        By the same names.

    Raises
    ------
    FedspanError
        When the model lacks one of the factors.
    """
    factors = parameters_of(model, list(free))
    before = {name: p.requires_grad for name, p in factors.items()}
    confined: list[str] = []
    try:
        for name, p in factors.items():
            p.requires_grad_(free[name])
        for name, space in subspaces.items():
            _confine(model, name, factors[name], space)
            confined.append(name)
        yield
    finally:
        for name in confined:
            _release(model, name)
        for name, p in factors.items():
            p.requires_grad_(before[name])


class Confined(nn.Module):
    """The parametrization X = X₀ + basis·Z, or X₀ + Z·basisᵀ, of a trained tensor by its coordinates Z."""

    start: Tensor
    basis: Tensor

    def __init__(self, start: Tensor, space: Subspace) -> None:
        super().__init__()
        self.side = space.side
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("basis", space.basis.to(start), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return X. Autocast would round it to 16 bits."""
        with torch.autocast(z.device.type, enabled=False):
            return self.value(z)

    def right_inverse(self, x: Tensor) -> Tensor:
        """Return the coordinates that training starts from: zero."""
        return Subspace(self.basis, self.side).coordinates(torch.zeros_like(x))

    def value(self, z: Tensor) -> Tensor:
        """Return X in the precision of Z."""
        return self.start.to(z) + Subspace(self.basis.to(z), self.side).expand(z)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _confine(model: nn.Module, name: str, p: nn.Parameter, space: Subspace) -> None:
    p.grad = None  # which has the shape of X, and not of Z
    module, attribute = _place(model, name)
    parametrize.register_parametrization(module, attribute, Confined(p.detach().clone(), space))


@torch.no_grad()
def _release(model: nn.Module, name: str) -> None:
    module, attribute = _place(model, name)
    held: Any = module.parametrizations
    p, confined = held[attribute].original, held[attribute][0]
    # Worked out once more on the CPU: on a GPU, products may be in TF32, whose rounding leaves the subspace.
    value = confined.value(lowrank.promote(p.detach()).cpu())
    p.grad = None
    parametrize.remove_parametrizations(module, attribute)
    p.copy_(value)
