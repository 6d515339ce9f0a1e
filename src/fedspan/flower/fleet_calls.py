"""The calls of Flower's fleet API, the only ones that sites make, by the path of a request."""

from __future__ import annotations

import re

_CALL = re.compile(r"/v1/fleet/([a-z]+(?:-[a-z]+)*)")


def call_name(path: str) -> str | None:
    """Return the name of the call that a path means exactly as it stands, or None where it means anything else."""
    match = _CALL.fullmatch(path)
    return None if match is None else match[1]


def is_fleet_call(path: str) -> bool:
    """Return whether a path is that of a fleet call."""
    return call_name(path) is not None
