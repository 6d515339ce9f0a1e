"""Standard JSON, which has no NaN and no infinity."""

from __future__ import annotations

import json
from typing import Any


def standard(value: object) -> Any:
    """Return the value as a standard JSON file gives it back: NaN and infinity are None, tuples lists, keys str."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def dumps(value: object, indent: int | None = None) -> str:
    """Return the value as standard JSON; NaN and infinity, such as the figures of a diverged run, become null."""
    return json.dumps(standard(value), indent=indent)
