"""Attention of short rows with `counted_dropout`'s masks, in Triton: one program for each row and head.

As ordinary operations the weights of all rows and heads pass through memory seven times on the way there and ten on
the way back, which on a GPU is a quarter of a small model's step. Rows of up to 128 tokens fit into one program's
registers: they are read and written once, and the weights are computed again on the way back.

Shapes: (rows, heads, t, d) with t ≤ 128 and d ≤ 128, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedspan.models.dropout_kernel import mixed, triton

_LONGEST = 128
PRECISION = "tf32"
"""Of the products; `ieee` is for tests in Triton's interpreter."""
_VARYING = ["heads", "t", "d", "width", "stride", "call", "threshold", "m0", "m1", "m2", "m3"]
"""Arguments whose values the compiler is not to look at, which would have it compile for every length of rows."""


def usable(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """Return whether the kernel runs on this device and knows these shapes."""
    alike = query.ndim == 4 and query.shape == key.shape == value.shape
    short = query.shape[-2] <= _LONGEST and query.shape[-1] <= _LONGEST
    plain = all(t.dtype == torch.float32 and t.stride(-1) == 1 for t in (query, key, value))
    known = attn_mask is None or (attn_mask.dtype == torch.bool and attn_mask.ndim == 4)
    # Its products are those of tensor cores; in float32 it takes half a minute to compile, and is no faster.
    rounded = torch.get_float32_matmul_precision() != "highest"
    return triton is not None and query.is_cuda and rounded and alike and short and plain and known


class Attention(torch.autograd.Function):
    """softmax(q kᵀ · scale, masked) · dropout mask · v."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        seeds: Tensor,
        numbers: Tensor,
        call: int,
        p: float,
        threshold: int,
        stride: int,
        scale: float,
        causal: bool,
    ) -> Tensor:
        ctx.options = (call, p, threshold, stride, scale, causal)
        ctx.save_for_backward(query, key, value, attn_mask, seeds, numbers)
        output = _like(query)
        _launch(_forward, query, key, value, attn_mask, seeds, numbers, ctx.options, (output,))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, attn_mask, seeds, numbers = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        found = (_like(query), _like(query), _like(query))
        _launch(_backward, query, key, value, attn_mask, seeds, numbers, ctx.options, (grad, *found))
        return (*found, *[None] * 9)


def _like(query: Tensor) -> Tensor:
    """Return an empty tensor of this shape that lies in memory as (rows, t, heads, d), as the layers around it want."""
    rows, heads, t, d = query.shape
    return torch.empty(rows, t, heads, d, dtype=query.dtype, device=query.device).transpose(1, 2)


def _launch(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    seeds: Tensor,
    numbers: Tensor,
    options: tuple[int, float, int, int, float, bool],
    others: tuple[Tensor, ...],
) -> None:
    call, p, threshold, stride, scale, causal = options
    rows, heads, t, d = query.shape
    masked = attn_mask is not None
    mask = attn_mask.expand(rows, heads, t, t).view(torch.uint8) if attn_mask is not None else seeds
    strides = [s for x in (query, key, value, *others) for s in x.stride()[:3]]
    kernel[(rows * heads,)](
        query,
        key,
        value,
        *others,
        mask,
        seeds,
        numbers,
        *strides,
        *(mask.stride() if masked else (0, 0, 0, 0)),
        heads,
        t,
        d,
        rows // len(seeds),
        seeds.stride(0),
        call * 0x85EBCA6B & 0xFFFFFFFF,
        threshold,
        1 / (1 - p),
        scale,
        MASKED=masked,
        CAUSAL=causal,
        STRIDE=stride,
        T=max(16, triton.next_power_of_2(t)),
        D=max(16, triton.next_power_of_2(d)),
        PRECISION=PRECISION,
        num_warps=4 if t <= 64 else 8,
    )


if triton is not None:
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def _block(pointer, row, head, s0, s1, s2, t, d, T: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
        i, c = tl.arange(0, T), tl.arange(0, D)
        inside = (i < t)[:, None] & (c < d)[None, :]
        start = pointer + row.to(tl.int64) * s0 + head * s1
        return tl.load(start + i[:, None] * s2 + c[None, :], mask=inside, other=0.0)

    @triton.jit  # type: ignore[untyped-decorator]
    def _keep(pointer, row, head, s0, s1, s2, t, d, x, T: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
        i, c = tl.arange(0, T), tl.arange(0, D)
        inside = (i < t)[:, None] & (c < d)[None, :]
        start = pointer + row.to(tl.int64) * s0 + head * s1
        tl.store(start + i[:, None] * s2 + c[None, :], x, mask=inside)

    @triton.jit  # type: ignore[untyped-decorator]
    def _weights(  # type: ignore[no-untyped-def]
        q,
        k,
        row,
        head,
        m_pointer,
        seeds_pointer,
        numbers_pointer,
        m0,
        m1,
        m2,
        m3,
        heads,
        t,
        width,
        stride,
        call,
        threshold,
        scale,
        MASKED: tl.constexpr,
        CAUSAL: tl.constexpr,
        STRIDE: tl.constexpr,
        T: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        """Return the softmax (T, T), and which of its entries are kept."""
        i, j = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = (j < t) & (i < T)
        if CAUSAL:
            seen = seen & (j <= i)
        if MASKED:
            places = m_pointer + row.to(tl.int64) * m0 + head * m1 + i * m2 + j * m3
            seen = seen & (tl.load(places, mask=(i < t) & (j < t), other=0) != 0)
        scores = tl.where(seen, scores, -1e30)
        raised = tl.exp(scores - tl.max(scores, 1)[:, None])
        raised = tl.where(j < t, raised, 0.0)
        softmax = raised / tl.sum(raised, 1)[:, None]
        client = seeds_pointer + (row // width) * stride
        lo, hi = tl.load(client).to(tl.uint32), tl.load(client + 1).to(tl.uint32)
        number = tl.load(numbers_pointer + row)
        place = (number * heads + head) * STRIDE + tl.arange(0, T)
        key = mixed((place.to(tl.uint32) * 0x9E3779B9).to(tl.uint32) ^ lo)
        key = mixed(key ^ hi ^ call.to(tl.uint32))
        drawn = mixed((key[:, None] + j.to(tl.uint32) * 0xC2B2AE35).to(tl.uint32))
        return softmax, drawn >= threshold.to(tl.uint32)

    @triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
    def _forward(  # type: ignore[no-untyped-def]
        q_pointer,
        k_pointer,
        v_pointer,
        o_pointer,
        m_pointer,
        seeds_pointer,
        numbers_pointer,
        q0,
        q1,
        q2,
        k0,
        k1,
        k2,
        v0,
        v1,
        v2,
        o0,
        o1,
        o2,
        m0,
        m1,
        m2,
        m3,
        heads,
        t,
        d,
        width,
        stride,
        call,
        threshold,
        worth,
        scale,
        MASKED: tl.constexpr,
        CAUSAL: tl.constexpr,
        STRIDE: tl.constexpr,
        T: tl.constexpr,
        D: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        q = _block(q_pointer, row, head, q0, q1, q2, t, d, T, D)
        k = _block(k_pointer, row, head, k0, k1, k2, t, d, T, D)
        v = _block(v_pointer, row, head, v0, v1, v2, t, d, T, D)
        softmax, kept = _weights(
            q, k, row, head, m_pointer, seeds_pointer, numbers_pointer, m0, m1, m2, m3,
            heads, t, width, stride, call, threshold, scale, MASKED, CAUSAL, STRIDE, T, PRECISION,
        )  # fmt: skip
        weights = tl.where(kept, softmax * worth, 0.0)
        _keep(o_pointer, row, head, o0, o1, o2, t, d, tl.dot(weights, v, input_precision=PRECISION), T, D)

    @triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
    def _backward(  # type: ignore[no-untyped-def]
        q_pointer,
        k_pointer,
        v_pointer,
        g_pointer,
        dq_pointer,
        dk_pointer,
        dv_pointer,
        m_pointer,
        seeds_pointer,
        numbers_pointer,
        q0,
        q1,
        q2,
        k0,
        k1,
        k2,
        v0,
        v1,
        v2,
        g0,
        g1,
        g2,
        a0,
        a1,
        a2,
        b0,
        b1,
        b2,
        c0,
        c1,
        c2,
        m0,
        m1,
        m2,
        m3,
        heads,
        t,
        d,
        width,
        stride,
        call,
        threshold,
        worth,
        scale,
        MASKED: tl.constexpr,
        CAUSAL: tl.constexpr,
        STRIDE: tl.constexpr,
        T: tl.constexpr,
        D: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        q = _block(q_pointer, row, head, q0, q1, q2, t, d, T, D)
        k = _block(k_pointer, row, head, k0, k1, k2, t, d, T, D)
        v = _block(v_pointer, row, head, v0, v1, v2, t, d, T, D)
        g = _block(g_pointer, row, head, g0, g1, g2, t, d, T, D)
        softmax, kept = _weights(
            q, k, row, head, m_pointer, seeds_pointer, numbers_pointer, m0, m1, m2, m3,
            heads, t, width, stride, call, threshold, scale, MASKED, CAUSAL, STRIDE, T, PRECISION,
        )  # fmt: skip
        weights = tl.where(kept, softmax * worth, 0.0)
        dv = tl.dot(tl.trans(weights), g, input_precision=PRECISION)
        _keep(dv_pointer, row, head, c0, c1, c2, t, d, dv, T, D)
        dw = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        dw = tl.where(kept, dw * worth, 0.0)
        ds = softmax * (dw - tl.sum(dw * softmax, 1)[:, None]) * scale
        _keep(dq_pointer, row, head, a0, a1, a2, t, d, tl.dot(ds, k, input_precision=PRECISION), T, D)
        _keep(dk_pointer, row, head, b0, b1, b2, t, d, tl.dot(tl.trans(ds), q, input_precision=PRECISION), T, D)
