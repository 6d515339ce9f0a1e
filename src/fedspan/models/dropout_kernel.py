"""The kernel of `counted_dropout`, in Triton, which comes with torch for CUDA; without it there is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    mixed: Any = None

__all__ = ["masked", "mixed", "triton", "usable"]

_ENTRIES = 2048  # of one program: rows of places times channels


def usable(x: Tensor) -> bool:
    """Return whether the kernel runs on this tensor's device and knows its shape."""
    return triton is not None and x.is_cuda and 2 <= x.ndim <= 4


def masked(x: Tensor, seeds: Tensor, numbers: Tensor, call: int, p: float, stride: int, threshold: int) -> Tensor:
    """Return what `counted_dropout.masked` defines."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, channels = x.shape[0], x.shape[-1]
    heads = x.shape[1] if x.ndim == 4 else 1
    tokens = x.shape[-2] if x.ndim > 2 else 1
    columns = min(triton.next_power_of_2(channels), 512)
    height = max(1, _ENTRIES // columns)
    places = x.numel() // channels
    grid = (triton.cdiv(places, height), triton.cdiv(channels, columns))
    _kernel[grid](
        x,
        y,
        seeds,
        numbers,
        places,
        rows // len(seeds),
        heads,
        tokens,
        channels,
        seeds.stride(0),
        call * 0x85EBCA6B & 0xFFFFFFFF,
        threshold,
        1 / (1 - p),
        STRIDE=stride,
        DIMS=x.ndim,
        HEIGHT=height,
        COLUMNS=columns,
    )
    return y


if triton is not None:

    @triton.jit
    def mixed(x):  # type: ignore[no-untyped-def]
        x = ((x ^ (x >> 16)) * 0x7FEB352D).to(tl.uint32)
        x = ((x ^ (x >> 15)) * 0x846CA68B).to(tl.uint32)
        return x ^ (x >> 16)

    @triton.jit(do_not_specialize=["places", "width", "heads", "tokens", "stride", "call", "threshold"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        x_pointer,
        y_pointer,
        seeds_pointer,
        numbers_pointer,
        places,
        width,
        heads,
        tokens,
        channels,
        stride,
        call,
        threshold,
        scale,
        STRIDE: tl.constexpr,
        DIMS: tl.constexpr,
        HEIGHT: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        # Divisions are slow on a GPU: one for each place, none for its channels.
        i = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
        channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        here = i < places
        row = i // (heads * tokens)
        place = tl.load(numbers_pointer + row, mask=here, other=0)
        if DIMS == 4:
            place = place * heads + (i // tokens) % heads
        if DIMS > 2:
            place = place * STRIDE + i % tokens
        client = seeds_pointer + (row // width) * stride
        lo = tl.load(client, mask=here, other=0).to(tl.uint32)
        hi = tl.load(client + 1, mask=here, other=0).to(tl.uint32)
        key = mixed((place.to(tl.uint32) * 0x9E3779B9).to(tl.uint32) ^ lo)
        key = mixed(key ^ hi ^ call.to(tl.uint32))
        drawn = mixed((key[:, None] + channel.to(tl.uint32)[None, :] * 0xC2B2AE35).to(tl.uint32))
        inside = here[:, None] & (channel < channels)[None, :]
        offset = i.to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_pointer + offset, mask=inside, other=0.0)
        y = tl.where(drawn >= threshold.to(tl.uint32), x * scale, 0.0)
        tl.store(y_pointer + offset, y, mask=inside)
