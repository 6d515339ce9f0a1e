"""The run that a folder is part of, for a refusal to name it."""

from __future__ import annotations

import os
from pathlib import Path

from fedspan.support.paths import exists

_LEVELS = 2  # from `adapters/CLIENT`, the deepest folder of adapters in a run


def enclosing_run(folder: Path) -> str:
    """Return `; the run is RUN` for a folder in a run folder, such as its adapter, and nothing for any other."""
    for place in Path(os.path.abspath(folder)).parents[:_LEVELS]:
        # A deployment has the settings in a folder above its runs too.
        if exists(place / "config.toml") and (exists(place / "metrics.jsonl") or exists(place / "checkpoint")):
            return f"; the run is {place if folder.is_absolute() else os.path.relpath(place)}"
    return ""
