"""A comparison carried out: tuning, final runs, and the files of its folder, which resume at any point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedspan.client.setup import device_of
from fedspan.comparison import tuning
from fedspan.comparison.comparison_table import page
from fedspan.comparison.plan import Planned, Planner, combinations, sharing_key
from fedspan.comparison.results import Cell, comparison
from fedspan.comparison.run_lines import RunLines, base_key, line_of, summary_of_diverged
from fedspan.comparison.suite import Suite, check_extension, from_mapping, read
from fedspan.comparison.tuning import Choice, Values
from fedspan.config import Config, load
from fedspan.federation.rounds import TrainingDiverged
from fedspan.runs.events import Event
from fedspan.runs.folder_lock import is_free, locked
from fedspan.runs.many import RunFailed, run_many
from fedspan.support import standard_json
from fedspan.support.errors import FedspanError
from fedspan.support.files import StrPath, write_bytes

AT_ONCE = 8
"""Runs that are in memory at once."""
_SUITE = "suite.json"  # the suite as it was read, which tells a changed file from one that only looks different
Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of a comparison."""

    out: Path
    """Its folder."""
    content: Mapping[str, Any]
    """The content of `comparison.json`."""
    table: str
    """The content of `table.md`."""


def silent(line: str) -> None:
    """Show nothing."""


def compare(
    suite: StrPath, out: StrPath | None = None, notify: Notify = silent, *, at_once: int = AT_ONCE
) -> Comparison:
    """Carry out a comparison, or go on with the one that its folder holds.

    Parameters
    ----------
    suite
        The file that describes it; see `fedspan.comparison.suite.Suite`.
    out
        Its folder; None: `runs/NAME`. A finished run in it is not repeated, an unfinished one is resumed.
    notify
        Receives a line for every finished run.
    at_once
        Most runs in memory at once. On a CPU it changes no bit of any result; on a GPU clients of several runs share
        passes, which changes the last digits.

    Raises
    ------
    FedspanError
        For anything wrong with the suite, before any training; for a folder that holds something else, or a comparison
        that differs by more than added seeds, arms or conditions; for a run that fails, when those with it have ended.
    """
    wanted = read(Path(suite))
    folder = folder_of(wanted, out)
    planner = Planner(wanted, Path(suite).resolve().parent)
    planner.check()
    _check_folder(folder, wanted)
    with locked(folder):
        write_bytes(folder / "suite.toml", Path(suite).read_bytes())
        write_bytes(folder / _SUITE, standard_json.dumps(wanted.model_dump(mode="json"), indent=2).encode())
        work = _Work(wanted, planner, folder, RunLines(folder), notify, at_once)
        content = standard_json.standard(work.finished())
        table = page(content)
        write_bytes(folder / "comparison.json", (standard_json.dumps(content, indent=2) + "\n").encode())
        write_bytes(folder / "table.md", table.encode())
    return Comparison(folder, content, table)


def dry_run(suite: StrPath, out: StrPath | None = None) -> list[str]:
    """Return what a comparison would run, and how much of it is done, in lines; nothing is run or written.

    Raises
    ------
    FedspanError
        As `compare`, for what the suite and the folder show.
    """
    wanted = read(Path(suite))
    folder = folder_of(wanted, out)
    planner = Planner(wanted, Path(suite).resolve().parent)
    planner.check()
    _check_folder(folder, wanted)
    work = _Work(wanted, planner, folder, RunLines(folder), silent, AT_ONCE)
    tuned = [run for cell in work.cells() for run in work.tuning_runs(cell, work.grid(cell))]
    final = [planner.final(*cell, seed, {}) for cell in work.cells() for seed in wanted.seeds]
    done = sum(work.lines.of(run) is not None for run in tuned)
    extent = ("arm", wanted.arms), ("condition", wanted.conditions), ("seed", wanted.seeds)
    lines = [f"{wanted.name}: {', '.join(_counted(len(parts), word) for word, parts in extent)}"]
    if tuned:
        # A best value at the edge of its grid has the grid widened.
        lines.append(f"tuning: at least {_counted(len(tuned), 'run')} of {_size(tuned)}, {done} done")
    lines.append(f"final: {_counted(len(final), 'run')} of {_size(final)}, {work.lines.num_final()} done")
    return [*lines, f"folder: {folder}"]


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _size(runs: Sequence[Planned]) -> str:
    rounds = sorted({run.config.federation.rounds for run in runs})
    return f"{' or '.join(map(str, rounds))} round{'' if rounds == [1] else 's'}"


def folder_of(suite: Suite, out: StrPath | None) -> Path:
    """Return the folder of a comparison."""
    return Path("runs") / suite.name if out is None else Path(out)


def _check_folder(folder: Path, suite: Suite) -> None:
    stored = folder / _SUITE
    if stored.exists():
        try:
            began = from_mapping(json.loads(stored.read_bytes()), str(stored))
        except ValueError as error:
            raise FedspanError(f"{stored} is damaged: {error}") from None
        check_extension(folder, began, suite)
    elif not is_free(folder) and {path.name for path in folder.iterdir()} - {"suite.toml", ".lock", ".running"}:
        raise FedspanError(f"{folder} holds something else: expected a new folder, or one of an earlier comparison")


