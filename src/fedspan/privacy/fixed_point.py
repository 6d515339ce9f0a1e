"""Real numbers as 64-bit integers: sums that come out the same in every order, under masks or without them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedspan.support.errors import FedspanError

Words = npt.NDArray[np.uint64]
_LARGEST = 2**63 - 1
_PIECE = 1 << 16  # numbers at a time: half a MiB, so that every step on them finds them in the cache


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """encode(x) = round(2^f·x) mod 2^64, ties to even, and decode(w) = 2^-f·w with w read as a signed integer.

    Laws: Σ encode(x_k) mod 2^64 does not depend on order or grouping; decode(Σ encode(x_k)) is the exact sum of
    the rounded x_k (the float64 nearest to it, where it has more than 53 bits: beyond 2^(53-f));
    |decode(encode(x)) - x| ≤ 2^-(f+1).

    Differences: Bonawitz et al. (2017, doi 10.1145/3133956.3133982) and the quantisers built for it clip to a range
    chosen beforehand. Here a value out of range is an error, and the range is the largest in which the sum cannot wrap.

    Parameters
    ----------
    fraction_bits
        f, from 1 to 62.
    """

    fraction_bits: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.fraction_bits <= 62:
            raise FedspanError(f"fraction_bits = {self.fraction_bits}: expected 1 to 62")

    def limit(self, num_clients: int) -> float:
        """Return the largest |x| that each of `num_clients` clients can add so that the sum cannot wrap."""
        return math.ldexp(self._largest(num_clients), -self.fraction_bits)

    def _largest(self, num_clients: int) -> float:
        """Return the largest float64 that is at most (2^63 - 1)/num_clients."""
        if num_clients < 1:
            raise FedspanError(f"num_clients = {num_clients}: expected at least 1")
        whole = _LARGEST // num_clients
        # float() rounds to nearest, which may be up: for one client to 2^63, which wraps.
        return float(whole) if int(float(whole)) <= whole else math.nextafter(float(whole), 0.0)

    def encode(self, values: Tensor, num_clients: int) -> Words:
        """Return one client's numbers for a sum over at most `num_clients` clients, flattened.

        Parameters
        ----------
        values
            float32 or float64, any shape.

        Returns
        -------
        np.ndarray
            (values.numel(),) of uint64.

        Raises
        ------
        FedspanError
            Naming the first value that is not finite, or so large that the sum could wrap.
        """
        if values.dtype not in (torch.float32, torch.float64):
            raise FedspanError(f"values of {values.dtype}: expected float32 or float64")
        largest, scale = self._largest(num_clients), math.ldexp(1.0, self.fraction_bits)
        flat = values.detach().to("cpu").reshape(-1).numpy()
        words = np.empty(len(flat), np.int64)
        for start in range(0, len(flat), _PIECE):
            exact = flat[start : start + _PIECE].astype(np.float64)
            with np.errstate(over="ignore"):  # an overflow to infinity is refused below, as out of range
                scaled = exact * scale
            np.rint(scaled, out=scaled)
            inside = np.abs(scaled) <= largest  # false for NaN
            if not inside.all():
                place = int(inside.argmin())
                raise FedspanError(
                    f"value {float(exact[place])!r} at {start + place} does not fit the fixed point: expected at most "
                    f"{self.limit(num_clients):.6g} in size for a sum over {num_clients} clients"
                )
            words[start : start + _PIECE] = scaled  # whole numbers, which are converted exactly
        return words.view(np.uint64)

    def decode(self, total: Words) -> Tensor:
        """Return the sum as real numbers: float64 (n,).

        Raises
        ------
        FedspanError
            When `total` is not a vector of uint64.
        """
        if total.dtype != np.uint64 or total.ndim != 1:
            raise FedspanError(f"a sum of {total.dtype} in shape {total.shape}: expected a vector of uint64")
        scale = math.ldexp(1.0, -self.fraction_bits)
        signed, numbers = total.view(np.int64), np.empty(len(total))
        for start in range(0, len(signed), _PIECE):
            piece = slice(start, start + _PIECE)
            np.multiply(signed[piece].astype(np.float64), scale, out=numbers[piece])
        return torch.from_numpy(numbers)
