"""Token ids of many rows in the memory that the ids themselves take.

An array of its own for every row has 120 bytes beside its ids, and int64 twice the bytes of any vocabulary. Here all
rows are one run of int32 with the end of each row in it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor

_CODES = {"i": np.int32, "h": np.int16, "b": np.int8}


class TokenRows(Sequence[np.ndarray]):
    """Rows of integers that are added one after the other; row i is an array of its own length, int32 unless said.

    Parameters
    ----------
    code
        The type of the integers as `array` has it: `i` int32, `h` int16, `b` int8.
    """

    __slots__ = ("_code", "_data", "_ends")

    def __init__(self, code: str = "i") -> None:
        self._code, self._data, self._ends = code, array(code), array("q")

    def append(self, row: Sequence[int] | np.ndarray) -> None:
        """Add a row."""
        if isinstance(row, np.ndarray):
            self._data.frombytes(np.ascontiguousarray(row, dtype=_CODES[self._code]).tobytes())
        else:
            self._data.extend(row)
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, place: slice) -> list[np.ndarray]: ...
    def __getitem__(self, place: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        begin = self._ends[place - 1] if place else 0
        # A copy: as long as a view is alive, nothing can be added.
        return np.array(self._data[begin : self._ends[place]], dtype=_CODES[self._code])

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self)))

    def lengths(self) -> Tensor:
        """Return the length of every row, (N,) int64."""
        return torch.from_numpy(np.diff(np.asarray(self._ends, dtype=np.int64), prepend=0))

    def flat(self, tail: int) -> Tensor:
        """Return all rows one after the other, and `tail` zeros; no row can be added any more."""
        self._data.extend([0] * tail)
        return torch.from_numpy(np.frombuffer(self._data, dtype=_CODES[self._code]))

    def counts(self, value: int) -> np.ndarray:
        """Return how often every row has this value, (N,)."""
        data = np.frombuffer(self._data, dtype=_CODES[self._code])[: self._ends[-1]]
        before = np.concatenate([[0], np.cumsum(data == value)])
        return np.diff(before[np.asarray(self._ends)], prepend=0)
