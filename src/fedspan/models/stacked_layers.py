"""Layers of many clients at once: a frozen linear layer with an adapter for each client, and a head for each.

Shapes: C clients, client by client in the batch; W (m, n); A (C, r, n); B (C, m, r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedspan.models.layers import base_layer, dropout_of, is_conv1d
from fedspan.models.streams import NotRowwise


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

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that look at its type or use it by themselves, as PEFT's layers give it."""
        weight: Tensor = self.base.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias: Tensor | None = self.base.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute (rows, …, n) -> (rows, …, m)."""
        slot, weight = self.slot, self.base.weight
        rows = _by_client(x, len(slot.a))
        # A forward of its own is that of a product in another type.
        own = bool(self.base._forward_hooks) or "forward" in vars(self.base)
        plain = weight.dtype == x.dtype == torch.float32 and not own
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
