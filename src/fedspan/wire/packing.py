"""Messages between processes: one line of JSON and one flat buffer of raw tensors, nothing pickled.

A message is a JSON-able description in which a tensor is replaced by its index in the message's list of tensors. In
the buffer every tensor starts on a cache line and keeps its strides, so that results computed from it on the other
side have the same bits.
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
"""Alignment of every tensor in bytes, as in torch's own allocator: some BLAS kernels round differently elsewhere."""
DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
"""The types of tensors that are packed, by name: a description's own word is never looked up in torch itself."""


class Channel(Protocol):
    """One end of a pipe between two processes."""

    def send_bytes(self, buf: Any, /) -> None:
        """Send one message of bytes."""

    def recv_bytes(self) -> bytes:
        """Return the next message of bytes; EOFError when there will be none."""

    def recv_bytes_into(self, buf: Any, /) -> int:
        """Write the next message of bytes into `buf` and return its size."""


@dataclass(slots=True)
class TensorList:
    """The tensors of a message, each once however often the description names it."""

    tensors: list[Tensor] = field(default_factory=list)
    _indices: dict[int, int] = field(default_factory=dict)
    """`id` of a tensor -> its index. An id stays valid because the list keeps the tensor alive."""

    def put(self, tensor: Tensor) -> int:
        """Add the tensor unless it is there already, and return its index."""
        index = self._indices.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
        return index

    def has(self, tensor: Tensor) -> bool:
        """Return whether the tensor is in the message."""
        return id(tensor) in self._indices


def pack(message: Any, tensors: Sequence[Tensor]) -> tuple[bytes, Tensor]:
    """Return the description with the tensors' types, shapes and strides, and their bytes in one buffer.

    Returns
    -------
    tuple[bytes, Tensor]
        JSON, and uint8 (total,) on the CPU.
    """
    layout: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []
    end = 0
    for tensor in tensors:
        # Dense, with the order of the strides kept, as a clone would be: a model that loads it holds the same layout.
        strides = torch.empty_like(tensor, device="meta").stride()
        layout.append((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), strides, end))
        end += -(-tensor.numel() * tensor.element_size() // LINE) * LINE
    buffer = torch.empty(end, dtype=torch.uint8)
    for tensor, (_, shape, strides, start) in zip(tensors, layout, strict=True):
        region = buffer[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        region.as_strided(shape, strides).copy_(tensor.detach())
    return json.dumps({"message": message, "tensors": layout, "size": end}).encode(), buffer


def unpack(head: Mapping[str, Any], buffer: Tensor) -> tuple[Any, list[Tensor]]:
    """Return the description, and tensors that share the memory of `buffer`."""
    memory = buffer.numpy().data
    tensors: list[Tensor] = []
    for name, shape, strides, start in head["tensors"]:
        dtype, count = DTYPES[name], torch.Size(shape).numel()
        if count:
            # Not slices of the buffer but storages of their own: safetensors refuses to save tensors that share one.
            tensors.append(torch.frombuffer(memory, dtype=dtype, count=count, offset=start).as_strided(shape, strides))
        else:
            tensors.append(torch.empty(shape, dtype=dtype))
    return head["message"], tensors


def send(channel: Channel, message: Any, tensors: Sequence[Tensor] = ()) -> None:
    """Send one message; returns once the other side has taken all of it except what the system buffers."""
    head, buffer = pack(message, tensors)
    channel.send_bytes(head)
    if buffer.numel():
        channel.send_bytes(buffer.numpy().data)


def receive(channel: Channel) -> tuple[Any, list[Tensor]]:
    """Return the next message.

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


def put_factors(outgoing: TensorList, adapter: Mapping[str, Factors]) -> dict[str, Any]:
    """Add an adapter's factors and return their description."""
    return {name: [outgoing.put(f.b), outgoing.put(f.a), f.scaling] for name, f in adapter.items()}


def get_factors(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Factors]:
    """Return the adapter that `put_factors` described."""
    return {name: Factors(tensors[b], tensors[a], float(scaling)) for name, (b, a, scaling) in described.items()}


def put_dense(outgoing: TensorList, dense: Tensors) -> dict[str, Any]:
    """Add named tensors and return their description."""
    return {name: outgoing.put(value) for name, value in dense.items()}


def get_dense(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `put_dense` described."""
    return {name: tensors[index] for name, index in described.items()}


def put_patch(outgoing: TensorList, patch: Mapping[str, Patch]) -> dict[str, Any]:
    """Add additions to the base and return their description."""
    return {name: [outgoing.put(t) for t in patch_tensors(p).values()] for name, p in patch.items()}


def get_patch(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Patch]:
    """Return the additions that `put_patch` described."""
    patch: dict[str, Patch] = {}
    for name, indices in described.items():
        parts = [tensors[index] for index in indices]
        patch[name] = LowRank(*parts) if len(parts) == 2 else parts[0]
    return patch


def put_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain JSON."""
    return asdict(recipe)


def get_recipe(described: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `put_recipe` described."""
    galore, penalty = described["galore"], described["tail_penalty"]
    nested = {
        "galore": None if galore is None else GaloreOptions(**galore),
        "tail_penalty": None if penalty is None else (penalty[0], penalty[1]),
    }
    return Recipe(**{**described, **nested})


def put_subspaces(outgoing: TensorList, subspaces: Mapping[str, Subspace]) -> dict[str, Any]:
    """Add the subspaces in which trained tensors move and return their description."""
    return {name: [outgoing.put(x.basis), x.side] for name, x in subspaces.items()}


def get_subspaces(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Subspace]:
    """Return the subspaces that `put_subspaces` described."""
    return {name: Subspace(tensors[index], side) for name, (index, side) in described.items()}


def put_payloads(outgoing: TensorList, modules: Mapping[str, Payload]) -> dict[str, Any]:
    """Add what an update holds of every module and return its description."""
    return {
        name: {"values": put_dense(outgoing, p.values)} if isinstance(p, Vector) else put_factors(outgoing, {"": p})
        for name, p in modules.items()
    }


def get_payloads(described: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Payload]:
    """Return the payloads that `put_payloads` described."""
    return {
        name: Vector(get_dense(p["values"], tensors)) if "values" in p else get_factors(p, tensors)[""]
        for name, p in described.items()
    }
