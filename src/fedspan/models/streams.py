"""Dropout for many clients in one pass, each from a stream of its own: the numbers it would have drawn alone.

Alone, a client seeds the global generator and every dropout layer draws a mask of its own batch's shape from it, layer
after layer. The stream advances by as many numbers as a mask has, so masks are the same only if every draw has the
shape that it has alone: the client's real rows, padded to its own longest and not to that of the whole batch.

Shapes: C clients of b rows each, client by client; t the longest of all their rows, t_k of client k's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedspan.support.errors import FedspanError


class NotRowwise(FedspanError):
    """The error of a layer whose input does not hold the batch's rows one after the other, client by client."""


def drops(model: nn.Module) -> bool:
    """Return whether the model drops anything in training.

    Attention weights and whole layers are dropped by functions, which only the model's configuration shows.
    """
    named = any(getattr(config, name) > 0 for config, name in rates_of_dropout(getattr(model, "config", None)))
    return named or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


def drops_layers(model: nn.Module) -> bool:
    """Return whether the model leaves out whole layers at random in training."""
    rates = rates_of_dropout(getattr(model, "config", None))
    return any("layerdrop" in name and getattr(config, name) > 0 for config, name in rates)


def rates_of_dropout(config: Any) -> Iterator[tuple[Any, str]]:
    """Yield every rate of dropout in a model's configuration and in those inside it, as its holder and its name."""
    for name, value in list(vars(config).items()) if config is not None else ():
        if isinstance(value, float) and "drop" in name:
            yield config, name
        elif name in getattr(config, "sub_configs", ()):
            yield from rates_of_dropout(value)


@dataclass(slots=True)
class BatchLayout:
    """The division of one batch among the clients."""

    rows: Sequence[int]
    """Real rows of each client; the others up to b only fill the batch."""
    lengths: Sequence[int] | None
    """t_k; none for images."""
    width: int
    """b"""
    length: int = 0
    """t"""


class DropoutMode(TorchFunctionMode):
    """A context in which dropout is drawn in a way of its own, by `_dropout` and `_attention`.

    It replaces the functions instead of the layers, since attention weights are dropped inside a function.
    """

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
        raise NotImplementedError

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        raise NotImplementedError


@dataclass
class ClientDropout(DropoutMode):
    """A context in which dropout draws client by client.

    A client's mask has the shape that it would have in a batch of its own, so that on a CPU it is bit for bit the mask
    of `train`. On other devices the fused kernels draw in another order: the same distribution, other numbers.
    """

    generators: Sequence[torch.Generator]
    layout: BatchLayout = field(default_factory=lambda: BatchLayout((), None, 0))

    def __post_init__(self) -> None:
        super().__init__()

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * self._noise(x, p) if training and p > 0 else x

    def _noise(self, like: Tensor, p: float) -> Tensor:
        """Draw noise of the shape of `like`, each entry 0 or 1/(1−p); in padding it is 1."""
        width, count = self.layout.width, len(self.layout.rows)
        if like.shape[0] != width * count:
            raise NotRowwise(f"dropout on {tuple(like.shape)}: expected {width * count} rows first")
        noise = torch.ones_like(like, memory_format=torch.contiguous_format)
        for k in range(count):
            shape = [self.layout.rows[k], *like.shape[1:]]
            part = noise[k * width : k * width + shape[0]]
            if self.layout.lengths is not None:
                for dim in _sequence_dims(like, self.layout.length):
                    shape[dim] = self.layout.lengths[k]
                    part = part.narrow(dim, 0, shape[dim])
            # Into a tensor of its own: a draw into a part of a larger one may take the numbers in another order.
            drawn = torch.empty(shape, dtype=like.dtype, device=like.device)
            part.copy_(drawn.bernoulli_(1 - p, generator=self.generators[k]).div_(1 - p))
        return noise

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        p = options.pop("dropout_p")
        weights, value = attention_weights(query, key, value, *args, **options)
        return (weights * self._noise(weights, p)) @ value


def attention_weights(
    query: Tensor,  # (rows, heads, t, d)
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the weights of `scaled_dot_product_attention`, (rows, heads, t, t), and the values of every head.

    The unfused computation, which has the weights as one tensor; with dropout, torch on a CPU runs the same one.
    """
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
    return scores.softmax(dim=-1), value


def _sequence_dims(like: Tensor, length: int) -> tuple[int, ...]:
    """Return the dimensions that run over the tokens, of (rows, t, hidden) and of (rows, heads, t, t)."""
    dims = {2: (), 3: (1,), 4: (2, 3)}.get(like.ndim)
    if dims is None or any(like.shape[dim] != length for dim in dims):
        raise NotRowwise(f"dropout on {tuple(like.shape)}: expected (rows, {length}, …) or (rows, heads, …)")
    return dims
