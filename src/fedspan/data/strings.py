"""Columns of text in the memory that the text itself takes.

A Python string has 49 bytes beside its characters and a list of them 8 more, several times the length of a usual cell.
A column is therefore one run of UTF-8 with the end of every text in it, and a string is made when it is asked for.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, overload

import numpy as np

_SURROGATE = 0xED
"""First byte of a surrogate's three in UTF-8; its second is 0xA0 or more, that of a character is less."""
_RUNS_AT_ONCE = 65536  # Python's integers for a part of the rows at a time
_ENCODING = ("utf-8", "surrogatepass")  # JSON may hold unpaired surrogates, which only `surrogate` refuses


class Strings(Sequence[str]):
    """An immutable sequence of N texts.

    Parameters
    ----------
    data
        Their UTF-8, one after the other; (bytes,) uint8.
    ends
        The end of each in `data`; (N,) int64.
    """

    __slots__ = ("data", "ends")
    __hash__ = None  # type: ignore[assignment]  # like a list, it is compared by its content

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Return these texts."""
        builder = StringsBuilder()
        for text in texts:
            builder.append(text)
        return builder.build()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row = int(place) + (len(self) if place < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexError(place)
        begin = int(self.ends[row - 1]) if row else 0
        return self.data[begin : self.ends[row]].tobytes().decode(*_ENCODING)

    def __iter__(self) -> Iterator[str]:
        view = self.data.data
        for start in range(0, len(self), _RUNS_AT_ONCE):
            first = int(self.ends[start - 1]) if start else 0
            for begin, end in pairwise([first, *self.ends[start : start + _RUNS_AT_ONCE].tolist()]):
                yield str(view[begin:end], *_ENCODING)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)
        if isinstance(other, list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __repr__(self) -> str:
        return f"Strings({list(self[:3])}{' …' if len(self) > 3 else ''})"

    def take(self, rows: Sequence[int] | np.ndarray) -> Strings:
        """Return the texts at `rows`, in that order."""
        places = np.asarray(rows, dtype=np.int64)
        places = np.where(places < 0, places + len(self), places)
        begins = np.concatenate([[0], self.ends])  # (N + 1,), so that there is one even without rows
        ends = (self.ends[places] - begins[places]).cumsum()
        data = bytearray(int(ends[-1]) if len(ends) else 0)
        source, target = self.data.data, memoryview(data)
        # Neighbours in a row are neighbours in the data, and are copied together.
        firsts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        lasts = np.append(firsts[1:], len(places)) - 1
        for start in range(0, len(firsts), _RUNS_AT_ONCE):
            first, last = firsts[start : start + _RUNS_AT_ONCE], lasts[start : start + _RUNS_AT_ONCE]
            stop = self.ends[places[last]].tolist()
            for begin, end, place in zip(begins[places[first]].tolist(), stop, ends[last].tolist(), strict=True):
                target[place - (end - begin) : place] = source[begin:end]
        return Strings(np.frombuffer(data, dtype=np.uint8), ends)

    def surrogate(self) -> int | None:
        """Return the first row that holds an unpaired surrogate, which is no character; None where there is none."""
        if len(self.data) < 2:
            return None
        for start in range(0, len(self.data), 1 << 22):
            part = self.data[start : start + (1 << 22) + 1]
            found = np.flatnonzero((part[:-1] == _SURROGATE) & (part[1:] >= 0xA0))
            if len(found):
                return int(np.searchsorted(self.ends, start + int(found[0]), side="right"))
        return None


class StringsBuilder:
    """Collects texts for `Strings`."""

    __slots__ = ("_data", "_ends")

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, text: str) -> None:
        """Add one text."""
        self._data += text.encode(*_ENCODING)
        self._ends.append(len(self._data))

    def extend(self, texts: Iterable[str]) -> None:
        """Add several texts."""
        encoded = [text.encode(*_ENCODING) for text in texts]
        self._ends.extend(accumulate(map(len, encoded[1:]), initial=len(self._data) + len(encoded[0])))
        self._data += b"".join(encoded)

    def build(self) -> Strings:
        """Return the texts; nothing may be added afterwards."""
        return Strings(np.frombuffer(self._data, dtype=np.uint8), np.frombuffer(self._ends, dtype=np.int64))


class Tuples(Sequence[tuple[str, ...]]):
    """The rows of several columns of text as tuples, made when they are asked for."""

    __slots__ = ("columns",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, columns: Sequence[Sequence[str]]) -> None:
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.columns[0])

    @overload
    def __getitem__(self, place: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[str, ...]]: ...
    def __getitem__(self, place: int | slice) -> tuple[str, ...] | list[tuple[str, ...]]:
        if isinstance(place, slice):
            return list(zip(*(column[place] for column in self.columns), strict=True))
        return tuple(column[place] for column in self.columns)

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return zip(*self.columns, strict=True)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Tuples):
            return self.columns == other.columns
        if isinstance(other, list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __repr__(self) -> str:
        return f"Tuples({self[:3]}{' …' if len(self) > 3 else ''})"

    def take(self, rows: Sequence[int] | np.ndarray) -> Tuples:
        """Return the rows at `rows`, in that order."""
        return Tuples([taken(column, rows) for column in self.columns])


class ColumnBuilder:
    """Collects the values of one column: compactly as long as all are text, otherwise as a list."""

    __slots__ = ("_texts", "_values")

    def __init__(self) -> None:
        self._texts = StringsBuilder()
        self._values: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._texts if self._values is None else self._values)

    def append(self, value: Any) -> None:
        """Add one value."""
        if self._values is None:
            if type(value) is str:
                self._texts.append(value)
                return
            self._values = list(self._texts.build())
        self._values.append(value)

    def build(self) -> Sequence[Any]:
        """Return the column; nothing may be added afterwards."""
        return self._texts.build() if self._values is None else self._values


def taken(values: Sequence[Any] | np.ndarray, rows: Sequence[int] | np.ndarray) -> Any:
    """Return the values at `rows`, in a column of the same type."""
    if isinstance(values, np.ndarray):
        return values[np.asarray(rows, dtype=np.int64)]
    if isinstance(values, Strings | Tuples):
        return values.take(rows)
    return [values[i] for i in rows]


def joined(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return the values of several columns (at least one) one after the other."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Strings) for part in parts):
        texts: list[Any] = list(parts)
        shifts = np.cumsum([0, *(len(part.data) for part in texts[:-1])])
        ends = [part.ends + shift for part, shift in zip(texts, shifts, strict=True)]
        return Strings(np.concatenate([part.data for part in texts]), np.concatenate(ends))
    if all(isinstance(part, Tuples) for part in parts):
        tuples: list[Any] = list(parts)
        return Tuples([joined(columns) for columns in zip(*(part.columns for part in tuples), strict=True)])
    return [value for part in parts for value in part]
