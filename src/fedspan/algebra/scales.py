"""Changes of scale by powers of two, which are exact, and norms whose squares neither underflow nor overflow.

A product B·A is the same for (2^k B, 2^−k A). float32 holds factors between 1e-38 and 3e38, but not their squares,
which norms and Gram matrices need; so whatever squares a factor brings it to ordinary size first. A power of two
changes no digit: a result at ordinary size has the same bits with and without it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WINDOW = 12
"""Factors whose largest entry is between 2^−12 and 2^12 stay as they are, and are not copied."""
_LEAST, _MOST = 2.0**-50, 2.0**50
"""Norms between these are exact to rounding without a change of scale, in float32 and in float64."""


def exponent(x: Tensor) -> int:
    """Return e with the largest entry of X between 2^(e−1) and 2^e; 0 where X is zero or empty."""
    if x.numel() == 0:
        return 0
    low, high = torch.aminmax(x)
    return math.frexp(max(-float(low), float(high)))[1]


def excess(x: Tensor) -> int:
    """Return the exponent of X where its largest entry is far from 1, and 0 where it is near."""
    e = exponent(x)
    return 0 if abs(e) <= WINDOW else e


def shifted(x: Tensor, by: int | Tensor) -> Tensor:
    """Return 2^by · X, exactly unless the result leaves the range of its type.

    Parameters
    ----------
    by
        One exponent, or integers that broadcast against X.
    """
    if isinstance(by, int):
        # In two steps, because 2^by alone may be out of range where the result is not.
        return x * 2.0 ** (by // 2) * 2.0 ** (by - by // 2) if by else x
    half = torch.div(by, 2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x, half), by - half)


def norms(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Return the Euclidean norms over `dim`, also where their squares are beyond the type's range."""
    size: Tensor = torch.linalg.vector_norm(x, dim=dim)
    if x.numel() == 0 or bool(((size > _LEAST) & (size < _MOST)).all()):
        return size
    by = -row_exponents(x, dim)
    return shifted(torch.linalg.vector_norm(shifted(x, by), dim=dim), -by.reshape(size.shape))


def row_exponents(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the exponents of the largest entries over `dim`, which is kept with length 1; 0 for zeros."""
    largest: Tensor = x.abs().amax(dim=dim, keepdim=True)
    return torch.frexp(largest).exponent
