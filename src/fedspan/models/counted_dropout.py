"""Dropout on a device: every mask is a function of the client, the step and the place, and of nothing else.

A generator's numbers depend on the shape of what is drawn, and so on which clients share a pass and how far their rows
are padded. Here a number is a hash of the client's own seed for the step, of how many times dropout was applied before
in this pass, and of the place (row of the client, head, token, channel): a client is given the same masks in every
company and under every padding, one small kernel draws those of all clients, and nothing is kept for the way back.

Shapes: C clients of b rows each, client by client; t tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspan.models import attention_kernel, dropout_kernel
from fedspan.models.streams import DropoutMode, NotRowwise, attention_weights

_WORD = 0xFFFFFFFF
_TOKENS = 1 << 13
"""The stride of the token in the number of a place: more than a row ever has, so that padding changes no number."""


def step_seeds(seed: int, num_steps: int) -> list[tuple[int, int]]:
    """Return the two words of 32 bits that a client's masks of each step are drawn from (splitmix64 of `seed`)."""
    words: list[tuple[int, int]] = []
    for step in range(num_steps):
        z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & (1 << 64) - 1
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
        z = (z ^ z >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
        z ^= z >> 31
        words.append((z & _WORD, z >> 32))
    return words


@dataclass
class CountedDropout(DropoutMode):
    """A context in which dropout is a function of each client's seeds."""

    seeds: Tensor  # (C, 2) int64, the words of this step
    rows: Tensor | None = None  # (C·b,) int64, the number of each row within its client's batch; None: 0, 1, …, b − 1
    calls: int = 0
    """The number of times dropout was applied in this pass."""

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Any:
        self.calls = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p <= 0:
            return x
        self.calls += 1
        if x.shape[0] % len(self.seeds):
            raise NotRowwise(f"dropout on {tuple(x.shape)}: expected the rows of {len(self.seeds)} clients first")
        dropped: Tensor = _Dropped.apply(x, self.seeds, self._rows(x), self.calls, p)  # type: ignore[no-untyped-call]
        return dropped

    def _rows(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            return self.rows
        return torch.arange(x.shape[0], device=x.device) % (x.shape[0] // len(self.seeds))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not attention_kernel.usable(query, key, value, attn_mask) or query.shape[0] % len(self.seeds):
            weights, value = attention_weights(query, key, value, attn_mask, is_causal, scale, enable_gqa)
            return self._dropout(weights, dropout_p) @ value
        self.calls += 1
        scaled = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        drawn = (self.seeds, self._rows(query), self.calls, dropout_p, threshold(dropout_p), _TOKENS)
        apply: Callable[..., Tensor] = attention_kernel.Attention.apply  # torch gives it no type
        return apply(query, key, value, attn_mask, *drawn, scaled, is_causal)


class _Dropped(torch.autograd.Function):
    """x times its mask; the mask is drawn again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, rows: Tensor, call: int, p: float) -> Tensor:
        ctx.save_for_backward(seeds, rows)
        ctx.drawn = (call, p)
        return masked(x, seeds, rows, call, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return masked(grads[0], *ctx.saved_tensors, *ctx.drawn), None, None, None, None


def masked(x: Tensor, seeds: Tensor, rows: Tensor, call: int, p: float) -> Tensor:
    """Return x with each entry either 0, with probability p, or divided by 1 − p.

    Parameters
    ----------
    x
        (C·b, …): (rows, channels), (rows, t, channels), or (rows, heads, t, t).
    seeds
        (C, 2) int64.
    rows
        (C·b,) int64, the number of each row within its client's batch.
    """
    if dropout_kernel.usable(x):
        return dropout_kernel.masked(x, seeds, rows, call, p, _TOKENS, threshold(p))
    return x * mask(x, seeds, rows, call, p)


def threshold(p: float) -> int:
    """Return the hash below which an entry is dropped."""
    return min(_WORD, math.floor(p * 2**32))


def mask(x: Tensor, seeds: Tensor, rows: Tensor, call: int, p: float) -> Tensor:
    """Return the mask of `x`, in ordinary operations: the kernel's definition, and its stand-in where there is none."""
    count, *middle, channels = x.shape
    device = x.device
    lo, hi = seeds.repeat_interleave(count // len(seeds), dim=0, output_size=count).unbind(dim=1)
    shape = [1] * len(middle)
    place, lo, hi = (v.view(count, *shape) for v in (rows, lo, hi))
    for dim, size in enumerate(middle):
        stride = _TOKENS if dim == len(middle) - 1 else size
        index = torch.arange(size, device=device).view(*[size if i == dim else 1 for i in range(len(middle))])
        place = place * stride + index
    key = _mixed(_mixed(place * 0x9E3779B9 & _WORD ^ lo) ^ hi ^ (call * 0x85EBCA6B & _WORD))[..., None]
    drawn = _mixed(key + torch.arange(channels, device=device) * 0xC2B2AE35 & _WORD)
    return (drawn >= threshold(p)).to(x.dtype) / (1 - p)


def _mixed(x: Tensor) -> Tensor:
    """Return a hash of 32 bits of each word ("lowbias32", Wellons 2018), as int64."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16
