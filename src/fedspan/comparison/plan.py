"""The runs of a comparison: each with its settings, its folder, and what it is called."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedspan import config as settings_of_a_run
from fedspan.comparison.suite import Suite
from fedspan.comparison.trees import merged, nested
from fedspan.config import Config, with_absolute_paths
from fedspan.config.paths import located
from fedspan.federation import requirements
from fedspan.methods.base import Method
from fedspan.support.errors import FedspanError

Stage = Literal["tune", "final"]
DATA_SEED = 0
"""Seed of the rows where the suite sets none: the same test rows for all seeds, so that tuning can keep off them."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a comparison."""

    stage: Stage
    condition: str
    arm: str
    seed: int
    settings: Mapping[str, Any]
    """The values that are tried, or were chosen, by dotted keys."""
    config: Config
    folder: str
    """Its run folder, relative to the comparison's."""

    @property
    def label(self) -> str:
        """The run in words."""
        tried = f" {describe(self.settings)}" if self.settings and self.stage == "tune" else ""
        return f"{self.stage} {self.condition}/{self.arm} seed {self.seed}{tried}"

    @property
    def cell(self) -> tuple[str, str]:
        """Its condition and arm."""
        return self.condition, self.arm


class Planner:
    """Makes the runs of a suite.

    Parameters
    ----------
    folder
        The folder of the suite's file, where relative paths of data are looked up first; None: the working folder.
    """

    def __init__(self, suite: Suite, folder: Path | None) -> None:
        self.suite, self._folder = suite, folder
        self._arms = {arm.name: arm for arm in suite.arms}
        self._conditions = {condition.name: condition for condition in suite.conditions}

    def final(self, condition: str, arm: str, seed: int, chosen: Mapping[str, Any]) -> Planned:
        """Return a run on the test data, with the chosen values."""
        place = f"runs/{condition}/{arm}/seed-{seed}"
        config = self._config(condition, arm, seed, chosen, place, {})
        return Planned("final", condition, arm, seed, chosen, config, place)

    def tuning(self, condition: str, arm: str, seed: int, tried: Mapping[str, Any]) -> Planned:
        """Return a run that tries values on held-out training data."""
        tuning = self.suite.tuning
        changes: dict[str, Any] = {"data": {"test_from_training": tuning.share}, "evaluation": {"diagnostics": False}}
        if tuning.rounds is not None:
            changes["federation"] = {"rounds": tuning.rounds}
        place = f"tuning/{condition}/{arm}/{folder_name(tried)}/seed-{seed}"
        config = self._config(condition, arm, seed, tried, place, changes)
        return Planned("tune", condition, arm, seed, tried, config, place)

    def check(self) -> None:
        """Refuse what can be known to be wrong with any of the runs from their settings.

        Raises
        ------
        FedspanError
            Naming the arm and the condition.
        """
        for arm in self.suite.arms:
            for condition in self.suite.conditions_of(arm.name):
                for values in combinations(arm.grid):
                    self._check(self.final(condition, arm.name, self.suite.seeds[0], values))

    def _check(self, run: Planned) -> None:
        where = f"arm {run.arm}, condition {run.condition}"
        try:
            method = requirements.chosen(run.config)
        except FedspanError as error:
            raise FedspanError(f"{where}: {error}") from None
        figure, last = self.suite.figure, self.suite.last_rounds
        if figure != "last" and method.info.personalised and run.config.evaluation.where == "server":
            raise FedspanError(
                f"{where}: the models of {run.config.method['name']} are evaluated after the last round alone: "
                f"expected figure = 'last', not {figure!r}, or evaluation.where = 'clients' or 'both'"
            )
        rounds = [run.config.federation.rounds]
        if len(combinations(self._arms[run.arm].grid)) > 1 and self.suite.tuning.rounds is not None:
            rounds.append(self.suite.tuning.rounds)
        count = min(-(-num // run.config.evaluation.every) for num in rounds)
        if figure == "mean_last" and count < last:
            raise FedspanError(f"{where}: last_rounds = {last}, but a run evaluates {count} rounds")

    def _config(
        self, condition: str, arm: str, seed: int, values: Mapping[str, Any], place: str, changes: Mapping[str, Any]
    ) -> Config:
        parts: Sequence[Mapping[str, Any]] = (
            {"data": {"seed": DATA_SEED}, "evaluation": {"base": False, "local": False}},
            # Runs of one name would be one run in a tracker, and the names of their folders are their seeds alone.
            {"tracking": {"group": self.suite.name, "name": _tracked_name(place)}},
            self.suite.base,
            self._conditions[condition].settings,
            self._arms[arm].settings,
            nested(values),
            changes,
            {"seed": seed},
            {} if self.suite.metric is None else {"data": {"metrics": self.suite.metric}},
        )
        tree: dict[str, Any] = {}
        for part in parts:
            tree = merged(tree, part)
        try:
            return self._read(tree)
        except FedspanError as error:
            raise FedspanError(f"{self._where(error, arm, condition)}: {error}") from None

    def _read(self, tree: Mapping[str, Any]) -> Config:
        return with_absolute_paths(located(settings_of_a_run.from_mapping(tree), self._folder, (), True))

    def _where(self, error: FedspanError, arm: str, condition: str) -> str:
        """Return what to change: the base, where its settings are refused for the same reason by themselves."""
        try:
            self._read(self.suite.base)
        except FedspanError as own:
            if str(own) == str(error):
                return "base"
        return f"arm {arm}, condition {condition}"


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of a grid's values, those of the last setting varying fastest; one of an empty grid."""
    found: list[dict[str, Any]] = [{}]
    for key, values in grid.items():
        found = [{**one, key: value} for one in found for value in values]
    return found


def describe(values: Mapping[str, Any]) -> str:
    """Return values in words, such as `learning_rate 0.003`; `–` where there are none."""
    shown = [f"{key.rpartition('.')[2]} {json.dumps(value)}" for key, value in values.items()]
    return ", ".join(shown) or "–"


def folder_name(values: Mapping[str, Any]) -> str:
    """Return a folder's name for values, which is another one for other values."""
    name = ",".join(f"{key}={value}" for key, value in values.items())
    plain = re.sub(r"[^A-Za-z0-9._=,+-]", "_", name)
    if plain == name and len(plain) <= 100:
        return plain
    return f"{plain[:80]}-{hashlib.sha256(json.dumps(dict(values)).encode()).hexdigest()[:8]}"


def _tracked_name(place: str) -> str:
    """Return the name of a run in trackers, which is another one for another place: at most 100 plain characters."""
    _, *parts = place.split("/")
    name = re.sub(r"[^\w .-]", "_", " ".join(parts))
    if name == " ".join(parts) and len(name) <= 100:
        return name
    return f"{name[:91]}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def sharing_key(config: Config) -> str:
    """Return what must be equal for two runs to be likely to share a base; see `fedspan.runs.shared_work.kind_of`."""
    method: Method = requirements.chosen(config)
    ranks = requirements.ranks(config.federation, config.federation_seed)
    return json.dumps(
        [
            config.model.model_dump(mode="json"),
            config.adapter.model_dump(mode="json", exclude={"alpha"}),
            config.engine.model_dump(mode="json"),
            config.data.model_dump(mode="json", exclude={"test_from_training"}),
            [config.device, config.threads, config.privacy.dp, method.info.trains, max(ranks)],
            requirements.galore_rank(method),
        ]
    )


def digest(config: Config) -> str:
    """Return a short digest of the settings that a run's figures depend on; of paths the names alone."""
    tree = config.model_dump(mode="json", exclude={"device", "threads", "engine", "deployment", "tracking"})
    for part in ("train", "test", "unseen"):
        tree["data"][part] = [Path(name).name for name in tree["data"][part]]
    tree["model"]["name"] = Path(tree["model"]["name"]).name
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
