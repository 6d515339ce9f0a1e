"""The events of a run, for a display to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run."""

    kind: str
    """`start`, `phase`, `client`, `round`, `budget`, `site`, `note` or `end`."""
    data: Mapping[str, Any]
    """Its particulars, as plain values."""


OnEvent = Callable[[Event], None]
"""Receives every event as it happens. An exception that it raises ends the run, which can be resumed."""


def ignore(event: Event) -> None:
    """Show nothing."""
