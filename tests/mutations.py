"""Messages that lie: genuine ones, taken apart and put together again with one thing wrong."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Path = tuple[Any, ...]
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 2**31, 2**53, 2**63, 10**18, 10**400, -(10**400), 0.5, -0.0, 1e-320, 3e38, 1e308,
    float("inf"), float("-inf"), float("nan"), "", "x", "a", "b", "../../x", "..", ".x", "/etc/x", "client-0", "\x00",
    "\x1b[2J", "line\nline", "\u202eabc", "\ud800", "c" * 5000, "float64", "bool", "os.system", [], {}, [[]], [-1, -1],
    [0, 1, 2.0], {"": 1}, {"": [0, 0, 1.0]}, {"values": {}}, {"values": {"a": 0, "b": 1}}, {"x": {"y": [1]}},
]  # fmt: skip
NUMBERS = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e30, 1e19, 1e9, -1.0, 0.0, 1e-19, 1e-38, 1e-45]
WIDTH = {"float32": 4, "bfloat16": 2, "int8": 1, "int64": 8, "uint8": 1}


@dataclass
class Parts:
    """A message taken apart."""

    head: dict[str, Any]
    buffer: bytearray

    @classmethod
    def of(cls, content: bytes) -> Parts:
        (length,) = struct.unpack(">I", content[4:8])
        return cls(json.loads(content[8 : 8 + length]), bytearray(content[8 + length :]))

    def put_together(self) -> bytes:
        head = json.dumps(self.head).encode()
        return b"FSPN" + len(head).to_bytes(4, "big") + head + bytes(self.buffer)


def paths(node: Any, here: Path = ()) -> Iterator[Path]:
    """Every place in a head, but for the head itself."""
    pairs: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield (*here, key)
        yield from paths(value, (*here, key))


def holder(head: Any, path: Path) -> Any:
    for key in path[:-1]:
        head = head[key]
    return head


def a_path(parts: Parts, rng: random.Random) -> Path:
    # Half of them near the top: deep ones, of which there are many, would be nearly all otherwise.
    found = list(paths(parts.head))
    top = [p for p in found if len(p) <= 2]
    return rng.choice(top if rng.random() < 0.5 else found)


def replaced(parts: Parts, rng: random.Random) -> bytes:
    path = a_path(parts, rng)
    holder(parts.head, path)[path[-1]] = rng.choice(ODD)
    return parts.put_together()


def removed(parts: Parts, rng: random.Random) -> bytes:
    path = a_path(parts, rng)
    del holder(parts.head, path)[path[-1]]
    return parts.put_together()


def exchanged(parts: Parts, rng: random.Random) -> bytes:
    """Two values in each other's place."""
    one, other = a_path(parts, rng), a_path(parts, rng)
    values = [copy.deepcopy(holder(parts.head, p)[p[-1]]) for p in (one, other)]
    try:
        holder(parts.head, one)[one[-1]] = values[1]
        holder(parts.head, other)[other[-1]] = values[0]
    except (KeyError, IndexError, TypeError):
        pass  # one was within the other, and is gone: that is a mutation too
    return parts.put_together()


def added(parts: Parts, rng: random.Random) -> bytes:
    """One more entry somewhere."""
    places = [(), *(p for p in paths(parts.head) if isinstance(holder(parts.head, p)[p[-1]], dict | list))]
    path = rng.choice(places)
    node = holder(parts.head, path)[path[-1]] if path else parts.head
    if isinstance(node, dict):
        node[rng.choice(["x", "", "../x", "\x1b", *list(node)[:3]])] = rng.choice(ODD)
    else:
        node.insert(rng.randint(0, len(node)), rng.choice([*ODD, *node]))
    return parts.put_together()


def filled(parts: Parts, rng: random.Random) -> bytes:
    """One tensor, or one number of it, of odd values."""
    tensors = [t for t in parts.head["tensors"] if t[0] in WIDTH]
    if not tensors:
        return replaced(parts, rng)
    dtype, shape, _, start = rng.choice(tensors)
    count = 1
    for n in shape:
        count *= n
    size = count * WIDTH[dtype]
    if dtype == "float32":
        number = struct.pack("<f", rng.choice(NUMBERS))
        at = start + 4 * rng.randrange(max(count, 1))
        if rng.random() < 0.5:
            parts.buffer[start : start + size] = number * count
        else:
            parts.buffer[at : at + 4] = number
    else:
        parts.buffer[start : start + size] = rng.randbytes(size)
    return parts.put_together()


def reshaped(parts: Parts, rng: random.Random) -> bytes:
    """One tensor of another type, shape or layout, sound in itself."""
    tensors = parts.head["tensors"]
    if not tensors:
        return replaced(parts, rng)
    entry = rng.choice(tensors)
    count = 1
    for n in entry[1]:
        count *= n
    match rng.randrange(5):
        case 0:
            entry[1], entry[2] = [count], [1]
        case 1:
            entry[1], entry[2] = entry[1][::-1], entry[2][::-1]
        case 2:
            entry[0] = rng.choice([*WIDTH, "float64", "float16", "bool", "int32", "complex64"])
        case 3:
            entry[1], entry[2] = [1, *entry[1]], [count, *entry[2]]
        case _:
            entry[1] = [max(0, n + rng.choice([-1, 0, 1])) for n in entry[1]]
    return parts.put_together()


def raw(parts: Parts, rng: random.Random) -> bytes:
    """What `json.dumps` would not write: keys twice, numbers without end, deep nesting."""
    text = json.dumps(parts.head)
    odd = ["1e999", "NaN", "-Infinity", "9" * 5000, "[" * 3000 + "]" * 3000, '{"x":' * 2000 + "1" + "}" * 2000, "01"]
    numbers = [i for i, c in enumerate(text) if c.isdigit() and text[i - 1] in " [" and text[i + 1] in ",]} "]
    if rng.random() < 0.3 or not numbers:
        text = '{"message": 1, ' + text[1:]
    else:
        at = rng.choice(numbers)
        text = text[:at] + rng.choice(odd) + text[at + 1 :]
    return b"FSPN" + len(text).to_bytes(4, "big") + text.encode() + bytes(parts.buffer)


def cut(parts: Parts, rng: random.Random) -> bytes:
    """A few bytes changed, missing or too many."""
    content = bytearray(parts.put_together())
    match rng.randrange(4):
        case 0:
            return bytes(content[: rng.randrange(len(content))])
        case 1:
            return bytes(content) + rng.randbytes(64)
        case 2:
            content[4:8] = rng.randbytes(4)
        case _:
            for _ in range(rng.choice([1, 3, 40])):
                content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def messages(parts: Parts, rng: random.Random) -> bytes:
    """A message part that is no object, or not of this version."""
    parts.head["message"] = rng.choice([[], 7, "x", None, {**parts.head["message"], "schema": rng.choice([0, 2, 4])}])
    return parts.put_together()


MUTATIONS: list[Callable[[Parts, random.Random], bytes]] = [
    replaced, replaced, replaced, removed, exchanged, added, filled, filled, filled, reshaped, raw, cut, messages,
]  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """The message with one thing wrong, or, sometimes, nothing: the same for the same seed."""
    rng = random.Random(seed)
    return rng.choice(MUTATIONS)(Parts.of(content), rng)
