"""Adapters on experts that a base holds in one tensor (E, …): one pair of factors for every expert.

PEFT's `target_parameters` trains all experts of a parameter as one pair. Here every expert is a module of its own, so
that any method treats it as it treats a linear layer; the saved adapter is PEFT's (`fedspan.adapters.experts`).
Shapes: E experts; of each the weight W_e (m, n), B_e (m, r) and A_e (r, n). The parameter is (E, m, n), or (E, n, m)
where the base says that it is transposed (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedspan.adapters.experts import expert_name, stack_path
from fedspan.methods.messages import Factors
from fedspan.methods.patches import Patch, patch_dense
from fedspan.models.selection import ends_in, within, without_numbers
from fedspan.support.errors import FedspanError

SLOT = "default"
"""PEFT's name for the one adapter."""


@dataclass(frozen=True, slots=True)
class ExpertParameter:
    """A parameter of a base that holds the weights of several experts."""

    module: str
    """The module that owns it."""
    name: str
    """Its name in the module."""
    shape: tuple[int, int, int]
    """(E, m, n), whichever way it is stored."""
    transposed: bool
    """It is stored as (E, n, m)."""

    @property
    def path(self) -> str:
        """Its name in the base."""
        return f"{self.module}.{self.name}"


class Expert(nn.Module):
    """One expert of a parameter, with an adapter, in the form of PEFT's layers."""

    def __init__(self, parameter: nn.Parameter, number: int, shape: tuple[int, int], transposed: bool, rank: int):
        super().__init__()
        m, n = shape
        self.number, self.transposed = number, transposed
        self._parameter = (parameter,)  # not a parameter of this module too
        self.lora_A = nn.ModuleDict({SLOT: nn.Linear(n, rank, bias=False)})
        self.lora_B = nn.ModuleDict({SLOT: nn.Linear(rank, m, bias=False)})
        self.lora_dropout = nn.ModuleDict({SLOT: nn.Identity()})
        self.r, self.scaling = {SLOT: rank}, {SLOT: 1.0}
        self.patch: Patch | None = None
        """A change of the base's weight."""

    @property
    def whole(self) -> nn.Parameter:
        """The parameter with the weights of all experts."""
        return self._parameter[0]

    def own(self, tensor: Tensor) -> Tensor:
        """Return this expert's part, (m, n), of a tensor of the parameter's shape."""
        part = tensor[self.number]
        return part.mT if self.transposed else part

    @property
    def weight(self) -> Tensor:
        """The expert's weight in the base, (m, n)."""
        return self.own(self.whole.detach())


