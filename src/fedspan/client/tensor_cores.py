"""The precision of float32 matrix products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedspan.config import EngineConfig


def precision_used(device: torch.device, engine: EngineConfig) -> str:
    """Return the type that float32 matrix products of training are computed in: `tf32` or `float32`."""
    if engine.precision != "auto" or device.type != "cuda" or torch.version.hip is not None:
        return "float32"
    return "tf32" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"


@contextmanager
def tensor_cores(device: torch.device, engine: EngineConfig) -> Iterator[None]:
    """Compute the matrix products of float32 numbers in TF32 inside, where the settings and the device allow it."""
    if precision_used(device, engine) == "float32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
