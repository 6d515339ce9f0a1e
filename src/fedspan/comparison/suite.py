"""The file that describes a comparison: a base, arms, conditions, seeds, and how they are judged."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedspan.comparison.base_file import as_base, metric_of
from fedspan.config.aliases import canonical, canonical_key
from fedspan.data.metrics import METRICS
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.suggest import nearest

Figure = Literal["last", "best", "mean_last"]
"""The figure of a run: `last`, the mean over the clients of what each ends with; `best` and `mean_last`, of the
server's state in the evaluated rounds."""
POINT = 0.01
"""A point in the unit of a metric."""
_RUNNERS = {
    "seed": "the suite's `seeds`",
    "data.metrics": "the suite's `metric`",
    "data.test_from_training": "`tuning.share`",
}
"""Settings that the comparison sets itself -> where to set them."""


def _flat(value: object) -> object:
    """Return a grid's nested tables as one table with dotted keys, in our names."""
    return dict(_dotted(value)) if isinstance(value, Mapping) else value


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield canonical_key(prefix + key), value


def _ours(value: object) -> object:
    return canonical(value) if isinstance(value, Mapping) else value


def _different(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"expected every seed once, not {list(values)}")
    return values


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1), AfterValidator(_different)]
Settings = Annotated[dict[str, Any], BeforeValidator(_ours)]
Grid = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_flat)]


class Part(BaseModel):
    """A table of the file, without room for an unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Arm(Part):
    """One of the things that are compared."""

    name: Name
    settings: Settings = {}
    """Settings of a run that make the arm, such as `method.name`. A `method` with a name replaces the base's whole."""
    grid: Grid = {}
    """Setting -> the values to try on held-out training data; every combination is tried."""
    conditions: tuple[Name, ...] | None = None
    """The conditions under which it runs; unset: all."""


class Condition(Part):
    """A change of the base under which every arm is run."""

    name: Name
    settings: Settings = {}


class Tuning(Part):
    """The choice among the values of the grids, for each arm under each condition."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the training rows that the choice is made on. The test rows are not used."""
    seeds: Seeds = (1000,)
    """Seeds of the runs that choose; none of the suite's `seeds`."""
    rounds: Annotated[int, Field(ge=1)] | None = None
    """Rounds of those runs; unset: as many as in the final runs."""
    widen: Annotated[int, Field(ge=0)] = 1
    """Times that a grid of one positive number is extended by a value when the best one is at its edge."""


