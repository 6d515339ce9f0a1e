"""Many clients' adapters and heads in the layers of one base, so that one pass serves them all.

A linear layer computes, for the rows of client k, x Wᵀ + s_k (x A_kᵀ) B_kᵀ: W once for everybody, the rest as batched
products. Smaller ranks are padded with zeros to the largest. The padding stays zero without a mask: the gradient of a
zero row of A is a product with the zero column of B, and the other way round, so neither gradient descent nor Adam
nor weight decay ever moves it, and it adds exactly zero to every product and norm.

Shapes: C clients, client by client in the batch; W (m, n); A (C, r, n); B (C, m, r); P trained numbers per client.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.methods.messages import Broadcast, Factors
from fedspan.models.federated_model import FederatedModel
from fedspan.models.stacked_layers import Slot, StackedHead, StackedLinear
from fedspan.support.errors import FedspanError


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
        size = math.prod(shape)
        part = [None if x is None else x[:num_clients, start : start + size] for x in (self.values, self.grads)]
        value, grad = (None if x is None else x.view(num_clients, *shape) for x in part)
        assert value is not None
        return value, grad

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, list[Tensor]]) -> None:
        """Replace every client's tensors, in place: what was recorded over this memory stays valid.

        Clients that were sent the same tensors (most of them, in most methods) are written once and then copied, and
        the block is put together on the CPU, since every copy to a device costs as much as a small computation there.
        """
        kinds: dict[tuple[int, ...], int] = {}
        owns = [tuple(map(id, own)) for own in zip(*tensors.values(), strict=True)]
        kind_of = [kinds.setdefault(own, len(kinds)) for own in owns]
        if not kind_of:
            return
        rows = Bank(torch.zeros(len(kinds), self.values.shape[1]), None, self.places)
        for name, own in tensors.items():
            stacked, _ = rows.view(name, len(kinds))
            for kind in range(len(kinds)):
                tensor = own[kind_of.index(kind)]
                stacked[kind][tuple(slice(size) for size in tensor.shape)].copy_(tensor)
        moved = rows.values.to(self.values.device)
        self.values.copy_(moved[torch.tensor(kind_of, device=moved.device)])


def _bank(tensors: Mapping[str, list[Tensor]], count: int, device: torch.device, grads: bool, align: int) -> Bank:
    """Return a bank with one row per client; a smaller tensor fills the leading rows and columns of its place.

    Parameters
    ----------
    align
        Every tensor begins at a multiple of this many numbers.
    """
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    total = 0
    for name, own in tensors.items():
        shape = tuple(max(sizes) for sizes in zip(*(t.shape for t in own), strict=True))
        places[name] = (total, shape)
        total += -(-math.prod(shape) // align) * align
    values = torch.zeros(count, total, device=device)
    bank = Bank(values, torch.zeros_like(values) if grads else None, places)
    bank.fill(tensors)
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
    scalings: Tensor  # (modules, C, 1, 1), in the order of `linears`
    rows: list[Tensor] = field(default_factory=list)
    """Each client's trained numbers as one parameter (P,), with its gradient."""

    leaves: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """The views of the bank that are leaves of the pass, each with the place in the bank of its gradient."""
    _fetched: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        grads = self.trained.grads
        assert grads is not None
        for k, row in enumerate(self.trained.values):
            row.requires_grad_(True)
            row.grad = grads[k]
            self.rows.append(row)

    def fill(self, broadcasts: Sequence[Broadcast]) -> None:
        """Replace the clients' starting points by others of the same shapes, in the memory of those before."""
        self.broadcasts = broadcasts
        for bank, tensors in zip((self.trained, self.frozen), _parts(broadcasts), strict=True):
            bank.fill(tensors)
        self.scalings.copy_(_scalings(self.linears, broadcasts))

    def activate(self, num_clients: int) -> None:
        """Prepare for batches that hold the rows of the first `num_clients` clients alone.

        Layers see views of the bank's leading rows, so the clients at the end can leave without any copying.
        """
        self.leaves = []
        for scaling, (name, layer) in zip(self.scalings, self.linears.items(), strict=True):
            (a, grad_a), (b, grad_b) = (self._leaf(f"{name}/{part}", num_clients) for part in ("a", "b"))
            layer.slot = Slot(a, b, scaling[:num_clients], grad_a, grad_b)
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

    def tail_penalties(self, tails: Tensor) -> Tensor:
        """Return Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over the modules, for each client's own k: (C,)."""
        total = torch.zeros(len(tails), device=self.trained.values.device)
        for layer in self.linears.values():
            a, b = layer.slot.a, layer.slot.b
            kept = torch.arange(a.shape[1], device=a.device) >= tails[:, None]  # (C, r)
            total = total + (b * kept[:, None]).flatten(1).norm(dim=1) * (a * kept[:, :, None]).flatten(1).norm(dim=1)
        return total

    def adapter(self, client: int) -> dict[str, Factors]:
        """Return a copy of one client's adapter at its own rank, on the CPU."""
        row = self._row(client)
        adapter: dict[str, Factors] = {}
        for name, sent in self.broadcasts[client].adapter.items():
            a, b = (row[f"{name}/{part}"] for part in ("a", "b"))
            adapter[name] = Factors(b[:, : sent.rank].clone(), a[: sent.rank].clone(), sent.scaling)
        return adapter

    def dense(self, client: int) -> dict[str, Tensor]:
        """Return copies of one client's heads, in float32 on the CPU."""
        names = self.broadcasts[client].dense
        row = self._row(client) if names else {}
        return {name: row[name].clone() for name in names}

    def _row(self, client: int) -> dict[str, Tensor]:
        """Return views of everything of one client by name, on the CPU."""
        row: dict[str, Tensor] = {}
        for bank, values in zip((self.trained, self.frozen), self._fetched or self._values(), strict=True):
            ends = [start for start, _ in bank.places.values()][1:]
            parts = values[client].tensor_split(ends)  # one part even of a bank that holds nothing
            for (name, (_, shape)), part in zip(bank.places.items(), parts, strict=False):
                row[name] = part[: math.prod(shape)].view(shape)
        return row

    def _values(self) -> tuple[Tensor, Tensor]:
        return _on_cpu(self.trained.values.detach()), _on_cpu(self.frozen.values.detach())

    @contextmanager
    def fetched(self) -> Iterator[None]:
        """Fetch everything from the device in one piece, for all clients that are read inside."""
        self._fetched = self._values()
        try:
            yield
        finally:
            self._fetched = None

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """Put the layers of many clients into the model, and take them out again."""
        model = self.model.model
        originals = {name: model.get_submodule(name) for name in (*self.linears, *self.heads)}
        try:
            for name, layer in (*self.linears.items(), *self.heads.items()):
                model.set_submodule(name, layer)
            yield
        finally:
            for name, layer in originals.items():
                model.set_submodule(name, layer)


