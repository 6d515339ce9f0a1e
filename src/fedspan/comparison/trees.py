"""Nested settings, put together section by section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings x changed by y; a `method` with a name replaces the other one with its options."""
    result = dict(x)
    for key, value in y.items():
        if isinstance(value, Mapping) and not (key == "method" and "name" in value):
            own = result.get(key, {})
            result[key] = merged(own, value) if isinstance(own, Mapping) else value
        else:
            result[key] = value
    return result


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with dotted keys as nested sections."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree
