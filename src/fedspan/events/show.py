"""The entries of a log as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedspan.events.chain import Chain, Entry
from fedspan.support.errors import one_line

_FIRST = ("number", "time", "event")
_HIDDEN = {"previous", *_FIRST}
_DIGITS = 12
"""Of a digest, as it is shown."""
_MAX_VALUE = 200


def lines(chain: Chain) -> Iterator[str]:
    """Yield each entry in one line: number, time, event, and its other fields; digests are shortened."""
    for entry in chain.entries:
        number, time, event = (one_line(entry.get(key, "?"), 40) for key in _FIRST)
        yield f"{number:>6}  {time}  {event:<10}  {_fields(entry)}".rstrip()


def _fields(entry: Entry) -> str:
    return "  ".join(f"{one_line(key, 40)} {_value(value)}" for key, value in entry.items() if key not in _HIDDEN)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{one_line(key, 80)}: {_value(each)}" for key, each in value.items())
        return one_line(f"{{{inner}}}")
    if isinstance(value, list):
        return one_line(f"[{', '.join(_value(each) for each in value)}]", _MAX_VALUE)
    text = one_line(value, _MAX_VALUE)
    return f"{text[:_DIGITS]}…" if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
