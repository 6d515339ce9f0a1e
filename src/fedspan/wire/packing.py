"""Messages between processes: a line of JSON and one flat buffer of raw tensors, nothing pickled.

A message is a JSON-able description in which a tensor is the number of its place in the buffer. Every tensor starts
on a cache line and keeps its strides: what is computed from it on the other side has the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Factors, GaloreOptions, Payload, Recipe, Subspace, Tensors, Vector
from fedspan.methods.patches import Patch, patch_tensors

LINE = 64
"""Where torch's own allocator would place a tensor: some BLAS kernels round differently elsewhere."""


class Channel(Protocol):
    """One end of a pipe between two processes."""

    def send_bytes(self, buf: Any, /) -> None:
        """One message of bytes."""

    def recv_bytes(self) -> bytes:
        """The next message of bytes; EOFError when there will be none."""

    def recv_bytes_into(self, buf: Any, /) -> int:
        """The next message of bytes, written into `buf`."""


@dataclass(slots=True)
class Parcel:
    """Tensors on their way, each once however often it is named."""

    tensors: list[Tensor] = field(default_factory=list)
    _places: dict[int, int] = field(default_factory=dict)

    def put(self, tensor: Tensor) -> int:
        """The tensor's place."""
        place = self._places.setdefault(id(tensor), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(tensor)
        return place


def pack(message: Any, tensors: Sequence[Tensor]) -> tuple[bytes, Tensor]:
    """The description with the tensors' types, shapes and strides, and their bytes in one buffer.

    Returns
    -------
    tuple[bytes, Tensor]
        JSON, and uint8 (total,) on the CPU.
    """
    laid: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []
    end = 0
    for tensor in tensors:
        # As a clone would be: dense, with the strides' order kept, so what a model that loads it here would hold.
        strides = torch.empty_like(tensor, device="meta").stride()
        laid.append((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), strides, end))
        end += -(-tensor.numel() * tensor.element_size() // LINE) * LINE
    buffer = torch.empty(end, dtype=torch.uint8)
    for tensor, (_, shape, strides, start) in zip(tensors, laid, strict=True):
        place = buffer[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        place.as_strided(shape, strides).copy_(tensor.detach())
    return json.dumps({"message": message, "tensors": laid, "size": end}).encode(), buffer


def unpack(head: Mapping[str, Any], buffer: Tensor) -> tuple[Any, list[Tensor]]:
    """The description, and tensors that are views of `buffer`."""
    held = buffer.numpy().data
    tensors: list[Tensor] = []
    for name, shape, strides, start in head["tensors"]:
        dtype, count = getattr(torch, name), torch.Size(shape).numel()
        if count:
            # Not slices of the buffer: storages of their own, so that saving one does not find it shared.
            tensors.append(torch.frombuffer(held, dtype=dtype, count=count, offset=start).as_strided(shape, strides))
        else:
            tensors.append(torch.empty(shape, dtype=dtype))
    return head["message"], tensors


def send(channel: Channel, message: Any, tensors: Sequence[Tensor] = ()) -> None:
    """One message; returns when the other side has taken all but what the system buffers."""
    head, buffer = pack(message, tensors)
    channel.send_bytes(head)
    if buffer.numel():
        channel.send_bytes(buffer.numpy().data)


def receive(channel: Channel) -> tuple[Any, list[Tensor]]:
    """The next message.

    Raises
    ------
    EOFError
        When the other side has closed its end or is gone.
    """
    head = json.loads(channel.recv_bytes())
    buffer = torch.empty(head["size"], dtype=torch.uint8)
    if head["size"]:
        channel.recv_bytes_into(buffer.numpy().data)
    return unpack(head, buffer)


def put_factors(parcel: Parcel, adapter: Mapping[str, Factors]) -> dict[str, Any]:
    """An adapter's description."""
    return {name: [parcel.put(f.b), parcel.put(f.a), f.scaling] for name, f in adapter.items()}


def get_factors(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Factors]:
    """The adapter again."""
    return {name: Factors(tensors[b], tensors[a], scaling) for name, (b, a, scaling) in described.items()}


def put_dense(parcel: Parcel, dense: Tensors) -> dict[str, Any]:
    """The description of named tensors."""
    return {name: parcel.put(value) for name, value in dense.items()}


def get_dense(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The named tensors again."""
    return {name: tensors[place] for name, place in described.items()}


def put_patch(parcel: Parcel, patch: Mapping[str, Patch]) -> dict[str, Any]:
    """The description of additions to the base."""
    return {name: [parcel.put(t) for t in patch_tensors(p).values()] for name, p in patch.items()}


def get_patch(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Patch]:
    """The additions again."""
    found: dict[str, Patch] = {}
    for name, places in described.items():
        parts = [tensors[place] for place in places]
        found[name] = LowRank(*parts) if len(parts) == 2 else parts[0]
    return found


def put_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON."""
    return asdict(recipe)


def get_recipe(described: Mapping[str, Any]) -> Recipe:
    """The recipe again."""
    galore, penalty = described["galore"], described["tail_penalty"]
    nested = {
        "galore": None if galore is None else GaloreOptions(**galore),
        "tail_penalty": None if penalty is None else (penalty[0], penalty[1]),
    }
    return Recipe(**{**described, **nested})


def put_subspaces(parcel: Parcel, subspaces: Mapping[str, Subspace]) -> dict[str, Any]:
    """The description of where trained tensors may move."""
    return {name: [parcel.put(x.basis), x.side] for name, x in subspaces.items()}


def get_subspaces(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Subspace]:
    """The subspaces again."""
    return {name: Subspace(tensors[place], side) for name, (place, side) in described.items()}


def put_payloads(parcel: Parcel, modules: Mapping[str, Payload]) -> dict[str, Any]:
    """The description of what an update holds of every module."""
    return {
        name: {"values": put_dense(parcel, p.values)} if isinstance(p, Vector) else put_factors(parcel, {"": p})
        for name, p in modules.items()
    }


def get_payloads(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Payload]:
    """The payloads again."""
    return {
        name: Vector(get_dense(p["values"], tensors)) if "values" in p else get_factors(p, tensors)[""]
        for name, p in described.items()
    }
