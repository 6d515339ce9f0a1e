"""Paths that come from a user."""

from __future__ import annotations

from pathlib import Path


def lacks(folder: Path, what: str) -> str:
    """Return the beginning of a refusal: there is no such folder, it is a file, or it lacks something."""
    if not exists(folder):
        return f"{folder} does not exist"
    return f"{folder} holds no {what}" if folder.is_dir() else f"{folder} is a file"


def exists(path: Path) -> bool:
    """Return whether there is anything at a path; nothing is where no path can lead."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long or holds a null character, a folder that may not be read
        return False
