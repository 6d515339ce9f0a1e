"""The content of the messages between a server and a site: broadcasts, patches and updates in a head and tensors.

`fedspan.wire.framing` makes bytes of them, and `fedspan.wire.schema` checks every field of a head. No part of a message
is used before it has been checked, there, and in `fedspan.site` and `fedspan.server` that it belongs to this run, this
round, this base and this client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Broadcast, Factors, Subspace, Tensors, Update
from fedspan.methods.patches import Patch
from fedspan.wire import packing
from fedspan.wire.framing import DAMAGED, Malformed, MessageTensors, decode, encode
from fedspan.wire.precision import Kind

__all__ = [
    "DAMAGED",
    "Malformed",
    "MessageTensors",
    "decode",
    "encode",
    "get_broadcast",
    "get_bytes",
    "get_news",
    "get_update",
    "put_broadcast",
    "put_bytes",
    "put_patch",
    "put_update",
    "same_bits",
    "shapes",
    "types",
]


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
        left, right = received(b, own.b if own else None), received(a, own.a if own else None)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            raise Malformed(f"factors of {name} in shapes {shapes}: expected (m, r) and (r, n)")
        adapter[name] = Factors(left, right, float(scaling))
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
    return None if own is not None and same_bits(value, own) else outgoing.put(value)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors have the same type, shape and bits."""
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
    return {name: tuple(t.shape) for name, t in _named(update)}


def types(update: Update) -> dict[str, torch.dtype]:
    """Return the type of every tensor of an update, by its name."""
    return {name: t.dtype for name, t in _named(update)}


def _named(update: Update) -> Iterator[tuple[str, Tensor]]:
    groups: dict[str, Tensors] = {"dense": update.dense, "moments": update.moments}
    for group, tensors in groups.items():
        yield from ((f"{group}/{name}", t) for name, t in tensors.items())
    for name, payload in update.modules.items():
        yield from ((f"modules/{name}/{part}", t) for part, t in payload.tensors().items())
