"""The options of a method: types and defaults from its factory's signature, meanings from the docstring."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*)")
_REFERENCE = re.compile(r"As in `(?P<factory>\w+)`\. ?(?P<more>.*)")


@dataclass(frozen=True, slots=True)
class MethodOption:
    """One keyword argument of a method's factory."""

    name: str
    type: str
    """The values that it takes, as they are written in a configuration: "int, 'auto' or 'none'"."""
    default: object
    """None is written "none" in a configuration."""
    meaning: str
    """From the factory's docstring, as one paragraph."""


def options_of(name: str, factories: Mapping[str, Callable[..., Any]]) -> list[MethodOption]:
    """Return the options of the factory of that name, in the order of its signature.

    A meaning that begins with "As in `other`." is taken from that factory, with what follows appended.
    """
    factory = factories[name]
    hints, meanings = get_type_hints(factory), _meanings(factory)

    def meaning(option: str) -> str:
        text = meanings.get(option, "")
        reference = _REFERENCE.match(text)
        if reference is None:
            return text
        return f"{_meanings(factories[reference['factory']])[option]} {reference['more']}".strip()

    return [
        MethodOption(option, _values(hints[option]), parameter.default, meaning(option))
        for option, parameter in inspect.signature(factory).parameters.items()
    ]


def _values(hint: Any) -> str:
    """Return the values that an annotation allows, in words."""
    choices = _choices(hint)
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [repr(value) for value in get_args(hint)]
    if get_origin(hint) in (Union, types.UnionType):
        return [choice for part in get_args(hint) for choice in _choices(part)]
    return ["'none'"] if hint is type(None) else [hint.__name__]


def _meanings(factory: Callable[..., Any]) -> dict[str, str]:
    """Return name -> meaning from the `Parameters` section of a numpydoc docstring."""
    section = (inspect.getdoc(factory) or "").partition("Parameters\n----------\n")[2]
    section = re.split(r"\n\n\w+\n-+\n", section)[0]
    lines: dict[str, list[str]] = {}
    names: list[str] = []
    for line in section.splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry:
            names = entry["names"].split(", ")
        for name in names if not entry else ():
            lines.setdefault(name, []).append(line.strip())
    return {name: " ".join(text).strip() for name, text in lines.items()}