def build_stack(model: FederatedModel, broadcasts: Sequence[Broadcast], align: int = 1) -> Stack:
    """Return many clients' starting points as layers for one model, whose base gets their patch.

    All of them must train the same parts, since a part is either in the bank of trained or of frozen tensors, and have
    the same patch on the base, since there is one base.

    Parameters
    ----------
    align
        Every tensor of a client begins at a multiple of this many numbers; a GPU's fast products want 4 or more.
    """
    for broadcast in broadcasts:
        model.check_fits(broadcast)
    model.apply_patch(broadcasts[0].patch)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    linears = {name: StackedLinear(layer) for name, layer in model.layers.items()}
    heads = {name: StackedHead(layer) for name, layer in head_layers(model).items()}
    trained, frozen = _parts(broadcasts)
    count, device = len(broadcasts), model.device
    banks = _bank(trained, count, device, True, align), _bank(frozen, count, device, False, align)
    return Stack(model, broadcasts, *banks, linears, heads, _scalings(linears, broadcasts).to(device))


def _on_cpu(values: Tensor) -> Tensor:
    """Return the values on the CPU; from a GPU in page-locked memory, which is twenty times as fast to copy to."""
    if not values.is_cuda:
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)


@contextmanager
def stacked(model: FederatedModel, broadcasts: Sequence[Broadcast]) -> Iterator[Stack]:
    """Put many clients' starting points into one model, as `build_stack` makes them, and take them out again."""
    stack = build_stack(model, broadcasts)
    with stack.inserted():
        yield stack


def _parts(broadcasts: Sequence[Broadcast]) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Return the trained and the frozen tensors by name, each as one list over the clients."""
    recipe = broadcasts[0].recipe
    trained: dict[str, list[Tensor]] = {}
    frozen: dict[str, list[Tensor]] = {}
    for name in broadcasts[0].adapter:
        (trained if recipe.train_a else frozen)[f"{name}/a"] = [b.adapter[name].a for b in broadcasts]
        (trained if recipe.train_b else frozen)[f"{name}/b"] = [b.adapter[name].b for b in broadcasts]
    for name in broadcasts[0].dense:
        trained[name] = [b.dense[name] for b in broadcasts]
    return trained, frozen


def _scalings(linears: Mapping[str, Any], broadcasts: Sequence[Broadcast]) -> Tensor:
    """Return s, (modules, C, 1, 1)."""
    return torch.tensor([[b.adapter[name].scaling for b in broadcasts] for name in linears])[..., None, None]


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
