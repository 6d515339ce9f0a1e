"""Many clients' adapters and heads in the layers of one base, so that one pass serves them all.

A linear layer computes, for the rows of client k, x Wᵀ + s_k (x A_kᵀ) B_kᵀ: W once for everybody, the rest as batched
products. Smaller ranks are padded with zeros to the largest. The padding stays zero without a mask: the gradient of a
zero row of A is a product with the zero column of B, and the other way round, so neither gradient descent nor Adam
nor weight decay ever moves it, and it adds exactly zero to every product and norm.

Shapes: C clients, client by client in the batch; W (m, n); A (C, r, n); B (C, m, r); P trained numbers per client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedspan.methods.messages import Broadcast, Factors, Recipe
from fedspan.models.federated_model import FederatedModel
from fedspan.models.layers import base_layer, dropout_of, is_conv1d
from fedspan.models.streams import NotRowwise
from fedspan.support.errors import FedspanError


class _Adapted(torch.autograd.Function):
    """x Wᵀ + bias + s (x Aᵀ) Bᵀ, with the adapters' gradients added to the clients' own rows of the bank.

    As plain operations, autograd would first make gradients of its own, which then had to be copied there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, slot: Slot, a: Tensor, b: Tensor, s: Tensor
    ) -> Tensor:
        y = F.linear(x, weight, bias)  # (C, tokens, m)
        h = torch.bmm(x, a.mT).mul_(s)  # (C, tokens, r)
        y.baddbmm_(h, b.mT)
        ctx.save_for_backward(x if slot.grad_a is not None else None, h, weight, a, b, s)
        ctx.slot = slot
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, h, weight, a, b, s = ctx.saved_tensors
        slot, (g,) = ctx.slot, grads
        # Into a block of its own first: the clients' rows lie apart in the bank, and a batched product with such an
        # output falls back to one product per client.
        if slot.grad_b is not None:
            slot.grad_b.add_(torch.bmm(g.mT, h))
        back = torch.bmm(g, b).mul_(s)  # (C, tokens, r)
        if slot.grad_a is not None:
            slot.grad_a.add_(torch.bmm(back.mT, x))
        grad = None
        if ctx.needs_input_grad[0]:
            grad = g @ weight
            grad.baddbmm_(back, a)
        return grad, None, None, None, None, None, None


@dataclass(slots=True)
class Slot:
    """One layer's adapters, of the clients that are active now."""

    a: Tensor  # (C, r, n)
    b: Tensor  # (C, m, r)
    scaling: Tensor  # (C, 1, 1)
    grad_a: Tensor | None
    grad_b: Tensor | None


class StackedLinear(nn.Module):
    """A frozen linear layer with an adapter per client."""

    slot: Slot

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base = base_layer(layer)
        self.dropout = dropout_of(layer)
        self.transposed = is_conv1d(self.base)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (rows, …, n) -> (rows, …, m)."""
        slot, weight = self.slot, self.base.weight
        rows = _by_client(x, len(slot.a))
        plain = weight.dtype == x.dtype == torch.float32 and not self.base._forward_hooks
        if plain and not self.dropout and not torch.is_autocast_enabled(x.device.type):
            w = weight.T if self.transposed else weight
            apply: Callable[..., Tensor] = _Adapted.apply  # torch gives it no type
            output = apply(rows, w, self.base.bias, slot, slot.a, slot.b, slot.scaling)
            return output.view(*x.shape[:-1], output.shape[-1])
        # A base in a coarser type, a patch beside it, dropout: the same in ordinary operations, adapters in float32.
        # Autograd then has their gradients, which Stack.gather_gradients fetches.
        y: Tensor = self.base(x)
        kept = F.dropout(x.float(), self.dropout) if self.dropout else x.float()
        h = torch.bmm(_by_client(kept, len(slot.a)), slot.a.mT) * slot.scaling
        extra = torch.bmm(h, slot.b.mT).view(y.shape)
        return (y + extra).to(y.dtype)


class StackedHead(nn.Module):
    """A trained linear layer or layer norm, one per client, in float32."""

    weight: Tensor  # (C, m, n), or (C, n) of a norm
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.LayerNorm) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute (rows, …, n) -> (rows, …, m)."""
        rows = _by_client(x.float(), len(self.weight))  # (C, …, n)
        if isinstance(self.layer, nn.LayerNorm):
            y = F.layer_norm(rows, self.layer.normalized_shape, eps=self.layer.eps) * self.weight[:, None]
        else:
            y = torch.bmm(rows, self.weight.mT)
        y = y if self.bias is None else y + self.bias[:, None]
        return y.view(*x.shape[:-1], y.shape[-1])


