"""Gaussian noise that nobody without the secret can foresee, and that who holds it can draw again.

Shapes: whatever is asked for. Everything is float64.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedspan.support.errors import FedspanError

SECRET_BITS = 256


def uniform(secret: int, *key: object, count: int) -> Tensor:
    """`count` numbers in (0, 1), 53 bits each: a stream of SHAKE-256 over the secret and the key.

    The run's own generators will not do: their seed is known to every client, who could draw the same noise and
    subtract it; and a generator made for statistics can be told from its own output.
    """
    text = "/".join(map(str, (hex(secret), *key)))
    content = hashlib.shake_256(text.encode()).digest(8 * count)
    words = np.frombuffer(content, dtype="<u8") >> np.uint64(11)
    return torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-53)


def normal(secret: int, *key: object, shape: Iterable[int]) -> Tensor:
    """Independent N(0, 1), by Box and Muller's transform of `uniform`."""
    size = torch.Size(shape)
    half = -(-size.numel() // 2)
    u = uniform(secret, *key, count=2 * half)
    radius, angle = (-2.0 * u[:half].log()).sqrt(), 2.0 * math.pi * u[half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: size.numel()].view(size)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What tells these tensors, in this order, from any others."""
    found = hashlib.sha256()
    for name, value in tensors:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def kept_secret(path: Path) -> Callable[[], int]:
    """The secret in that file, drawn from the operating system and written there when it is first asked for.

    The file belongs to whoever adds the noise and to nobody else: it is readable by its owner alone.
    """

    def secret() -> int:
        if not path.exists():
            _write(path, secrets.randbits(SECRET_BITS))
        text = path.read_text(encoding="ascii").strip()
        try:
            return int(text, 16)
        except ValueError:
            raise FedspanError(f"{path} is damaged: expected a hexadecimal number") from None

    return secret


def _write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(f"{value:x}\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # whole or not at all, and never over another one
    finally:
        temporary.unlink(missing_ok=True)