@dataclass(slots=True)
class _Work:
    """A comparison that is being carried out."""

    suite: Suite
    planner: Planner
    folder: Path
    lines: RunLines
    notify: Notify
    at_once: int
    _bases: set[tuple[int, str]] = field(default_factory=set)

    def finished(self) -> dict[str, Any]:
        """Do all that is missing, and return what was found."""
        choices = self._choices()
        runs = {
            cell: [self.planner.final(*cell, seed, choices[cell].values) for seed in self.suite.seeds]
            for cell in self.cells()
        }
        lines = iter(self._results([run for own in runs.values() for run in own]))
        return comparison(self.suite, {cell: [next(lines) for _ in own] for cell, own in runs.items()}, choices)

    def cells(self) -> Iterator[Cell]:
        """Yield every condition with every arm that runs under it."""
        for condition in self.suite.condition_names:
            for arm in self.suite.arm_names:
                if self.suite.runs_under(arm, condition):
                    yield condition, arm

    def grid(self, cell: Cell) -> list[Values]:
        """Return the combinations of an arm's grid; a single one is given, not tried."""
        return combinations(next(arm.grid for arm in self.suite.arms if arm.name == cell[1]))

    def tuning_runs(self, cell: Cell, tried: Sequence[Values]) -> list[Planned]:
        """Return the runs that try these values, for every tuning seed; none where there is no choice."""
        if len(tried) < 2:
            return []
        return [self.planner.tuning(*cell, seed, values) for values in tried for seed in self.suite.tuning.seeds]

    def _choices(self) -> dict[Cell, Choice]:
        """Return the values of every arm under every condition, tried on held-out training rows."""
        tried = {cell: self.grid(cell) for cell in self.cells()}
        scores = self._scores(tried)
        for _ in range(self.suite.tuning.widen):
            for cell, values in tried.items():
                more = tuning.beyond_the_edge(values, scores[cell]) if len(values) > 1 else None
                if more is not None and more not in values and self._is_valid(cell, more):
                    values.append(more)
            scores = self._scores(tried)
        return {cell: tuning.choice(values, scores[cell]) for cell, values in tried.items()}

    def _scores(self, tried: Mapping[Cell, Sequence[Values]]) -> dict[Cell, list[float]]:
        runs = {cell: self.tuning_runs(cell, values) for cell, values in tried.items()}
        lines = iter(self._results([run for own in runs.values() for run in own]))
        scores: dict[Cell, list[float]] = {}
        for cell, values in tried.items():
            own = [next(lines) for _ in runs[cell]]
            size = len(self.suite.tuning.seeds)
            parts = [own[i * size : (i + 1) * size] for i in range(len(values))]
            scores[cell] = [self._score(part) if part else 0.0 for part in parts]
        return scores

    def _score(self, lines: Sequence[Mapping[str, Any]]) -> float:
        figures = [line["figures"][self.suite.figure] for line in lines]
        return tuning.mean_score(figures, lines[0]["higher_is_better"])

    def _is_valid(self, cell: Cell, values: Values) -> bool:
        """Return whether a value beyond the edge of a grid is one that the setting can have."""
        try:
            self.planner.tuning(*cell, self.suite.tuning.seeds[0], values)
        except FedspanError:
            return False
        return True

    def _results(self, runs: Sequence[Planned]) -> list[Mapping[str, Any]]:
        """Return the lines of these runs, in their order, after running those that have none."""
        missing = [run for run in runs if self.lines.of(run) is None]
        groups: dict[str, list[Planned]] = {}
        for run in missing:
            groups.setdefault(sharing_key(run.config), []).append(run)
        for group in groups.values():
            for start in range(0, len(group), self.at_once):
                self._run(group[start : start + self.at_once])
        found = [self.lines.of(run) for run in runs]
        return [line for line in found if line is not None]

    def _run(self, runs: Sequence[Planned]) -> None:
        """Run some federations at once, and note each when it has ended."""

        started: dict[int, Mapping[str, Any]] = {}

        def on_event(number: int, event: Event) -> None:
            if event.kind == "start":
                started[number] = event.data
            elif event.kind == "end":
                self._note(runs[number], event.data["summary"])

        folders = [self.folder / run.folder for run in runs]
        for folder in folders:
            _clear_unbegun(folder)
        configs = [self._with_base(run, folder) for run, folder in zip(runs, folders, strict=True)]
        # On a CPU a shared pass gains little, and every run keeps the bits that it has alone.
        apart = all(device_of(config.device).type == "cpu" for config in configs)
        try:
            run_many(configs, folders, on_event, apart=apart)
        except RunFailed as failed:
            # Training that diverges would do so again: it is a result of the arm, as in a run that ends with NaN.
            diverged = {n for n, error in failed.errors.items() if isinstance(error, TrainingDiverged)}
            for number in sorted(diverged):
                self._note(runs[number], summary_of_diverged(folders[number], started[number]))
            for number in sorted(failed.errors.keys() - diverged):
                raise FedspanError(f"{runs[number].label}: {failed.errors[number]}") from failed

    def _with_base(self, run: Planned, folder: Path) -> Config:
        """Return the settings of a run, which evaluates the untouched base unless another one does."""
        config, key = run.config, (run.seed, base_key(run))
        if (folder / "config.toml").exists():
            wanted = load(folder / "config.toml").evaluation.base
        else:
            known = key in self._bases or self.lines.has_base(*key)
            wanted = config.evaluation.base or (run.stage == "final" and not known)
        if wanted:
            self._bases.add(key)
        return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"base": wanted})})

    def _note(self, run: Planned, summary: Mapping[str, Any]) -> None:
        line = line_of(run, self.folder, summary, self.suite.last_rounds)
        self.lines.append(line)
        value = line["figures"][self.suite.figure]
        self.notify(f"{run.label}: {line['metric']} {'not a number' if value is None else f'{value:.3f}'}")


def _clear_unbegun(folder: Path) -> None:
    """Remove the folder of a run that ended before its first checkpoint, whose settings may be half written."""
    if (folder / "config.toml").exists() and not (folder / "checkpoint").exists():
        shutil.rmtree(folder)
