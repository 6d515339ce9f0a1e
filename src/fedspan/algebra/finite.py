"""The test for NaN and infinity that every message and every server step goes through."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Return whether x holds neither NaN nor infinity."""
    # A sum is finite only where every entry is: one pass, without a mask as large as x. Where it is not, finite entries
    # may have summed to more than the type holds.
    return math.isfinite(float(x.sum())) or bool(torch.isfinite(x).all())
