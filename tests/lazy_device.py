"""A second device on a machine without GPUs: `lazy` of torch's builds for CPUs, whose tensors refuse those of `cpu`.

What it lacks: fused optimizers (:func:`plain_optimizers` takes others), addresses of its memory, autocast, a module of
its own in torch, which checkpointing looks for, the parts of a split tensor, and products of single numbers with
Python's, so that the loss of text that is written is better on the CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

LAZY = "lazy:0"


@cache
def _begin() -> None:
    from torch._lazy import ts_backend

    ts_backend.init()  # which fails a second time


def begin() -> None:
    """Make the device usable, or skip the test."""
    try:
        _begin()
    except (ImportError, RuntimeError):
        pytest.skip("this build of torch has no lazy device")


class PlainAdamW(torch.optim.AdamW):
    """Not fused, and every step is computed when it is taken: the device would compile a longer program for each."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "fused": False})

    def step(self, *args: Any) -> None:
        super().step(*args)
        torch._lazy.mark_step()


class PlainSGD(torch.optim.SGD):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "fused": False})

    def step(self, *args: Any) -> None:
        super().step(*args)
        torch._lazy.mark_step()


def plain_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let local training step with optimizers that the device has."""
    monkeypatch.setattr(torch.optim, "AdamW", PlainAdamW)
    monkeypatch.setattr(torch.optim, "SGD", PlainSGD)
