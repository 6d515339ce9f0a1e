"""A message as bytes: `MAGIC`, the length of a JSON head, the head, and one flat buffer of tensors.

Nothing is unpickled. Every message is written in one way only, and `decode` accepts no other: plain finite JSON without
repeated keys, and tensors of a few types that lie in the buffer one after the other, dense, each named once.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedspan.support.errors import FedspanError, one_line
from fedspan.wire import packing
from fedspan.wire.envelope import opened
from fedspan.wire.precision import Kind, pack, unpack

SCHEMA = 6
MAGIC = b"FSPN"
_LENGTH = struct.Struct(">I")
_MAX_HEAD_BYTES = 2**25
_MAX_TENSORS = 10**5
_MAX_DIMENSIONS = 8
_MAX_DIGITS = 19
"""Of an integer, so that none is beyond 64 bits, and every one can be made a float."""
_MAX_DEPTH = 32
_MAX_ENTRIES = 5 * 10**5
"""Of all objects of a head together."""
_MAX_REAL = 32
"""Characters of a number with a point or an exponent; Python writes at most 24."""
# It matches at every quotation mark, to the end of the head where the string has none, and never goes back: a search
# that can fail at one mark begins again at the next, and one small message keeps the process busy for days.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_DTYPES = {name: packing.DTYPES[name] for name in ("float32", "bfloat16", "int8", "int64", "uint8")}
_ALL_KINDS: tuple[Kind, ...] = get_args(Kind)
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""The errors of reading a head that lies about its content: a field that is missing, of another type, or a number
beyond all floats. Anyone may have written it, so they say nothing about this program."""


class Malformed(FedspanError):
    """Bytes that are not a message of this schema."""


class ReceivedTensors(list[Tensor]):
    """The tensors of a message that came, which the head names by their places."""

    def __getitem__(self, place: Any) -> Any:
        try:
            return list.__getitem__(self, place)
        except IndexError:
            raise Malformed(f"a message of {len(self)} tensors that names tensor {place}") from None


@dataclass(slots=True)
class MessageTensors(packing.TensorList):
    """The tensors of a message, each in the type that it travels in."""

    kind: Kind = "float32"
    """The type of the tensors that are put next."""
    kinds: dict[int, Kind] = field(default_factory=dict)
    """Index of a tensor -> its type."""
    held: dict[int, str] = field(default_factory=dict)
    """Index of a tensor that the receiver has -> its digest. An empty tensor is sent in its place."""

    def put(self, tensor: Tensor) -> int:
        """Add the tensor unless it is there already, and return its index."""
        index = packing.TensorList.put(self, tensor)
        self.kinds.setdefault(index, self.kind)
        return index

    def packed(self) -> tuple[list[Tensor], list[int]]:
        """Return the tensors of the buffer, and the number of them, one or two, that each tensor of this list is."""
        buffered: list[Tensor] = []
        parts: list[int] = []
        for index, tensor in enumerate(self.tensors):
            packed = (torch.empty(0),) if index in self.held else pack(tensor, self.kinds[index])
            parts.append(len(packed))
            buffered += packed
        return buffered, parts

    def payload(self) -> int:
        """Return the bytes of the tensors as they travel, without what aligns them."""
        return sum(t.numel() * t.element_size() for t in self.packed()[0])


def encode(head: Mapping[str, Any], outgoing: MessageTensors) -> bytes:
    """Return one message as bytes."""
    buffered, parts = outgoing.packed()
    described, buffer = packing.pack({**head, "schema": SCHEMA, "parts": parts}, buffered)
    return b"".join((MAGIC, _LENGTH.pack(len(described)), described, buffer.numpy().data))


