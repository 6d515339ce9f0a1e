"""Gaussian noise that cannot be predicted without the secret, and that the holder of the secret can draw again.

Everything is float64.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def uniform(secret: int, *key: object, count: int) -> Tensor:
    """Return `count` numbers in (0, 1), 53 bits each: a stream of SHAKE-256 over the secret and the key.

    The run's own generators would be unsafe: their seed is known to every client, which could draw the same noise and
    subtract it; and a generator made for statistics can be recovered from its output.
    """
    content = hashlib.shake_256(_text(secret, key)).digest(8 * count)
    words = np.frombuffer(content, dtype="<u8") >> np.uint64(11)
    # In the middle of its 2⁻⁵³: never 0, whose logarithm the Gaussian transform could not take.
    return torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-53)


def normal(secret: int, *key: object, shape: Iterable[int]) -> Tensor:
    """Return independent N(0, 1) of that shape, by Box and Muller's transform of `uniform`."""
    size = torch.Size(shape)
    half = -(-size.numel() // 2)
    u = uniform(secret, *key, count=2 * half)
    radius, angle = (-2.0 * u[:half].log()).sqrt(), 2.0 * math.pi * u[half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: size.numel()].view(size)


def keyed_digest(secret: int, *key: object) -> str:
    """Return a digest, in hexadecimal, that says nothing about the secret and is another one for every key."""
    return hashlib.sha3_256(_text(secret, key)).hexdigest()


def _text(secret: int, key: tuple[object, ...]) -> bytes:
    # As a list and not joined by a mark: names may hold any mark, and two keys must never come to one text.
    return json.dumps([hex(secret), *map(str, key)]).encode()


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 digest of the tensors' names, types, shapes and bits, in this order."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name!r} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
