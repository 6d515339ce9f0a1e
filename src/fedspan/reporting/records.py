"""The run folders of a report, as they are on the disk now: finished, at work, or stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedspan.config import Config
from fedspan.display import run_groups
from fedspan.display.run_folder import read_run
from fedspan.reporting.comparison import Comparison, read_comparison, run_folders
from fedspan.runs.folder_lock import is_running
from fedspan.support.enclosing import enclosing_run
from fedspan.support.errors import FedspanError
from fedspan.support.paths import lacks

Words = Callable[[Path], Sequence[str]]
"""Returns the diagnostics of a run folder in sentences."""


def finite(value: object) -> float | None:
    """Return a figure of a file as a number; None where it is none, or not finite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def object_of(value: object) -> Mapping[str, Any]:
    """Return an object of a file; an empty one where it is something else."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    config: Config
    summary: Mapping[str, Any]
    """Empty while the run is unfinished."""
    rounds: Sequence[Mapping[str, Any]]
    """The records of `metrics.jsonl`."""
    running: bool
    """A process is at work in the folder; on another machine it may have been killed."""

    @cached_property
    def title(self) -> str:
        """The method's name as papers write it."""
        return run_groups.method_title(self.config)

    @property
    def status(self) -> str:
        """`finished`, `running` or `unfinished`."""
        return "finished" if self.summary else "running" if self.running else "unfinished"

    @property
    def metric(self) -> str | None:
        """The metric of the summary; of an unfinished run, the first that was evaluated."""
        if self.summary:
            return str(self.summary["metric"])
        names = [name for record in self.rounds for name in record.get("eval") or {} if name != "loss"]
        return str(names[0]) if names else None

    def figures(self, whose: str) -> Mapping[str, Any]:
        """Return every metric of a part of the summary, such as `base` or `clients`."""
        return object_of(object_of(self.summary.get("metrics")).get(whose))

    def last(self, metric: str | None) -> float | None:
        """Return the result: of a finished run the clients' mean, else the last evaluation."""
        if self.summary:
            return finite(self.figures("clients").get(metric or ""))
        values = [finite((record.get("eval") or {}).get(metric)) for record in self.rounds]
        known = [value for value in values if value is not None]
        return known[-1] if known else None

    def curve(self, metric: str) -> dict[int, float]:
        """Return the metric by round, where it was evaluated."""
        values = {record["round_num"]: finite((record.get("eval") or {}).get(metric)) for record in self.rounds}
        return {round_num: value for round_num, value in values.items() if value is not None}

    def losses(self) -> dict[int, float]:
        """Return the training loss by round."""
        values = {record["round_num"]: finite(record.get("train_loss")) for record in self.rounds}
        return {round_num: value for round_num, value in values.items() if value is not None}

    def sent(self) -> dict[int, float]:
        """Return the bytes sent up and down until the end of each round."""
        total, until = 0.0, {}
        for record in self.rounds:
            total += (finite(record.get("bytes_up")) or 0.0) + (finite(record.get("bytes_down")) or 0.0)
            until[record["round_num"]] = total
        return until

    def total(self, key: str) -> float | None:
        """Return a figure added up over the rounds; None where no round has it."""
        values = [finite(record.get(key)) for record in self.rounds]
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    @property
    def has_diagnostics(self) -> bool:
        """True where some round has them."""
        return any(record.get("diagnostics") for record in self.rounds)


@dataclass(frozen=True, slots=True)
class Study:
    """Everything that one page shows."""

    folders: Sequence[Path]
    """As they were given."""
    runs: Sequence[Run]
    comparison: Comparison | None
    conditions: Sequence[str]
    """Condition of every run of a comparison; empty elsewhere."""

    @property
    def metric(self) -> str | None:
        """The metric of the headlines: the comparison's, or that of the first run that has one."""
        if self.comparison is not None:
            return self.comparison.metric
        return next((run.metric for run in self.runs if run.metric is not None), None)

    @property
    def higher_is_better(self) -> bool:
        """True where a larger figure of that metric is a better one."""
        if self.comparison is not None:
            return self.comparison.higher_is_better
        return all(run.summary.get("higher_is_better", True) is not False for run in self.runs)

    @property
    def at_work(self) -> bool:
        """True while some run of it is going on."""
        return any(run.status == "running" for run in self.runs)


def read(folders: Sequence[Path]) -> Study:
    """Read run folders, or one folder of a comparison.

    Raises
    ------
    FedspanError
        When a folder holds neither, or what it holds is damaged; and for a comparison among other folders.
    """
    of_suite = [folder for folder in folders if (folder / "suite.toml").exists()]
    if not of_suite:
        return Study(folders, [_run(folder) for folder in folders], None, ())
    if len(folders) > 1:
        raise FedspanError(f"{of_suite[0]} is a comparison: expected it alone, or run folders")
    found = run_folders(folders[0])
    return Study(
        folders,
        [_run(folder) for _, folder in found],
        read_comparison(folders[0]),
        [condition for condition, _ in found],
    )


def _run(folder: Path) -> Run:
    config = run_groups.config_of(folder) if folder.is_dir() else None
    if config is None:
        raise FedspanError(
            f"{lacks(folder, 'config.toml')}: expected the folder of a `fedspan run`, or of a comparison"
            f"{enclosing_run(folder)}"
        )
    # The file of rounds is written when the first one begins.
    begun = (folder / "metrics.jsonl").exists()
    summary, rounds = read_run(folder) if begun else ({}, [])
    return Run(folder, config, summary, rounds, is_running(folder))