def _by_client(x: Tensor, num_clients: int) -> Tensor:
    """Return (rows, …, n) as (C, rows of one client …, n)."""
    if x.shape[0] % num_clients:
        raise NotRowwise(f"a layer's input of shape {tuple(x.shape)}: expected the rows of {num_clients} clients first")
    return x.reshape(num_clients, -1, x.shape[-1])


@dataclass(slots=True)
class Bank:
    """Named tensors of C clients in one (C, P) block, so that one call clips, steps or clears all of a client."""

    values: Tensor  # (C, P)
    grads: Tensor | None  # (C, P)
    places: Mapping[str, tuple[int, tuple[int, ...]]]
    """Name -> offset in a row, and the shape of one client's tensor."""

    def view(self, name: str, num_clients: int) -> tuple[Tensor, Tensor | None]:
        """Return the first clients' tensors of that name, (num_clients, …), and their gradients."""
        start, shape = self.places[name]
        size = torch.Size(shape).numel()
        part = [None if x is None else x[:num_clients, start : start + size] for x in (self.values, self.grads)]
        value, grad = (None if x is None else x.view(num_clients, *shape) for x in part)
        assert value is not None
        return value, grad


def _bank(tensors: Mapping[str, list[Tensor]], device: torch.device, grads: bool) -> Bank:
    """Return a bank with one row per client; a smaller tensor fills the leading rows and columns of its place."""
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    total = 0
    for name, own in tensors.items():
        shape = tuple(max(sizes) for sizes in zip(*(t.shape for t in own), strict=True))
        places[name] = (total, shape)
        total += torch.Size(shape).numel()
    count = len(next(iter(tensors.values()), []))
    values = torch.zeros(count, total, device=device)
    bank = Bank(values, torch.zeros_like(values) if grads else None, places)
    for name, own in tensors.items():
        stacked, _ = bank.view(name, count)
        for k, tensor in enumerate(own):
            stacked[k][tuple(slice(size) for size in tensor.shape)].copy_(tensor)
    return bank


@dataclass(slots=True)
class Stack:
    """The clients of one group inside one model."""

    model: FederatedModel
    broadcasts: Sequence[Broadcast]
    trained: Bank
    frozen: Bank
    linears: Mapping[str, StackedLinear]
    heads: Mapping[str, StackedHead]
    scalings: Mapping[str, Tensor]
    rows: list[Tensor] = field(default_factory=list)
    """Each client's trained numbers as one parameter (P,), with its gradient."""

    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """The views of the bank that are leaves of the pass, each with the place in the bank of its gradient."""

    def __post_init__(self) -> None:
        grads = self.trained.grads
        assert grads is not None
        for k, row in enumerate(self.trained.values):
            row.requires_grad_(True)
            row.grad = grads[k]
            self.rows.append(row)

    def activate(self, num_clients: int) -> None:
        """Prepare for batches that hold the rows of the first `num_clients` clients alone.

        Layers see views of the bank's leading rows, so the clients at the end can leave without any copying.
        """
        self.leaves = []
        for name, layer in self.linears.items():
            (a, grad_a), (b, grad_b) = (self._leaf(f"{name}/{part}", num_clients) for part in ("a", "b"))
            layer.slot = Slot(a, b, self.scalings[name][:num_clients], grad_a, grad_b)
        for name, head in self.heads.items():
            head.weight, _ = self._leaf(f"{name}.weight", num_clients)
            bias = head.layer.bias is not None
            head.bias = self._leaf(f"{name}.bias", num_clients)[0] if bias else None

    def _leaf(self, name: str, num_clients: int) -> tuple[Tensor, Tensor | None]:
        bank = self.trained if name in self.trained.places else self.frozen
        value, grad = bank.view(name, num_clients)
        if grad is not None:
            value.requires_grad_(True)
            self.leaves.append((value, grad))
        return value, grad

    def gather_gradients(self) -> None:
        """Add the gradients of autograd itself (of heads, and adapters beside dropout or a patch) to the bank."""
        for value, grad in self.leaves:
            if value.grad is not None:
                grad.add_(value.grad)
                value.grad = None

    def tail_penalties(self, tails: Sequence[int]) -> Tensor:
        """Return Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over the modules, for each client's own k: (C,)."""
        total = torch.zeros(len(tails), device=self.trained.values.device)
        for layer in self.linears.values():
            a, b = layer.slot.a, layer.slot.b
            kept = torch.arange(a.shape[1], device=a.device) >= torch.tensor(tails, device=a.device)[:, None]  # (C, r)
            total = total + (b * kept[:, None]).flatten(1).norm(dim=1) * (a * kept[:, :, None]).flatten(1).norm(dim=1)
        return total

    def adapter(self, client: int) -> dict[str, Factors]:
        """Return a copy of one client's adapter at its own rank, on the CPU."""
        adapter: dict[str, Factors] = {}
        for name, sent in self.broadcasts[client].adapter.items():
            a, b = (self._value(f"{name}/{part}", client) for part in ("a", "b"))
            adapter[name] = Factors(b[:, : sent.rank].cpu().clone(), a[: sent.rank].cpu().clone(), sent.scaling)
        return adapter

    def dense(self, client: int) -> dict[str, Tensor]:
        """Return copies of one client's heads, in float32 on the CPU."""
        return {name: self._value(name, client).cpu().clone() for name in self.broadcasts[client].dense}

    def _value(self, name: str, client: int) -> Tensor:
        bank = self.trained if name in self.trained.places else self.frozen
        return bank.view(name, client + 1)[0][client].detach()


