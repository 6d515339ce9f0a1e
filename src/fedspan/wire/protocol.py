"""The messages between a server and a site, as bytes that can be checked.

A message is `MAGIC`, the length of a JSON head, the head, and one flat buffer of tensors. Nothing is unpickled, and
no part of a message is used before it has been checked: here its schema and every tensor's type, size and place, and
in `fedspan.site` and `fedspan.server` that it belongs to this run, this round, this base and this client.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Broadcast, Factors, Subspace, Tensors, Update
from fedspan.methods.patches import Patch
from fedspan.support.errors import FedspanError
from fedspan.wire import packing
from fedspan.wire.precision import Kind, pack, unpack

SCHEMA = 1
MAGIC = b"FSPN"
_LENGTH = struct.Struct(">I")
_MAX_HEAD_BYTES = 2**28
_MAX_TENSORS = 10**6
_MAX_DIMENSIONS = 8
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
}
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""The errors of reading a head that lies about its content: a field that is missing, of another type, or a number
beyond all floats. Anyone may have written it, so they say nothing about this program."""


class Malformed(FedspanError):
    """Bytes that are not a message of this schema."""


@dataclass(slots=True)
class MessageTensors(packing.TensorList):
    """The tensors of a message, each in the type that it travels in."""

    kind: Kind = "float32"
    """The type of the tensors that are put next."""
    kinds: dict[int, Kind] = field(default_factory=dict)
    """Index of a tensor -> its type."""

    def put(self, tensor: Tensor) -> int:
        """Add the tensor unless it is there already, and return its index."""
        index = packing.TensorList.put(self, tensor)
        self.kinds.setdefault(index, self.kind)
        return index

    def packed(self) -> tuple[list[Tensor], list[list[int]]]:
        """Return the tensors of the buffer, and for each tensor of this list the indices of its one or two parts."""
        buffered: list[Tensor] = []
        places: list[list[int]] = []
        for index, tensor in enumerate(self.tensors):
            parts = pack(tensor, self.kinds[index])
            places.append(list(range(len(buffered), len(buffered) + len(parts))))
            buffered += parts
        return buffered, places


def encode(head: Mapping[str, Any], outgoing: MessageTensors) -> bytes:
    """Return one message as bytes."""
    buffered, places = outgoing.packed()
    described, buffer = packing.pack({**head, "schema": SCHEMA, "places": places}, buffered)
    return b"".join((MAGIC, _LENGTH.pack(len(described)), described, buffer.numpy().tobytes()))


def decode(content: bytes) -> tuple[dict[str, Any], list[Tensor]]:
    """Return a message's head and tensors, in float32 where they travelled in a smaller type.

    Raises
    ------
    Malformed
        When the bytes are not a message of this schema.
    """
    start = len(MAGIC) + _LENGTH.size
    if content[: len(MAGIC)] != MAGIC or len(content) < start:
        raise Malformed(f"{len(content)} bytes that are no fedspan message")
    (length,) = _LENGTH.unpack(content[len(MAGIC) : start])
    if length > min(_MAX_HEAD_BYTES, len(content) - start):
        raise Malformed(f"a head of {length} bytes was announced: expected at most {len(content) - start}")
    try:
        head = json.loads(content[start : start + length])
        _check_head(head, len(content) - start - length)
        # A copy, since tensors over read-only bytes would be undefined behaviour for a writer.
        buffer = torch.from_numpy(np.frombuffer(bytearray(memoryview(content)[start + length :]), dtype=np.uint8))
        message, buffered = packing.unpack(head, buffer)
        tensors = [unpack(tuple(buffered[i] for i in indices)) for indices in message["places"]]
    except Malformed:
        raise
    except (*DAMAGED, RuntimeError) as error:
        # The head is JSON that anyone may have written: any of these only means that it is not what we would write.
        raise Malformed(f"a damaged message ({type(error).__name__}: {error})") from None
    return message, tensors


