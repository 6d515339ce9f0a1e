"""A seeded bug, and the tests that must fail on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One bug."""

    what: str
    file: str
    """Under `src/fedspan`."""
    piece: str
    """Stands in the file once."""
    bug: str
    """Stands in its place."""
    tests: str
    """Files or tests, as pytest names them: the fewest that must see it."""
