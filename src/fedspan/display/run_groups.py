"""Runs that repeat one another with other seeds, and the names that tell the others apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedspan import methods
from fedspan.config import Config, load
from fedspan.support.errors import FedspanError

_NO_MATTER = (
    *("device", "threads", "engine", "deployment", "tracking"),
    *(f"evaluation.{name}" for name in ("batch_size", "base", "local", "per_rank", "diagnostics")),
)
"""Settings and sections that change no figure of the federation but for rounding."""
_SEED = "seed"
_MOST = 2  # settings in a label; with more it would be longer than a legend is wide
_T = TypeVar("_T")


def config_of(folder: Path) -> Config | None:
    """Return the settings of a run folder; None where it holds none.

    Raises
    ------
    FedspanError
        When the file is damaged.
    """
    file = folder / "config.toml"
    return load(file) if file.exists() else None


def method_title(config: Config) -> str:
    """Return the method's name as papers write it; of a method that is not registered here, its name."""
    try:
        return methods.create(**config.method).info.title
    except FedspanError:
        return str(config.method.get("name", "?"))


def flat(config: Config) -> dict[str, Any]:
    """Return every setting by its dotted key."""
    settings: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        settings |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    return settings


def repeated(config: Config) -> str:
    """Return a key that runs share which differ by their seeds alone."""
    return json.dumps({key: value for key, value in flat(config).items() if _matters(key)}, sort_keys=True)


def grouped(runs: Sequence[tuple[str, _T]]) -> list[list[_T]]:
    """Return the runs with equal keys together, in the order in which the keys are first met."""
    groups: dict[str, list[_T]] = {}
    for key, run in runs:
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def labels(configs: Sequence[Config]) -> list[str]:
    """Return one name for each of these settings: the method, and what else tells it from the others.

    A name may occur twice where more than two settings are needed; callers then add the folder's name.
    """
    titles = [method_title(config) for config in configs]
    settings = [{key: v for key, v in flat(config).items() if _matters(key)} for config in configs]
    return [_label(k, titles, settings) for k in range(len(configs))]


def _label(k: int, titles: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> str:
    alike = [other for other, title in zip(settings, titles, strict=True) if title == titles[k]]
    keys = sorted({*alike[0]}.union(*alike))
    differing = [key for key in keys if any(other.get(key) != alike[0].get(key) for other in alike)]
    own = [f"{key.rpartition('.')[2]}={_short(settings[k].get(key))}" for key in differing[:_MOST]]
    return ", ".join([titles[k], *own])


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def _matters(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name != _SEED and not {key, section} & {*_NO_MATTER}