def _check_head(head: Any, size: int) -> None:
    """Refuse a head of another schema, or one whose tensors are not all within a buffer of `size` bytes."""
    schema = head["message"].get("schema")
    if schema != SCHEMA:
        raise Malformed(
            f"a message of schema {schema!r}: expected {SCHEMA}; both sides need the same version of fedspan"
        )
    if head["size"] != size:
        raise Malformed(f"a buffer of {size} bytes: expected {head['size']}")
    if len(head["tensors"]) > _MAX_TENSORS:
        raise Malformed(f"{len(head['tensors'])} tensors: expected at most {_MAX_TENSORS}")
    for name, shape, strides, start in head["tensors"]:
        _check_tensor(name, shape, strides, start, size)


def _check_tensor(name: str, shape: Sequence[int], strides: Sequence[int], start: int, size: int) -> None:
    """Refuse a tensor of an unknown type, beyond the buffer's end, or whose strides do not walk over it once.

    It runs before any view into the buffer is made, so that a head that lies cannot have other memory read.
    """
    if name not in _DTYPES:
        raise Malformed(f"a tensor of type {name!r}: expected one of {', '.join(_DTYPES)}")
    if not _are_counts(*shape, *strides, start) or len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise Malformed(f"a tensor of shape {shape} and strides {strides}: expected counts")
    count = math.prod(shape)
    if start % packing.LINE or start + count * _DTYPES[name].itemsize > size:
        raise Malformed(f"a tensor of {count} numbers at byte {start} of {size}: it does not fit")
    if count and not _dense(shape, strides):
        raise Malformed(f"a tensor of shape {shape} and strides {strides}: expected it to be dense")


def _are_counts(*values: object) -> bool:
    return all(type(x) is int and x >= 0 for x in values)  # not isinstance, for which `true` is a number


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether the strides walk over every number once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def put_broadcast(outgoing: MessageTensors, sent: Broadcast, derived: Broadcast, kind: Kind) -> dict[str, Any]:
    """Add a broadcast's tensors and return its description.

    Tensors that the site derives by itself, to the same bits, are left out, and so is the patch: `put_patch` adds its
    new part.

    Parameters
    ----------
    derived
        The method's broadcast before it has learnt anything, which the site can work out too.
    """
    header: dict[str, Any] = {"recipe": packing.put_recipe(sent.recipe), "seeded": sorted(sent.seeded), "adapter": {}}

    def put(value: Tensor, own: Tensor | None, seeded: bool) -> int | None:
        # A value that is rounded on the way is rounded for everyone, so it travels even where a site could derive it:
        # the site's own would be the unrounded one, and the sites would train from different weights.
        outgoing.kind = "float32" if seeded else kind
        return _put_new(outgoing, value, own if seeded or kind == "float32" else None)

    for name, f in sent.adapter.items():
        own = derived.adapter.get(name)
        b, a = (own.b, own.a) if own is not None else (None, None)
        header["adapter"][name] = [put(f.b, b, "b" in sent.seeded), put(f.a, a, "a" in sent.seeded), f.scaling]
    header["dense"] = {
        name: put(t, derived.dense.get(name), bool({"dense", name} & sent.seeded)) for name, t in sent.dense.items()
    }
    outgoing.kind = kind
    header["correction"] = packing.put_dense(outgoing, sent.correction)
    outgoing.kind = "float32"
    header["moments"] = packing.put_dense(outgoing, sent.moments)
    header["subspaces"] = {
        name: [_put_new(outgoing, x.basis, _basis(derived, name)), x.side] for name, x in sent.subspaces.items()
    }
    return header


