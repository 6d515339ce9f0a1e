"""The types in which tensors travel: float32, bfloat16, or int8 with a scale for every row.

What is computed from them is float32 again. The round trip is one function, used by the engine in one process and by
whoever really sends, so that both see the same bits.
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
    """The types of one run."""

    up: Kind = "float32"
    down: Kind = "float32"


EXACT = Precision()


def pack(tensor: Tensor, kind: Kind) -> tuple[Tensor, ...]:
    """What travels: the tensor itself, or bfloat16, or int8 codes with the scale of every row, max |x| / 127.

    Tensors that are not floating point, and those of fewer than two dimensions, which are small, stay as they are.
    """
    if kind == "float32" or not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
        return (tensor,)
    if kind == "bfloat16":
        return (tensor.to(torch.bfloat16),)
    scale = tensor.float().abs().amax(dim=-1, keepdim=True) / 127
    codes = (tensor.float() / torch.where(scale > 0, scale, 1)).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def unpack(parts: tuple[Tensor, ...]) -> Tensor:
    """The tensor again, in float32 where it was narrowed."""
    if len(parts) == 2:
        codes, scale = parts
        return codes.to(torch.float32) * scale
    return parts[0].to(torch.float32) if parts[0].dtype == torch.bfloat16 else parts[0]


def round_trip(tensor: Tensor, kind: Kind) -> Tensor:
    """What arrives."""
    return unpack(pack(tensor, kind))


def rounded_update(update: Update, kind: Kind) -> tuple[Update, int]:
    """What arrives of an update, and the bytes of its tensors on the way."""
    if kind == "float32":
        return update, payload_bytes(update)

    def through(tensor: Tensor) -> Tensor:
        return round_trip(tensor, kind)

    arrived = replace(
        update,
        modules={name: payload.map(through) for name, payload in update.modules.items()},
        dense=_each(update.dense, through),
        moments=_each(update.moments, through),
    )
    return arrived, packed_bytes(update, kind)


def packed_bytes(update: Update, kind: Kind) -> int:
    """Bytes of an update's tensors on the way."""
    return sum(_size(tensor, kind) for tensor in payload_tensors(update))


def _size(tensor: Tensor, kind: Kind) -> int:
    count = tensor.numel()
    if kind == "float32" or not tensor.is_floating_point() or tensor.ndim < 2 or not count:
        return count * tensor.element_size()
    return 2 * count if kind == "bfloat16" else count + 4 * (count // tensor.shape[-1])


def rounded_broadcast(sent: Broadcast, kind: Kind) -> Broadcast:
    """What arrives of a broadcast; a client's frozen patch stays in float32, since its errors would add up."""
    if kind == "float32":
        return sent

    def through(tensor: Tensor) -> Tensor:
        return round_trip(tensor, kind)

    # What a client has by itself does not travel, and is not narrowed.
    own = sent.seeded
    adapter = {
        name: replace(f, a=f.a if "a" in own else through(f.a), b=f.b if "b" in own else through(f.b))
        for name, f in sent.adapter.items()
    }
    dense = {n: t if "dense" in own or n in own else through(t) for n, t in sent.dense.items()}
    return replace(sent, adapter=adapter, dense=dense, correction=_each(sent.correction, through))


def _each(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {name: change(t) for name, t in tensors.items()}