class Suite(Part):
    """A comparison of arms under conditions, over seeds."""

    name: Name
    base: Settings = {}
    """Settings that all runs share: a table, or the name of a settings file, as `fedspan run` takes it."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=2)]
    conditions: Annotated[tuple[Condition, ...], Field(min_length=1)] = (Condition(name="base"),)
    seeds: Seeds
    """Seeds of the final runs. Every arm has the same seeds, so that differences are paired."""
    baseline: str
    """Name of the arm that the others are compared with."""
    metric: str | None = None
    """The metric that is compared; unset: the usual one of the task."""
    figure: Figure = "last"
    """The figure of a run."""
    last_rounds: Annotated[int, Field(ge=1)] = 5
    """Number of evaluated rounds that `mean_last` is the mean of."""
    margin: Annotated[float, Field(ge=0)] = 1.0
    """Largest difference that does not matter, in points (hundredths of the metric's unit); 0: every one matters."""
    confidence: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.95
    """Confidence of the intervals."""
    tuning: Tuning = Tuning()

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        for kind, names in (("arms", self.arm_names), ("conditions", self.condition_names)):
            # Two folders of one name on some file systems.
            if len({name.lower() for name in names}) < len(names):
                raise FedspanError(f"{kind} = {list(names)}: expected names that differ in more than case")
        _known("baseline", self.baseline, self.arm_names)
        if self.metric is not None:
            _known("metric", self.metric, METRICS)
        for arm in self.arms:
            for name in arm.conditions or ():
                _known(f"conditions of the arm {arm.name}", name, self.condition_names)
        used = {name for name in self.condition_names if self.runs_under(self.baseline, name)}
        idle = [arm.name for arm in self.arms if not used & {*self.conditions_of(arm.name)}]
        if idle:
            raise FedspanError(f"the arm {idle[0]} has no condition in common with the baseline {self.baseline}")
        both = sorted({*self.seeds} & {*self.tuning.seeds})
        if both:
            raise FedspanError(f"tuning.seeds = {list(self.tuning.seeds)}: expected none of the final seeds {both}")
        for where, settings in self._settings():
            _check_settings(where, settings)
        return self

    def _settings(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield "base", self.base
        for arm in self.arms:
            yield f"the arm {arm.name}", arm.settings
            yield f"the grid of the arm {arm.name}", arm.grid
        for condition in self.conditions:
            yield f"the condition {condition.name}", condition.settings

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The arms in the order of the file."""
        return tuple(arm.name for arm in self.arms)

    @property
    def condition_names(self) -> tuple[str, ...]:
        """The conditions in the order of the file."""
        return tuple(condition.name for condition in self.conditions)

    def conditions_of(self, arm: str) -> tuple[str, ...]:
        """Return the conditions under which an arm runs."""
        return tuple(name for name in self.condition_names if self.runs_under(arm, name))

    def runs_under(self, arm: str, condition: str) -> bool:
        """Return whether an arm runs under a condition."""
        chosen = next(one for one in self.arms if one.name == arm).conditions
        return chosen is None or condition in chosen


def _known(where: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise FedspanError(f"{where} = {name!r}: expected one of {', '.join(names)}")


def _check_settings(where: str, settings: Mapping[str, Any]) -> None:
    given = {key for key, _ in _dotted(settings)}
    for key, place in _RUNNERS.items():
        if key in given:
            raise FedspanError(f"{where} sets {key}: expected it in {place}")


def read(path: Path) -> Suite:
    """Return the suite of a file; a settings file that it names as its base is read too.

    Raises
    ------
    FedspanError
        One line naming the file, the key or the value, and what was expected.
    """
    tree = _toml(path)
    base = tree.get("base", {})
    if isinstance(base, str):
        file = path.parent / Path(base).expanduser()
        tree["base"] = _base(file, path, base)
        metric = metric_of(tree["base"])
        tree = tree if metric is None else {"metric": metric, **tree}
    own = path.parent.resolve().name if path.stem == "suite" else path.stem
    return from_mapping({"name": own, **tree}, str(path))


def _base(file: Path, suite: Path, named: str) -> dict[str, Any]:
    """Return the settings of the file that a suite names as its base."""
    where = f"{suite}: base = {named!r}"
    if not named or file.is_dir():
        hint = f", such as {Path(named) / 'config.toml'}" if named and (file / "config.toml").is_file() else ""
        raise FedspanError(f"{where}: expected a table, or the name of a settings file{hint}")
    try:
        tree = _toml(file)
        if "arms" in tree:
            raise FedspanError("this is a suite: expected a table, or the name of a settings file")
        return as_base(tree, file, suite)
    except FedspanError as error:
        raise FedspanError(f"{where}: {error}") from None


def from_mapping(tree: Mapping[str, Any], where: str = "the suite") -> Suite:
    """Return the suite that nested values describe.

    Raises
    ------
    FedspanError
        One line naming the key or the value, and what was expected.
    """
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        raise FedspanError(f"{where}: {_problem(error)}") from None
    except FedspanError as error:  # of an alias that is given twice
        raise FedspanError(f"{where}: {error}") from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FedspanError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise FedspanError(f"{path} is not valid TOML: nested too deeply") from None
    except UnicodeDecodeError:
        raise FedspanError(f"{path} is not a text file: expected TOML in UTF-8") from None
    except ValueError as error:
        raise FedspanError(f"{path} is not valid TOML: {one_line(error, 200)}") from None


def _problem(error: ValidationError) -> str:
    """Return the first problem in one line, with the key that it is at."""
    # A mistyped key first: the one that it stands for is missing too.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place, key = list(first["loc"]), ".".join(str(step + 1 if isinstance(step, int) else step) for step in first["loc"])
    if first["type"] == "extra_forbidden":
        parts: Mapping[str, type[Part]] = {"arms": Arm, "conditions": Condition, "tuning": Tuning}
        known: type[Part] = parts[str(place[0])] if len(place) > 1 else Suite
        return f"unknown key {key!r}{nearest(str(place[-1]), known.model_fields)}"
    if first["type"] == "missing":
        return f"{key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if key == "base" and first["type"] == "dict_type":
        message = "expected a table, or the name of a settings file"
    if first["type"] == "tuple_type":
        message = "expected a list"
    if first["type"] == "too_short":
        message = f"expected at least {first['ctx']['min_length']}"
    if not key:
        return message
    given = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    return one_line(f"{key}{given}: {message[0].lower()}{message[1:]}", 300)


def check_extension(where: Path, began: Suite, now: Suite) -> None:
    """Refuse a suite that differs from the one that a folder was begun with by more than added parts.

    Raises
    ------
    FedspanError
        Naming everything that differs. Added seeds, arms and conditions extend a comparison, also those of an arm.
    """
    changed = [
        key
        for key in Suite.model_fields
        if key not in ("arms", "conditions", "seeds") and getattr(began, key) != getattr(now, key)
    ]
    changed += [f"seeds (without {seed})" for seed in began.seeds if seed not in now.seeds]
    changed += [f"arm {arm.name}" for arm in began.arms if not _extends(arm, began, now)]
    changed += [f"condition {part.name}" for part in began.conditions if part not in now.conditions]
    if changed:
        raise FedspanError(
            f"{where} was begun with another {', '.join(changed)}: expected the same suite, perhaps with more seeds, "
            "arms or conditions, or another folder (--out)"
        )


def _extends(arm: Arm, began: Suite, now: Suite) -> bool:
    """Return whether an arm is still there as it was, under the conditions that it had and perhaps others."""
    found = next((other for other in now.arms if other.name == arm.name), None)
    if found is None or found != arm.model_copy(update={"conditions": found.conditions}):
        return False
    kept = set(began.conditions_of(arm.name)).intersection(now.condition_names)  # a lost one is named by itself
    return kept <= set(now.conditions_of(arm.name))