def get_broadcast(
    header: Mapping[str, Any], tensors: Sequence[Tensor], derived: Broadcast, patch: Mapping[str, Patch]
) -> Broadcast:
    """Return the broadcast that `put_broadcast` described.

    Raises
    ------
    Malformed
        When the message leaves out a tensor that this site cannot derive.
    """

    def received(index: int | None, own: Tensor | None) -> Tensor:
        if index is not None:
            return tensors[index]
        if own is None:
            raise Malformed(
                "a message leaves out what this site cannot derive: expected the same settings on both sides"
            )
        return own

    adapter: dict[str, Factors] = {}
    for name, (b, a, scaling) in header["adapter"].items():
        own = derived.adapter.get(name)
        factors = received(b, own.b if own else None), received(a, own.a if own else None)
        adapter[name] = Factors(*factors, float(scaling))
    subspaces = {
        name: Subspace(received(index, _basis(derived, name)), side)
        for name, (index, side) in header["subspaces"].items()
    }
    return Broadcast(
        adapter,
        {name: received(index, derived.dense.get(name)) for name, index in header["dense"].items()},
        packing.get_recipe(header["recipe"]),
        patch=patch,
        seeded=frozenset(header["seeded"]),
        correction=packing.get_dense(header["correction"], tensors),
        subspaces=subspaces,
        moments=packing.get_dense(header["moments"], tensors),
    )


def _basis(derived: Broadcast, name: str) -> Tensor | None:
    return derived.subspaces[name].basis if name in derived.subspaces else None


def _put_new(outgoing: MessageTensors, value: Tensor, own: Tensor | None) -> int | None:
    """Add a tensor and return its index, or None where the site's own has the same bits."""
    return None if own is not None and _same_bits(value, own) else outgoing.put(value)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    # The signs too: 0 and -0 are equal, but not the same bits.
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) and bool((x.signbit() == y.signbit()).all())


def put_patch(outgoing: MessageTensors, sent: Broadcast, seen: int, version: int) -> dict[str, Any]:
    """Add the part of a broadcast's patch that a client with version `seen` lacks, and return its description."""
    outgoing.kind = "float32"
    if not sent.patch:
        return {"whole": True, "seen": seen, "version": 0, "news": []}
    whole = len(sent.news) == 1 and sent.news[0] is sent.patch
    news = [packing.put_patch(outgoing, patch) for patch in sent.news]
    return {"whole": whole, "seen": seen, "version": version, "news": news}


def get_news(header: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[dict[str, LowRank | Tensor]]:
    """Return the increments to the patch that `put_patch` described, or the one whole patch."""
    return [packing.get_patch(patch, tensors) for patch in header["news"]]


def put_update(outgoing: MessageTensors, update: Update, kind: Kind) -> dict[str, Any]:
    """Add an update's tensors and return its description."""
    outgoing.kind = kind
    return {
        "modules": packing.put_payloads(outgoing, update.modules),
        "dense": packing.put_dense(outgoing, update.dense),
        "moments": packing.put_dense(outgoing, update.moments),
        "num_examples": update.num_examples,
    }


def get_update(header: Mapping[str, Any], tensors: Sequence[Tensor], client_id: str) -> Update:
    """Return the update that `put_update` described, as the update of this client."""
    return Update(
        client_id,
        float(header["num_examples"]),
        packing.get_payloads(header["modules"], tensors),
        packing.get_dense(header["dense"], tensors),
        packing.get_dense(header["moments"], tensors),
    )


def put_bytes(outgoing: MessageTensors, content: bytes) -> int:
    """Add plain bytes and return their index."""
    return outgoing.put(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def get_bytes(tensors: Sequence[Tensor], index: int) -> bytes:
    """Return the bytes that `put_bytes` added."""
    return tensors[index].contiguous().numpy().tobytes()


def shapes(update: Update) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an update, by its name."""
    groups: dict[str, Tensors] = {"dense": update.dense, "moments": update.moments}
    shape_of = {f"{group}/{name}": tuple(t.shape) for group, tensors in groups.items() for name, t in tensors.items()}
    for name, payload in update.modules.items():
        shape_of |= {f"modules/{name}/{part}": tuple(t.shape) for part, t in payload.tensors().items()}
    return shape_of
