"""Versions of installed packages, and of this one when it runs from a source tree."""

from __future__ import annotations

import functools
import importlib.metadata
import tomllib
from pathlib import Path


@functools.cache  # a run asks many times, and reading the metadata takes milliseconds
def installed_version(distribution: str) -> str:
    """Return the version of a distribution.

    Returns
    -------
    str
        The installed version; without metadata, the one in the `pyproject.toml` of the source tree that this file is
        in, where that is the distribution's; otherwise `unknown`.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return _source_version(distribution) or "unknown"


def _source_version(distribution: str) -> str | None:
    project_file = Path(__file__).resolve().parents[3] / "pyproject.toml"  # beside src/
    try:
        project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
        return str(project["version"]) if project["name"] == distribution else None
    except (OSError, KeyError, ValueError):
        return None  # a copy of src/ alone, or in somebody else's project
