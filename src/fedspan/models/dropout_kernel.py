"""The kernel of `counted_dropout`, in Triton, which comes with torch for CUDA; without it there is none."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_BLOCK = 1024


def usable(x: Tensor) -> bool:
    """Return whether the kernel runs on this tensor's device and knows its shape."""
    return triton is not None and x.is_cuda and 2 <= x.ndim <= 4


def masked(x: Tensor, seeds: Tensor, call: int, p: float, tokens: int, threshold: int) -> Tensor:
    """Return what `counted_dropout.masked` defines."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, channels = x.shape[0], x.shape[-1]
    heads = x.shape[1] if x.ndim == 4 else 1
    places = x.shape[-2] if x.ndim > 2 else 1
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    _kernel[grid](
        x,
        y,
        seeds,
        x.numel(),
        rows // len(seeds),
        heads,
        places,
        channels,
        seeds.stride(0),
        call * 0x85EBCA6B & 0xFFFFFFFF,
        threshold,
        1 / (1 - p),
        TOKENS=tokens,
        DIMS=x.ndim,
        BLOCK=_BLOCK,
    )
    return y


if triton is not None:

    @triton.jit
    def _mixed(x):  # type: ignore[no-untyped-def]
        x = ((x ^ (x >> 16)) * 0x7FEB352D).to(tl.uint32)
        x = ((x ^ (x >> 15)) * 0x846CA68B).to(tl.uint32)
        return x ^ (x >> 16)

    @triton.jit(do_not_specialize=["size", "width", "heads", "places", "channels", "stride", "call", "threshold"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        x_pointer,
        y_pointer,
        seeds_pointer,
        size,
        width,
        heads,
        places,
        channels,
        stride,
        call,
        threshold,
        scale,
        TOKENS: tl.constexpr,
        DIMS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        channel = (i % channels).to(tl.uint32)
        i_place = i // channels
        row = i_place // (heads * places)
        place = row % width
        if DIMS == 4:
            place = place * heads + (i_place // places) % heads
        if DIMS > 2:
            place = place * TOKENS + i_place % places
        client = seeds_pointer + (row // width) * stride
        lo = tl.load(client, mask=inside, other=0).to(tl.uint32)
        hi = tl.load(client + 1, mask=inside, other=0).to(tl.uint32)
        key = _mixed((place.to(tl.uint32) * 0x9E3779B9).to(tl.uint32) ^ lo)
        key = _mixed(key ^ hi ^ call.to(tl.uint32))
        drawn = _mixed((key + channel * 0xC2B2AE35).to(tl.uint32))
        x = tl.load(x_pointer + i, mask=inside, other=0.0)
        y = tl.where(drawn >= threshold.to(tl.uint32), x * scale, 0.0)
        tl.store(y_pointer + i, y, mask=inside)
