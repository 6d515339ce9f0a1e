"""What a server and a site say to each other, as bytes that can be checked.

A message is `MAGIC`, the length of a JSON head, the head, and one flat buffer of tensors. Nothing is unpickled, and
nothing of a message is used before it has been checked: the schema, every tensor's type, size and place, and by
`fedspan.site.site` and `fedspan.server.coordinator` that it belongs to this run, this round, this base and this client.
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
_MOST_HEAD = 2**28
_MOST_TENSORS = 10**6
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
}


class Malformed(FedspanError):
    """Bytes that are no message of this schema."""


@dataclass(slots=True)
class Parcel(packing.Parcel):
    """Tensors on their way, some of them in a narrower type."""

    kind: Kind = "float32"
    narrowed: dict[int, int] = field(default_factory=dict)
    """Place of a tensor -> that of its rows' scales."""
    kinds: dict[int, Kind] = field(default_factory=dict)

    def put(self, tensor: Tensor) -> int:
        """The tensor's place."""
        place = packing.Parcel.put(self, tensor)
        self.kinds.setdefault(place, self.kind)
        return place

    def physical(self) -> tuple[list[Tensor], dict[int, list[int]]]:
        """What is laid into the buffer, and the places of those tensors that are not there as they are."""
        laid: list[Tensor] = []
        places: dict[int, list[int]] = {}
        for place, tensor in enumerate(self.tensors):
            sent = pack(tensor, self.kinds[place])
            places[place] = list(range(len(laid), len(laid) + len(sent)))
            laid += sent
        return laid, places


def encode(head: Mapping[str, Any], parcel: Parcel) -> bytes:
    """One message."""
    laid, places = parcel.physical()
    described, buffer = packing.pack({**head, "schema": SCHEMA, "places": list(places.values())}, laid)
    return b"".join((MAGIC, _LENGTH.pack(len(described)), described, buffer.numpy().tobytes()))


def decode(content: bytes) -> tuple[dict[str, Any], list[Tensor]]:
    """The head and the tensors, in float32 where they travelled in a narrower type.

    Raises
    ------
    Malformed
        When the bytes are no message of this schema.
    """
    start = len(MAGIC) + _LENGTH.size
    if content[: len(MAGIC)] != MAGIC or len(content) < start:
        raise Malformed(f"{len(content)} bytes that are no fedspan message")
    (length,) = _LENGTH.unpack(content[len(MAGIC) : start])
    if length > min(_MOST_HEAD, len(content) - start):
        raise Malformed(f"a head of {length} bytes was announced: expected at most {len(content) - start}")
    try:
        head = json.loads(content[start : start + length])
        _check(head, len(content) - start - length)
        buffer = torch.from_numpy(np.frombuffer(bytearray(memoryview(content)[start + length :]), dtype=np.uint8))
        message, laid = packing.unpack(head, buffer)
        tensors = [unpack(tuple(laid[i] for i in held)) for held in message["places"]]
    except Malformed:
        raise
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, RecursionError) as error:
        raise Malformed(f"a damaged message ({type(error).__name__}: {error})") from None
    return message, tensors


def _check(head: Any, size: int) -> None:
    """That every tensor lies within the buffer, is dense, and of a type that is sent."""
    schema = head["message"].get("schema")
    if schema != SCHEMA:
        raise Malformed(
            f"a message of schema {schema!r}: expected {SCHEMA}; both sides need the same version of fedspan"
        )
    if head["size"] != size:
        raise Malformed(f"a buffer of {size} bytes: expected {head['size']}")
    if len(head["tensors"]) > _MOST_TENSORS:
        raise Malformed(f"{len(head['tensors'])} tensors: expected at most {_MOST_TENSORS}")
    for name, shape, strides, start in head["tensors"]:
        if name not in _DTYPES:
            raise Malformed(f"a tensor of type {name!r}: expected one of {', '.join(_DTYPES)}")
        whole = all(type(x) is int and x >= 0 for x in (*shape, *strides, start))
        if not whole or len(shape) != len(strides) or len(shape) > 8:
            raise Malformed(f"a tensor of shape {shape} and strides {strides}: expected counts")
        count = math.prod(shape)
        if start % packing.LINE or start + count * _DTYPES[name].itemsize > size:
            raise Malformed(f"a tensor of {count} numbers at byte {start} of {size}: it does not fit")
        if count and not _dense(shape, strides):
            raise Malformed(f"a tensor of shape {shape} and strides {strides}: expected it to be dense")


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides walk over every number once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def put_broadcast(parcel: Parcel, sent: Broadcast, derived: Broadcast, kind: Kind) -> dict[str, Any]:
    """A broadcast's description. What the site derives by itself, to the same bits, is left out, and so is the
    patch, of which `put_patch` sends what is new.

    Parameters
    ----------
    derived
        What the method sends before it has learnt anything, which the site can work out too.
    """
    header: dict[str, Any] = {"recipe": packing.put_recipe(sent.recipe), "seeded": sorted(sent.seeded), "adapter": {}}

    def put(value: Tensor, own: Tensor | None, has: bool) -> int | None:
        # What is rounded on the way is rounded for everyone, so it travels even where it is what a site derives.
        parcel.kind = "float32" if has else kind
        return _new(parcel, value, own if has or kind == "float32" else None)

    for name, f in sent.adapter.items():
        own = derived.adapter.get(name)
        b, a = (own.b, own.a) if own is not None else (None, None)
        header["adapter"][name] = [put(f.b, b, "b" in sent.seeded), put(f.a, a, "a" in sent.seeded), f.scaling]
    header["dense"] = {
        name: put(t, derived.dense.get(name), bool({"dense", name} & sent.seeded)) for name, t in sent.dense.items()
    }
    parcel.kind = kind
    header["correction"] = packing.put_dense(parcel, sent.correction)
    parcel.kind = "float32"
    header["moments"] = packing.put_dense(parcel, sent.moments)
    header["subspaces"] = {
        name: [_new(parcel, x.basis, _basis(derived, name)), x.side] for name, x in sent.subspaces.items()
    }
    return header