def decode(content: bytes, kinds: Sequence[Kind] = _ALL_KINDS) -> tuple[dict[str, Any], list[Tensor]]:
    """Return a message's head and tensors, in float32 where they travelled in a smaller type; an envelope is taken off.

    Parameters
    ----------
    kinds
        The types in which matrices of real numbers may have travelled.

    Raises
    ------
    Malformed
        When the bytes are not a message of this schema.
    """
    content = opened(content)[1]
    head, end = _head(content)
    message, parts = _checked_head(head, len(content) - end)
    # A copy, since tensors over read-only bytes would be undefined behaviour for a writer.
    buffer = torch.from_numpy(np.frombuffer(bytearray(memoryview(content)[end:]), dtype=np.uint8))
    _, buffered = packing.unpack(head, buffer)
    return message, _joined(buffered, parts, kinds)


def amended(content: bytes, fields: Mapping[str, Any]) -> bytes:
    """Return a message that has passed `decode` with some fields of its head replaced, and the same bytes of tensors.

    A message that is passed on keeps its tensors to the bit so, in whatever type they travel.
    """
    content = opened(content)[1]
    head, end = _head(content)
    described = json.dumps({**head, "message": {**head["message"], **fields}}).encode()
    return b"".join((MAGIC, _LENGTH.pack(len(described)), described, memoryview(content)[end:]))


def head_of(content: bytes) -> dict[str, Any]:
    """Return the message of a head, of which nothing is checked but that it is JSON; its tensors are not looked at.

    Raises
    ------
    Malformed
        When there is none.
    """
    head = _head(content)[0]
    message = head.get("message") if isinstance(head, dict) else None
    if not isinstance(message, dict):
        raise Malformed("a head without a message")
    return message


def _head(content: bytes) -> tuple[Any, int]:
    """Return the JSON of a message's head, and the place where the head ends."""
    start = len(MAGIC) + _LENGTH.size
    if content[: len(MAGIC)] != MAGIC or len(content) < start:
        raise Malformed(f"{len(content)} bytes that are no fedspan message")
    (length,) = _LENGTH.unpack(content[len(MAGIC) : start])
    if length > min(_MAX_HEAD_BYTES, len(content) - start):
        raise Malformed(f"a head of {length} bytes was announced: expected at most {len(content) - start}")
    return _parsed(content[start : start + length]), start + length


def _parsed(head: bytes) -> Any:
    """Return the JSON of a head, which is not nested deeply and holds 64-bit numbers only."""
    marks = np.frombuffer(_STRING.sub(b"", head), dtype=np.uint8)
    # Before the parser, whose own end of a deep nesting is the end of the interpreter's stack.
    if _depth(marks) > _MAX_DEPTH:
        raise Malformed(f"a head that is nested more than {_MAX_DEPTH} deep")
    if (entries := int((marks == ord(":")).sum())) > _MAX_ENTRIES:
        raise Malformed(f"a head of {entries} entries: expected at most {_MAX_ENTRIES}")
    try:
        return json.loads(
            head.decode("ascii"),  # as `json.dumps` writes it; a character of another script is an escape in it
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_no_number,
        )
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"a head that is no JSON ({one_line(error, 100)})") from None


def _depth(marks: NDArray[np.uint8]) -> int:
    """Return the depth of the nesting of a head without its strings."""
    opened = (marks == ord("[")) | (marks == ord("{"))
    closed = (marks == ord("]")) | (marks == ord("}"))
    return int((opened.astype(np.int8) - closed.astype(np.int8)).cumsum(dtype=np.int32).max(initial=0))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise Malformed("a head that names a key twice")
    return content


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise Malformed(f"an integer of {len(text)} digits: expected at most {_MAX_DIGITS}")
    return int(text)


def _real(text: str) -> float:
    if len(text) > _MAX_REAL:
        raise Malformed(f"a number of {len(text)} characters: expected at most {_MAX_REAL}")
    value = float(text)
    if not math.isfinite(value):
        raise Malformed(f"the number {one_line(text, 40)}: expected a finite one")
    return value


def _no_number(text: str) -> float:
    raise Malformed(f"the number {text}: expected a finite one")


