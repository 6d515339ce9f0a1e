"""Paths that come from a user."""

from __future__ import annotations

from pathlib import Path


def exists(path: Path) -> bool:
    """Return whether there is anything at a path; nothing is where no path can lead."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long or holds a null character, a folder that may not be read
        return False
