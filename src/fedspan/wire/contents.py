"""Tensors by their content: what a site holds, or works out to the same bits, is named by a digest and not sent.

A message lists such a tensor in its place, without a byte, with the SHA-256 of the type, shape, strides and bits with
which it would arrive. The site looks the digest up among what it keeps (`fedspan.site.contents`) and what the method
completes from the news (`Method.complete`). Where it finds nothing of that digest it answers which digests it lacks,
and is asked again with the whole tensors: a wrong belief of the server costs a round trip, and never a round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fedspan.support.errors import FedspanError
from fedspan.wire.framing import ReceivedTensors
from fedspan.wire.precision import Kind, round_trip

LEAST_BYTES = 96
"""Smaller tensors are sent: a digest and its place take 80 bytes."""


class Lacking(FedspanError):
    """A message counts on tensors that this site does not hold.

    Parameters
    ----------
    digests
        Of those tensors.
    """

    def __init__(self, digests: Sequence[str]) -> None:
        super().__init__(f"{len(digests)} tensors that this site does not hold: expected them in the message")
        self.digests = list(digests)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a dense copy of the tensor, in which the order of its dimensions in memory is kept."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def digest(tensor: Tensor, kind: Kind = "float32") -> str:
    """Return the SHA-256 of a tensor as it arrives where it is sent in this type, in hexadecimal.

    The strides belong to it, since results that are computed from another layout differ in the last bits.
    """
    arrived = round_trip(tensor.detach().cpu(), kind)
    described = [str(arrived.dtype), list(arrived.shape), list(dense_strides(arrived))]
    found = hashlib.sha256(json.dumps(described).encode())
    found.update(in_memory_order(arrived).reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, (numel,), in the order in which a dense copy of it has them in memory."""
    strides = dense_strides(tensor)
    order = sorted(range(tensor.ndim), key=lambda d: (-strides[d], d))
    return tensor.permute(order).contiguous().reshape(-1)


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory."""
    return tensor.numel() * tensor.element_size()


def filled(
    tensors: Sequence[Tensor],
    named: Iterable[tuple[int, str]],
    kept: Callable[[str], Tensor | None],
    completed: Callable[[Sequence[Tensor]], Iterable[Tensor]],
) -> ReceivedTensors:
    """Return a message's tensors, those that it names by a digest in their places.

    Parameters
    ----------
    named
        (place, digest) of the tensors that were not sent.
    kept
        Returns what the site keeps under a digest.
    completed
        Given the tensors, those that are still unknown being empty, returns what the method makes of them.

    Raises
    ------
    Lacking
        When some are neither kept nor completed.
    """
    result = ReceivedTensors(tensors)
    missing: dict[str, list[int]] = {}
    for place, name in named:
        result[place]  # before it is set: of a place that is not there, the message is to blame
        tensor = kept(name)
        if tensor is None:
            missing.setdefault(name, []).append(place)
        else:
            result[place] = tensor
    if missing:
        for tensor in completed(result):
            for place in missing.pop(digest(tensor), ()):
                result[place] = tensor
    if missing:
        raise Lacking(sorted(missing))
    return result