def _checked_head(head: Any, size: int) -> tuple[dict[str, Any], list[int]]:
    """Return the message of a head, and the parts of its tensors, all of which are in a buffer of `size` bytes."""
    if not isinstance(head, dict) or head.keys() != {"message", "tensors", "size"}:
        raise Malformed("a head that is not a message with its tensors and their size")
    message, layout = head["message"], head["tensors"]
    if not isinstance(message, dict) or not isinstance(layout, list):
        raise Malformed("a message that is no object, or tensors that are no list")
    schema, parts = message.pop("schema", None), message.pop("parts", None)
    if type(schema) is not int or schema != SCHEMA:
        raise Malformed(
            f"a message of schema {one_line(repr(schema), 40)}: expected {SCHEMA}; both sides need the same version of "
            "fedspan"
        )
    if type(head["size"]) is not int or head["size"] != size:
        raise Malformed(f"a buffer of {size} bytes: expected {one_line(repr(head['size']), 40)}")
    if len(layout) > _MAX_TENSORS:
        raise Malformed(f"{len(layout)} tensors: expected at most {_MAX_TENSORS}")
    end = 0
    for entry in layout:
        end = _checked_tensor(entry, end, size)
    if end != size:
        raise Malformed(f"tensors of {end} bytes in a buffer of {size}")
    if not isinstance(parts, list) or any(type(n) is not int or n not in (1, 2) for n in parts):
        raise Malformed("a list of the tensors' parts that is not of ones and twos")
    if sum(parts) != len(layout):
        raise Malformed(f"{sum(parts)} parts of tensors: expected {len(layout)}")
    return message, parts


def _checked_tensor(entry: Any, start: int, size: int) -> int:
    """Return the end of a tensor that begins at byte `start`, after checking that it lies dense within the buffer.

    It runs before any view into the buffer is made, so that a head that lies cannot have other memory read.
    """
    if not isinstance(entry, list) or len(entry) != 4:
        raise Malformed("a tensor that is not described by its type, shape, strides and place")
    name, shape, strides, place = entry
    if not isinstance(name, str) or name not in _DTYPES:
        raise Malformed(f"a tensor of type {one_line(repr(name), 40)}: expected one of {', '.join(_DTYPES)}")
    if not _are_counts(shape) or not _are_counts(strides) or len(shape) != len(strides):
        raise Malformed("a tensor whose shape and strides are not counts, as many of one as of the other")
    if math.prod(max(n, 1) for n in shape) >= 2**60:
        raise Malformed("a tensor of more numbers than any memory holds")
    count = math.prod(shape)
    end = start + -(-count * _DTYPES[name].itemsize // packing.LINE) * packing.LINE
    if type(place) is not int or place != start or end > size:
        raise Malformed(f"a tensor of {one_line(count, 40)} numbers at {one_line(repr(place), 40)} does not fit there")
    if count and not _dense(shape, strides):
        raise Malformed(f"a tensor of shape {shape} and strides {strides}: expected it to be dense")
    return end


def _are_counts(values: Any) -> bool:
    # Not isinstance, for which `true` is a number.
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMENSIONS
        and all(type(x) is int and 0 <= x < 2**40 for x in values)
    )


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether the strides walk over every number once."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _joined(buffered: Sequence[Tensor], parts: Sequence[int], kinds: Sequence[Kind]) -> list[Tensor]:
    """Return the tensors again, after checking the types in which they travelled."""
    tensors = ReceivedTensors()
    rest = iter(buffered)
    for number in parts:
        taken = tuple(next(rest) for _ in range(number))
        _check_kind(taken, kinds)
        tensors.append(unpack(taken))
    return tensors


def _check_kind(taken: tuple[Tensor, ...], kinds: Sequence[Kind]) -> None:
    first = taken[0]
    if len(taken) == 2:
        codes, scale = taken
        if codes.dtype != torch.int8 or scale.dtype != torch.float32 or scale.shape != (*codes.shape[:-1], 1):
            raise Malformed("codes without a scale for every row")
        kind = "int8"
    elif first.dtype == torch.bfloat16:
        kind = "bfloat16"
    elif first.dtype == torch.float32 and first.ndim >= 2 and first.numel():
        kind = "float32"
    else:
        return  # whole numbers, and vectors, which are not rounded
    if kind not in kinds:
        raise Malformed(f"a tensor in {kind}: expected {' or '.join(kinds)}")
