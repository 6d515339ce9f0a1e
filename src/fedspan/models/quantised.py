"""A frozen base in 8 or 4 bits: quantised while it is loaded, multiplied in the type of what comes in.

bitsandbytes quantises, and transformers has it do so weight by weight; what the two leave behind is taken over into
layers of plain tensors. Their arithmetic is that of a linear layer whose weight is the dequantised Ŵ, in training
and in evaluation, on every device; Ŵ lives no longer than one product.

Shapes: W (m, n) = (out_features, in_features), row by row in memory; g blocks of 64 weights in nf4.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedspan.methods import METHODS
from fedspan.support.errors import FedspanError

Quantise = Literal["none", "int8", "nf4"]
_BLOCK = 64
_LARGEST_CODE = 127


def check(quantise: str, trains: str) -> None:
    """Whether a base can be held so in this environment, for a method that trains what `trains` says.

    Raises
    ------
    ValueError
        When it cannot, before anything is loaded.
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
        with _quiet():
            importlib.import_module("bitsandbytes")
    except Exception as error:  # a wheel for another machine fails in a way of its own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FedspanError(f"model.quantise = {quantise!r}: bitsandbytes cannot be used here ({first})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice on kernels of its own, which are not used here."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def settings(quantise: str, dtype: torch.dtype, whole: Sequence[str]) -> dict[str, Any]:
    """What transformers' `BitsAndBytesConfig` is made of.

    Parameters
    ----------
    whole
        Modules that stay as they are, with everything in them.
    """
    # The library takes a name for the beginning or the end of another; in brackets it is the beginning alone.
    skipped = {"llm_int8_skip_modules": [f"(?:{re.escape(name)})" for name in whole]}
    if quantise == "int8":
        return {"load_in_8bit": True, **skipped}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **skipped}


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in few bits: y = x Ŵᵀ + bias.

    int8: Ŵ_ij = s_i c_ij / 127, one scale a row, s_i = max_j |W_ij| (Dettmers et al., 2022, arXiv 2208.07339).
    nf4: Ŵ = s_g L[c], the sixteen levels L near quantiles of a normal distribution and s_g the largest |W| of 64
    that follow one another (Dettmers et al., 2023, arXiv 2305.14314).

    Differences: activations are never quantised (LLM.int8 does), so that a row of a batch is computed as it would be
    alone and the gradient is that of the function; nf4's scales stay in float32 and are not quantised once more.
    """

    scale: Tensor
    pairs: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, shape: tuple[int, int], bias: Tensor | None, pairs: Tensor | None = None
    ) -> None:
        """Take quantised tensors over.

        Parameters
        ----------
        codes
            int8 (m, n); with `pairs` uint8, two weights a byte, the first one in the higher half.
        scale
            (m,), with `pairs` (g,), in float32.
        pairs
            (256,): the two float32 levels of every byte, as one 8-byte number.
        """
        nn.Module.__init__(self)  # nn.Linear's own would draw a weight
        self.out_features, self.in_features = shape
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_buffer("scale", scale)
        self.register_buffer("pairs", pairs)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Ŵ (m, n), multiplied out in float32 and rounded to `dtype` once."""
        if self.pairs is None:
            return self.weight.to(dtype).mul_((self.scale / _LARGEST_CODE)[:, None])
        count = self.out_features * self.in_features
        whole = count // _BLOCK * _BLOCK
        # Both weights of a byte in one look-up: several times as fast as one by one.
        values = self.pairs.index_select(0, self.weight.view(-1).int()).view(torch.float32)
        values[:whole].view(-1, _BLOCK).mul_(self.scale[: whole // _BLOCK, None])
        values[whole:].mul_(self.scale[-1])
        return values[:count].view(self.out_features, self.in_features).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, n) -> (…, m)."""
        product: Any = _Product.apply  # torch gives it no type
        y: Tensor = product(input, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x Ŵᵀ. Autograd would keep the Ŵ of every layer until it is back; here each is made once more."""

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
    """Put a `QuantisedLinear` in the place of every layer that bitsandbytes has quantised.

    The library's own layers quantise activations, or repack their weights at the first evaluation into a form without
    a gradient (both on some machines only), and use threads that do not survive a fork.
    """
    import bitsandbytes as bnb

    pairs: Tensor | None = None  # of all layers
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
    """(16,) -> (256,): the levels of both halves of a byte side by side, as one number of 8 bytes."""
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return both.float().contiguous().view(torch.int64).view(-1)


def base_size(model: nn.Module) -> tuple[int, int]:
    """Weights of the base, and the bytes that they take; adapters are left out, what is shared counts once."""
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
