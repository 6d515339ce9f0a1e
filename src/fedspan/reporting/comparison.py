"""The result of a comparison as its folder holds it: cells, differences, and the run folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedspan.support.errors import FedspanError, one_line


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Cell(_Record):
    """One arm under one condition, over the seeds."""

    condition: str
    arm: str
    n: int
    mean: float | None
    std: float | None
    values: dict[str, float | None]
    """Seed -> the figure of its run."""
    settings: dict[str, Any] = {}
    """The settings that the arm was given or tuned to."""


class Difference(_Record):
    """An arm less the baseline under one condition, paired by seed."""

    condition: str
    arm: str
    baseline: str
    mean: float | None
    low: float | None
    high: float | None
    """The ends of the confidence interval."""
    p: float | None = None
    p_adjusted: float | None = None
    verdict: Literal["better", "worse", "equivalent", "open"]
    seeds_for_a_point: int | None = None
    """Seeds that a difference of one point would need."""


class Comparison(_Record):
    """The content of `comparison.json`."""

    name: str
    metric: str
    higher_is_better: bool = True
    figure: str
    """The figure of a run that is compared: `last`, `best` or `mean_last`."""
    margin: float | None
    confidence: float
    baseline: str
    seeds: list[int]
    cells: list[Cell]
    differences: list[Difference]


def read_comparison(folder: Path) -> Comparison | None:
    """Return the result of the comparison in a folder; None while it is unfinished.

    Raises
    ------
    FedspanError
        When the file is damaged.
    """
    file = folder / "comparison.json"
    if not file.exists():
        return None
    try:
        return Comparison.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FedspanError(f"{file} is damaged: {where}: {one_line(first['msg'], 120)}") from None


def run_folders(folder: Path) -> list[tuple[str, Path]]:
    """Return the run folders of a comparison that exist so far, each with its condition, in the order of their names.

    Raises
    ------
    FedspanError
        When there is none yet.
    """
    found = [
        (config.parents[2].name, config.parent)
        for config in sorted(folder.glob("runs/*/*/seed-*/config.toml"), key=_key)
    ]
    if not found:
        raise FedspanError(f"{folder}: no run of the comparison has begun yet")
    return found


def _key(config: Path) -> tuple[str, str, int, str]:
    seed = config.parent.name.removeprefix("seed-")
    return config.parents[2].name, config.parents[1].name, int(seed) if seed.isdecimal() else -1, seed


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return the settings of an arm in one line."""
    return ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))
