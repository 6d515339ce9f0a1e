"""The settings file that a suite names as its base: one that `fedspan run` takes, partial or whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedspan.config.aliases import canonical
from fedspan.support.paths import exists

_PATHS = (("data", ("train", "test", "unseen")), ("model", ("name", "adapter")))
_USUAL: Mapping[tuple[str, str], object] = {
    ("data", "metrics"): [],
    ("data", "test_from_training"): 0,
    ("evaluation", "base"): True,
    ("evaluation", "local"): True,
}
"""Settings that a comparison makes itself -> a run's own value, which a whole file states without meaning anything."""


def as_base(tree: Mapping[str, Any], file: Path, suite: Path) -> dict[str, Any]:
    """Return the settings of a file as those that all runs of a suite share.

    The suite's `seeds` take the place of its seed. Relative paths are looked up beside the file, as in a run of it.

    Parameters
    ----------
    file, suite
        Both files; paths are returned relative to the suite's folder, where its runs look them up.
    """
    base = {key: dict(value) if isinstance(value, Mapping) else value for key, value in canonical(tree).items()}
    base.pop("seed", None)
    for (section, key), usual in _USUAL.items():
        values = base.get(section)
        if isinstance(values, dict) and key in values and values[key] == usual:
            del values[key]
    if file.parent.resolve() != suite.parent.resolve():
        _relocate(base, file.parent, suite.parent)
    return base


def metric_of(base: dict[str, Any]) -> str | None:
    """Take the metrics out of the settings of a file, and return the first one, by which a run of it is judged."""
    data = base.get("data")
    given = data.get("metrics") if isinstance(data, dict) else None
    first = given[0] if isinstance(given, list) and given else given
    if not isinstance(data, dict) or not isinstance(first, str):
        return None
    del data["metrics"]
    return first


def _relocate(base: dict[str, Any], beside: Path, suite: Path) -> None:
    for section, keys in _PATHS:
        values = base.get(section)
        if not isinstance(values, dict) or (section == "data" and not _reads_files(values)):
            continue
        for key in keys:
            given = values.get(key)
            if isinstance(given, list):
                values[key] = [_moved(name, beside, suite) for name in given]
            elif isinstance(given, str):
                values[key] = _moved(given, beside, suite)


def _reads_files(data: Mapping[str, Any]) -> bool:
    """Return whether names in `data.train` and its like may be those of files; see `fedspan.config.paths`."""
    task = str(data.get("task", "files"))
    return task == "files" or task.startswith("glue/")


def _moved(name: object, beside: Path, suite: Path) -> object:
    if not isinstance(name, str) or Path(name).expanduser().is_absolute() or not exists(beside / name):
        return name
    return os.path.relpath((beside / name).resolve(), suite.resolve())  # links lead elsewhere than their names
