"""Data of a run: reading (:func:`load`), and tokenising or processing it once (:func:`encode`).

Only encoding needs torch, so it is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedspan.data.load import load
from fedspan.data.rows import Corpus, Kind, Rows

if TYPE_CHECKING:
    from fedspan.data.encoded import Encoded
    from fedspan.data.encoding import encode

__all__ = ["Corpus", "Encoded", "Kind", "Rows", "encode", "load"]


def __getattr__(name: str) -> Any:
    """Return a name of `fedspan.data.encoding`, imported now."""
    if name not in ("Encoded", "encode"):
        raise AttributeError(f"module 'fedspan.data' has no attribute {name!r}")
    from fedspan.data import encoding

    return getattr(encoding, name)