class AdaptedExperts(nn.Module):
    """A base's module of experts, some of whose parameters are W_e + s·B_e·A_e."""

    def __init__(self, base: nn.Module, parameters: Sequence[ExpertParameter], rank: int) -> None:
        super().__init__()
        self.base_layer = base
        self.adapted = nn.ModuleDict()
        for parameter in parameters:
            whole, (count, m, n) = getattr(base, parameter.name), parameter.shape
            own = (Expert(whole, e, (m, n), parameter.transposed, rank) for e in range(count))
            self.adapted[parameter.name] = nn.ModuleList(own)
        self._kept: dict[str, tuple[list[Patch | None], Tensor]] = {}
        self._folded: dict[str, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base's module, which its model may look at."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the base's module does, with the changed parameters in place of its own."""
        weights = self._folded or {name: self._weight(name) for name in self.adapted}
        return functional_call(self.base_layer, weights, args, kwargs)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Compute the changed parameters once, while nothing is trained."""
        with torch.no_grad():
            self._folded = {name: self._weight(name) for name in self.adapted}
        try:
            yield
        finally:
            self._folded = None

    def _weight(self, name: str) -> Tensor:
        """Return W + s·B·A of all experts in the parameter's own shape and type; the sum is taken in float32."""
        experts: Any = self.adapted[name]
        base = self._patched(name, experts)
        rank = max(expert.r[SLOT] for expert in experts)
        a = torch.stack([_rows(expert.lora_A[SLOT].weight, rank) for expert in experts])  # (E, r, n)
        b = torch.stack(
            [_rows(expert.lora_B[SLOT].weight.mT * expert.scaling[SLOT], rank).mT for expert in experts]
        )  # (E, m, r)
        left, right = (a.mT, b.mT) if experts[0].transposed else (b, a)
        with torch.autocast(base.device.type, enabled=False):  # as PEFT does: no parameter changes its type
            return torch.baddbmm(base.float(), left, right).to(experts[0].whole.dtype)

    def _patched(self, name: str, experts: Any) -> Tensor:
        """Return the base's parameter with the patches of its experts, in float32 where there are any."""
        whole: Tensor = experts[0].whole.detach()
        if all(expert.patch is None for expert in experts):
            self._kept.pop(name, None)
            return whole
        patches = [expert.patch for expert in experts]
        held = self._kept.get(name)
        if held is None or any(old is not new for old, new in zip(held[0], patches, strict=True)):
            total = whole.float().clone()
            for expert in experts:
                if expert.patch is not None:
                    expert.own(total).add_(patch_dense(expert.patch).to(total))
            held = self._kept[name] = (patches, total)
        return held[1]


def fused_experts(base: nn.Module, beside: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the parameters that hold the weights of several experts in one tensor, and their shapes."""
    return {
        name: tuple(p.shape)
        for name, p in base.named_parameters()
        if p.ndim == 3 and "expert" in name.lower() and not within(name, beside)
    }


def experts_line(experts: Mapping[str, tuple[int, ...]]) -> str:
    """Return one line on the experts that get no adapter."""
    numbers = sum(torch.Size(shape).numel() for shape in experts.values())
    names = without_numbers(experts)
    return (
        f"the experts' weights get no adapter: {names} ({numbers:,} numbers, several experts in one tensor); "
        "adapter.target_parameters names those that should"
    )


def choose(base: nn.Module, wanted: Sequence[str], beside: Collection[str], rank: int) -> list[ExpertParameter]:
    """Return the parameters whose names end in one of `wanted`, as PEFT matches them, in the base's order.

    Raises
    ------
    FedspanError
        For a name that matches nothing, or a parameter that holds no experts, is trained whole, or cannot hold the
        rank.
    """
    held = dict(base.named_parameters())
    for end in wanted:
        if not any(ends_in(name, end) for name in held):
            known = without_numbers(fused_experts(base, beside)) or "no experts in one tensor"
            raise FedspanError(f"adapter.target_parameters: {end!r} matches no parameter; this model has {known}")
    names = [name for name in held if any(ends_in(name, end) for end in wanted)]
    return [_checked(base, name, held[name], beside, rank) for name in names]


def _checked(base: nn.Module, name: str, p: nn.Parameter, beside: Collection[str], rank: int) -> ExpertParameter:
    setting, shape = f"adapter.target_parameters: {name}", "×".join(map(str, p.shape))
    module, _, own = name.rpartition(".")
    if p.ndim != 3 or not module or not p.is_floating_point():
        raise FedspanError(
            f"{setting} is {shape} of {p.dtype}: expected experts×rows×columns in floating point "
            "(adapter.target_modules adapts linear layers)"
        )
    if within(name, beside):
        raise FedspanError(f"{setting} is trained whole: expected parameters outside the head and modules_to_save")
    transposed = bool(getattr(base.get_submodule(module), "is_transposed", False))
    count, rows, columns = p.shape
    m, n = (columns, rows) if transposed else (rows, columns)
    if rank > min(m, n):
        raise FedspanError(
            f"rank {rank} is above what an expert of {name} ({m}×{n}) can hold: expected at most {min(m, n)}"
        )
    return ExpertParameter(module, own, (count, m, n), transposed)


def attach(base: nn.Module, parameters: Sequence[ExpertParameter], rank: int) -> dict[str, Expert]:
    """Give the experts of these parameters adapters; return them by name, `parameter.0` to `parameter.(E-1)`."""
    layers: dict[str, Expert] = {}
    for module, own in _by_module(parameters).items():
        wrapped = AdaptedExperts(base.get_submodule(module), own, rank)
        base.set_submodule(module, wrapped)
        for parameter in own:
            experts: Any = wrapped.adapted[parameter.name]
            layers |= {expert_name(parameter.path, e): expert for e, expert in enumerate(experts)}
    return layers


def stacks_of(parameters: Sequence[ExpertParameter]) -> dict[str, ExpertParameter]:
    """Return the parameters by PEFT's paths of their factors."""
    return {
        stack_path(module, place, len(own)): parameter
        for module, own in _by_module(parameters).items()
        for place, parameter in enumerate(own)
    }


def renamed(
    factors: Mapping[str, Factors], stacks: Mapping[str, ExpertParameter], back: bool = False
) -> dict[str, Factors]:
    """Return the factors with every expert under PEFT's path instead of its parameter's, or the other way round."""
    paths = {
        expert_name(parameter.path, e): expert_name(stack, e)
        for stack, parameter in stacks.items()
        for e in range(parameter.shape[0])
    }
    if back:
        paths = {path: name for name, path in paths.items()}
    return {paths.get(name, name): f for name, f in factors.items()}


def gradient_of(layer: Expert) -> Tensor:
    """Return the gradient of the expert's weight, (m, n); zero where the data does not reach it."""
    grad = layer.whole.grad
    return torch.zeros_like(layer.weight) if grad is None else layer.own(grad)


def _by_module(parameters: Sequence[ExpertParameter]) -> Mapping[str, list[ExpertParameter]]:
    """Return the parameters by the module that owns them, in the module's order, in which PEFT nests them."""
    groups: dict[str, list[ExpertParameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.module, []).append(parameter)
    return groups


def _rows(matrix: Tensor, rank: int) -> Tensor:
    """Return the matrix with rows of zeros up to that rank."""
    missing = rank - matrix.shape[0]
    return matrix if not missing else torch.cat([matrix, matrix.new_zeros((missing, matrix.shape[1]))])
