"""The types in which tensors travel: float32, bfloat16, or int8 with a scale for every row.

Everything computed from them is float32 again. The round trip is one function, used both by the engine in one process
and by real senders, so that both see the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.methods.messages import Broadcast, Tensors, Update
from fedspan.wire.sizes import payload_bytes, payload_tensors

Kind = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True)
class Precision:
    """The types of one run, from the clients and to them."""

    up: Kind = "float32"
    down: Kind = "float32"


EXACT = Precision()


def pack(tensor: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    """Return the tensors that travel: the tensor itself, bfloat16, or int8 codes and each row's scale, max |x| / 127.

    Tensors that are not floating point, and those of fewer than two dimensions, which are small, stay as they are.
    """
    if not _is_rounded(tensor, kind):
        return (tensor,)
    if kind == "bfloat16":
        return (tensor.to(torch.bfloat16),)
    scale = tensor.float().abs().amax(dim=-1, keepdim=True) / 127
    codes = (tensor.float() / torch.where(scale > 0, scale, 1)).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def unpack(parts: tuple[Tensor, ...]) -> Tensor:
    """Return the tensor again, in float32 where it was rounded."""
    if len(parts) == 2:
        codes, scale = parts
        return codes.to(torch.float32) * scale
    return parts[0].to(torch.float32) if parts[0].dtype == torch.bfloat16 else parts[0]


def round_trip(tensor: Tensor, kind: Kind) -> Tensor:
    """Return the tensor as it arrives."""
    return unpack(pack(tensor, kind))


def rounded_update(update: Update, kind: Kind) -> tuple[Update, int]:
    """Return an update as it arrives, and the bytes of its tensors on the way."""
    if kind == "float32":
        return update, payload_bytes(update)

    def rounded(tensor: Tensor) -> Tensor:
        return round_trip(tensor, kind)

    arrived = replace(
        update,
        modules={name: payload.map(rounded) for name, payload in update.modules.items()},
        dense=_map(update.dense, rounded),
        moments=_map(update.moments, rounded),
    )
    return arrived, packed_bytes(update, kind)


def packed_bytes(update: Update, kind: Kind) -> int:
    """Return the bytes of an update's tensors on the way."""
    return sum(_packed_size(tensor, kind) for tensor in payload_tensors(update))


def _packed_size(tensor: Tensor, kind: Kind) -> int:
    count = tensor.numel()
    if not _is_rounded(tensor, kind):
        return count * tensor.element_size()
    return 2 * count if kind == "bfloat16" else count + 4 * (count // tensor.shape[-1])


def _is_rounded(tensor: Tensor, kind: Kind) -> bool:
    return kind != "float32" and tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() > 0


def rounded_broadcast(sent: Broadcast, kind: Kind) -> Broadcast:
    """Return a broadcast as it arrives. The patch of a frozen base stays in float32, since its errors would add up."""
    if kind == "float32":
        return sent

    def rounded(tensor: Tensor) -> Tensor:
        return round_trip(tensor, kind)

    # A part that the client has by itself does not travel, and is therefore not rounded.
    own = sent.seeded
    adapter = {
        name: replace(f, a=f.a if "a" in own else rounded(f.a), b=f.b if "b" in own else rounded(f.b))
        for name, f in sent.adapter.items()
    }
    dense = {n: t if "dense" in own or n in own else rounded(t) for n, t in sent.dense.items()}
    return replace(sent, adapter=adapter, dense=dense, correction=_map(sent.correction, rounded))


def _map(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(t) for name, t in tensors.items()}
