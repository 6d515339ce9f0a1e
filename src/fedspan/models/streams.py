"""Dropout for many clients in one pass, each from a stream of its own: the numbers it would have drawn alone.

Shapes: C clients of b rows each, client by client; t the longest of all their rows, t_k of client k's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedspan.support.errors import FedspanError


class NotRowwise(FedspanError):
    """A layer's input does not hold the batch's rows one after the other, so rows cannot be told by client."""


def drops(model: nn.Module) -> bool:
    """Whether the model drops anything in training."""
    settings = vars(model.config) if hasattr(model, "config") else {}
    named = any(("dropout" in k or "pdrop" in k) and isinstance(v, float) and v > 0 for k, v in settings.items())
    return named or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


@dataclass(slots=True)
class Rows:
    """How one batch is divided among the clients."""

    rows: Sequence[int]
    """Real rows of each client; the others up to b only fill the batch."""
    lengths: Sequence[int] | None
    """t_k; none for images."""
    width: int
    """b"""
    length: int = 0
    """t"""


@dataclass
class ClientDropout(TorchFunctionMode):
    """Within it, dropout draws client by client.

    A client's mask has the shape that it would have had in a batch of its own, so that on a CPU it is the very mask
    of `train`. On other devices the fused kernels draw in another order: the same distribution, other numbers.
    """

    generators: Sequence[torch.Generator]
    batch: Rows = field(default_factory=lambda: Rows((), None, 0))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is F.dropout:
            return self._dropout(*args, **options)
        if func is F.scaled_dot_product_attention and options.get("dropout_p", 0.0) > 0:
            return self._attention(*args, **options)
        return func(*args, **options)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * self._noise(x, p) if training and p > 0 else x

    def _noise(self, like: Tensor, p: float) -> Tensor:
        """(…) of `like`: 0 or 1/(1−p)."""
        width, count = self.batch.width, len(self.batch.rows)
        if like.shape[0] != width * count:
            raise NotRowwise(f"dropout on {tuple(like.shape)}: expected {width * count} rows first")
        noise = torch.ones_like(like, memory_format=torch.contiguous_format)
        for k in range(count):
            shape = [self.batch.rows[k], *like.shape[1:]]
            part = noise[k * width : k * width + shape[0]]
            if self.batch.lengths is not None:
                for dim in _sequence_dims(like, self.batch.length):
                    shape[dim] = self.batch.lengths[k]
                    part = part.narrow(dim, 0, shape[dim])
            drawn = torch.empty(shape, dtype=like.dtype, device=like.device)
            part.copy_(drawn.bernoulli_(1 - p, generator=self.generators[k]).div_(1 - p))
        return noise

    def _attention(
        self,
        query: Tensor,  # (rows, heads, t, d)
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(dim=-1)
        return (weights * self._noise(weights, dropout_p)) @ value


def _sequence_dims(like: Tensor, length: int) -> tuple[int, ...]:
    """Which dimensions run over the tokens: (rows, t, hidden) and (rows, heads, t, t)."""
    dims = {2: (), 3: (1,), 4: (2, 3)}.get(like.ndim)
    if dims is None or any(like.shape[dim] != length for dim in dims):
        raise NotRowwise(f"dropout on {tuple(like.shape)}: expected (rows, {length}, …) or (rows, heads, …)")
    return dims