def get_broadcast(
    header: Mapping[str, Any], tensors: Sequence[Tensor], derived: Broadcast, patch: Mapping[str, Patch]
) -> Broadcast:
    """The broadcast again."""

    def held(place: int | None, own: Tensor | None) -> Tensor:
        if place is not None:
            return tensors[place]
        if own is None:
            raise Malformed(
                "a message leaves out what this site cannot derive: expected the same settings on both sides"
            )
        return own

    adapter: dict[str, Factors] = {}
    for name, (b, a, scaling) in header["adapter"].items():
        own = derived.adapter.get(name)
        adapter[name] = Factors(held(b, own.b if own else None), held(a, own.a if own else None), float(scaling))
    subspaces = {
        name: Subspace(held(place, _basis(derived, name)), side) for name, (place, side) in header["subspaces"].items()
    }
    return Broadcast(
        adapter,
        {name: held(place, derived.dense.get(name)) for name, place in header["dense"].items()},
        packing.get_recipe(header["recipe"]),
        patch=patch,
        seeded=frozenset(header["seeded"]),
        correction=packing.get_dense(header["correction"], tensors),
        subspaces=subspaces,
        moments=packing.get_dense(header["moments"], tensors),
    )


def _basis(derived: Broadcast, name: str) -> Tensor | None:
    return derived.subspaces[name].basis if name in derived.subspaces else None


def _new(parcel: Parcel, value: Tensor, own: Tensor | None) -> int | None:
    """The place of what the site cannot derive."""
    return None if own is not None and _same_bits(value, own) else parcel.put(value)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) and bool((x.signbit() == y.signbit()).all())


def put_patch(parcel: Parcel, sent: Broadcast, seen: int, version: int) -> dict[str, Any]:
    """What a client that holds version `seen` lacks of a broadcast's patch."""
    parcel.kind = "float32"
    if not sent.patch:
        return {"whole": True, "seen": seen, "version": 0, "news": []}
    whole = len(sent.news) == 1 and sent.news[0] is sent.patch
    news = [packing.put_patch(parcel, patch) for patch in sent.news]
    return {"whole": whole, "seen": seen, "version": version, "news": news}


def get_news(header: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[dict[str, LowRank | Tensor]]:
    """The increments, or the one whole patch."""
    return [packing.get_patch(patch, tensors) for patch in header["news"]]


def put_update(parcel: Parcel, update: Update, kind: Kind) -> dict[str, Any]:
    """An update's description."""
    parcel.kind = kind
    return {
        "modules": packing.put_payloads(parcel, update.modules),
        "dense": packing.put_dense(parcel, update.dense),
        "moments": packing.put_dense(parcel, update.moments),
        "num_examples": update.num_examples,
    }


def get_update(header: Mapping[str, Any], tensors: Sequence[Tensor], client_id: str) -> Update:
    """The update again, said to be of this client."""
    return Update(
        client_id,
        float(header["num_examples"]),
        packing.get_payloads(header["modules"], tensors),
        packing.get_dense(header["dense"], tensors),
        packing.get_dense(header["moments"], tensors),
    )


def put_bytes(parcel: Parcel, content: bytes) -> int:
    """The place of plain bytes."""
    return parcel.put(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def get_bytes(tensors: Sequence[Tensor], place: int) -> bytes:
    """The bytes again."""
    return tensors[place].contiguous().numpy().tobytes()


def shapes(update: Update) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that an update holds."""
    held: dict[str, Tensors] = {"dense": update.dense, "moments": update.moments}
    found = {f"{part}/{name}": tuple(t.shape) for part, tensors in held.items() for name, t in tensors.items()}
    for name, payload in update.modules.items():
        found |= {f"modules/{name}/{part}": tuple(t.shape) for part, t in payload.tensors().items()}
    return found
