"""The results of a run, which always belong to its last round."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path

RESULTS = ("summary.json", "adapter", "adapters", "model")


def set_aside(folder: Path, round_num: int) -> None:
    """Move the results of a run that is about to be extended to `earlier/round-N`, N the rounds that they are of.

    Until the longer run has ended there are then none, rather than those of another round than the checkpoint's.
    """
    earlier = folder / "earlier" / f"round-{round_num}"
    for name in RESULTS:
        if (folder / name).exists():
            earlier.mkdir(parents=True, exist_ok=True)
            _remove(earlier / name)
            (folder / name).rename(earlier / name)


def put(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder by a function of its path, in place of one that holds something else.

    A folder with the same files is left as it is, with what the user may have added to it.
    """
    fresh = path.with_name(f".{path.name}.new")
    _remove(fresh)
    try:
        write(fresh)
        if not _holds(path, fresh):
            _remove(path)
            fresh.rename(path)
    finally:
        _remove(fresh)


def _holds(path: Path, fresh: Path) -> bool:
    """Return whether every file of `fresh` is in `path` with the same bytes."""
    names = [str(file.relative_to(fresh)) for file in fresh.rglob("*") if file.is_file()]
    return path.is_dir() and filecmp.cmpfiles(path, fresh, names, shallow=False)[0] == names


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