@contextmanager
def stacked(model: FederatedModel, broadcasts: Sequence[Broadcast]) -> Iterator[Stack]:
    """Put many clients' starting points into one model, and take them out again.

    All of them must train the same parts, since a part is either in the bank of trained or of frozen tensors, and have
    the same patch on the base, since there is one base.
    """
    for broadcast in broadcasts:
        model.check_fits(broadcast)
    recipe = broadcasts[0].recipe
    model.apply_patch(broadcasts[0].patch)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    trained, frozen = _parts(broadcasts, recipe)
    scalings = {
        name: torch.tensor([b.adapter[name].scaling for b in broadcasts], device=model.device)[:, None, None]
        for name in model.layers
    }
    linears = {name: StackedLinear(layer) for name, layer in model.layers.items()}
    heads = {name: StackedHead(layer) for name, layer in head_layers(model).items()}
    banks = _bank(trained, model.device, True), _bank(frozen, model.device, False)
    originals = {name: model.model.get_submodule(name) for name in (*linears, *heads)}
    try:
        for name, layer in (*linears.items(), *heads.items()):
            model.model.set_submodule(name, layer)
        yield Stack(model, broadcasts, *banks, linears, heads, scalings)
    finally:
        for name, layer in originals.items():
            model.model.set_submodule(name, layer)


def _parts(broadcasts: Sequence[Broadcast], recipe: Recipe) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Return the trained and the frozen tensors by name, each as one list over the clients."""
    trained: dict[str, list[Tensor]] = {}
    frozen: dict[str, list[Tensor]] = {}
    for name in broadcasts[0].adapter:
        (trained if recipe.train_a else frozen)[f"{name}/a"] = [b.adapter[name].a for b in broadcasts]
        (trained if recipe.train_b else frozen)[f"{name}/b"] = [b.adapter[name].b for b in broadcasts]
    for name in broadcasts[0].dense:
        trained[name] = [b.dense[name] for b in broadcasts]
    return trained, frozen


def head_layers(model: FederatedModel) -> dict[str, Any]:
    """Return the layers inside the heads that hold trained parameters.

    Raises
    ------
    FedspanError
        For a layer that has no stacked form.
    """
    layers: dict[str, Any] = {}
    for name in model.dense_parameters:
        layer_name, _, parameter = name.rpartition(".")
        layer = model.model.get_submodule(layer_name)
        if type(layer) not in (nn.Linear, nn.LayerNorm) or parameter not in ("weight", "bias"):
            raise FedspanError(f"the head's {layer_name} is a {type(layer).__name__}")
        layers[layer_name] = layer
    return layers
