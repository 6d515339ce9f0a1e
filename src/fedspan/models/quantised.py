"""A frozen base in 8 or 4 bits: quantised while it is loaded, multiplied in the type of its input.

bitsandbytes quantises, called by transformers weight by weight; the resulting layers are then replaced by layers of
plain tensors. Their arithmetic is that of a linear layer whose weight is the dequantised Ŵ, in training
and in evaluation, on every device; Ŵ is in memory for one product only.

Shapes: W (m, n) = (out_features, in_features), row by row in memory; g blocks of 64 weights in nf4.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedspan.methods import METHODS
from fedspan.support.errors import FedspanError, first_line

_BLOCK = 64
_LARGEST_CODE = 127


def check(quantise: str, trains: str) -> None:
    """Check, before anything is loaded, that a base can be quantised here, for a method that trains `trains`.

    Raises
    ------
    FedspanError
        When the method trains base weights, or bitsandbytes cannot be used.
    """
    if quantise == "none":
        return
    if quantise not in ("int8", "nf4"):
        raise FedspanError(f"model.quantise = {quantise!r}: expected none, int8 or nf4")
    if trains != "adapter":
        able = ", ".join(name for name, factory in METHODS.items() if factory().info.trains == "adapter")
        raise FedspanError(
            f"model.quantise = {quantise!r}: this method trains the base's own weights, which are frozen in so few "
            f"bits; methods that train adapters: {able}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedspanError(
            f"model.quantise = {quantise!r}: bitsandbytes is not installed; pip install 'fedspan[quantised]'"
        )
    try:
        with _advice_silenced():
            importlib.import_module("bitsandbytes")
    except Exception as error:  # a wheel for another machine fails in a way of its own
        reason = first_line(error)
        raise FedspanError(f"model.quantise = {quantise!r}: bitsandbytes cannot be used here ({reason})") from None


@contextmanager
def _advice_silenced() -> Iterator[None]:
    """Run without the library's advice on its own kernels, which are not used here."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def settings(quantise: str, dtype: torch.dtype, whole: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of transformers' `BitsAndBytesConfig`.

    Parameters
    ----------
    whole
        Modules that are not quantised, nor anything inside them.
    """
    # The library also skips modules whose names end like a given one; a pattern in brackets matches beginnings alone.
    skipped = {"llm_int8_skip_modules": [f"(?:{re.escape(name)})" for name in whole]}
    if quantise == "int8":
        return {"load_in_8bit": True, **skipped}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **skipped}


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in few bits: y = x Ŵᵀ + bias.

    int8: Ŵ_ij = s_i c_ij / 127, one scale a row, s_i = max_j |W_ij| (Dettmers et al., 2022, arXiv 2208.07339).
    nf4: Ŵ = s_g L[c], the sixteen levels L near quantiles of a normal distribution and s_g the largest |W| of 64
    that follow one another (Dettmers et al., 2023, arXiv 2305.14314).

    Differences: activations are never quantised (as LLM.int8 does), so that each row of a batch is computed as it would
    be alone and gradients are exact for the quantised weights; nf4's scales stay in float32 and are not quantised too.
    """

    scale: Tensor
    pairs: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, shape: tuple[int, int], bias: Tensor | None, pairs: Tensor | None = None
    ) -> None:
        """Make a layer of quantised tensors.

        Parameters
        ----------
        codes
            int8 (m, n); with `pairs` uint8, two weights per byte, the first one in the higher half.
        scale
            (m,), with `pairs` (g,), in float32.
        pairs
            (256,): the two float32 levels of every byte value, as one 8-byte number.
        """
        nn.Module.__init__(self)  # that of nn.Linear would draw a weight
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("scale", scale)
        self.register_buffer("pairs", pairs)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return Ŵ (m, n), multiplied out in float32 and rounded to `dtype` once."""
        if self.pairs is None:
            return self.weight.to(dtype).mul_((self.scale / _LARGEST_CODE)[:, None])
        count = self.out_features * self.in_features
        whole = count // _BLOCK * _BLOCK
        # Both weights of a byte in one look-up, which is several times as fast as one by one.
        values = self.pairs.index_select(0, self.weight.view(-1).int()).view(torch.float32)
        values[:whole].view(-1, _BLOCK).mul_(self.scale[: whole // _BLOCK, None])
        values[whole:].mul_(self.scale[-1])
        return values[:count].view(self.out_features, self.in_features).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Compute (…, n) -> (…, m)."""
        product: Any = _Product.apply  # torch gives it no type
        y: Tensor = product(input, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x Ŵᵀ. Autograd would keep the Ŵ of every layer until the backward pass; here each is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x.to(dtype), layer.dense(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return (grad @ ctx.layer.dense(grad.dtype)).to(ctx.dtype), None


def take_over(model: Any) -> None:
    """Replace every layer that bitsandbytes has quantised by a `QuantisedLinear`.

    The library's own layers quantise activations, or repack their weights at the first evaluation into a form without
    a gradient (each on some machines only), and use threads that do not survive a fork.
    """
    import bitsandbytes as bnb

    pairs: Tensor | None = None  # one table for all layers
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear8bitLt):
            weight, shape = layer.weight, (layer.out_features, layer.in_features)
            own = QuantisedLinear(weight.data, weight.SCB.float(), shape, layer.bias)
        elif isinstance(layer, bnb.nn.Linear4bit):
            state, shape = layer.weight.quant_state, (layer.out_features, layer.in_features)
            assert state.blocksize == _BLOCK
            assert not state.nested
            assert tuple(state.shape) == shape
            pairs = _pairs(state.code) if pairs is None else pairs
            own = QuantisedLinear(layer.weight.data, state.absmax.float(), shape, layer.bias, pairs)
        else:
            continue
        model.set_submodule(name, own)
    model.hf_quantizer.remove_quantization_config(model)


def _pairs(levels: Tensor) -> Tensor:
    """Turn (16,) levels into (256,): those of both halves of a byte side by side, as one number of 8 bytes."""
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return both.float().contiguous().view(torch.int64).view(-1)


def base_size(model: nn.Module) -> tuple[int, int]:
    """Return the number of the base's weights, and their bytes; adapters are left out, shared weights count once."""
    weights, size = 0, 0
    seen: set[int] = set()
    quantised = {
        id(m.weight): m.out_features * m.in_features for m in model.modules() if isinstance(m, QuantisedLinear)
    }
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        size += tensor.numel() * tensor.element_size()
        if isinstance(tensor, nn.Parameter):
            weights += quantised.get(id(tensor), tensor.numel())
    return weights, size
