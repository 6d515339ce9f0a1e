"""Suggestions for a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or all the valid names where none is near.

    Letters are compared without their case, and hyphens and spaces as underscores, since papers write `LoRA-FAIR`.
    """
    names = sorted(valid)
    folded = {_folded(name): name for name in reversed(names)}
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.8) or [
        folded[name] for name in difflib.get_close_matches(_folded(given), folded, n=1, cutoff=0.5)
    ]
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(names)}"


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")
