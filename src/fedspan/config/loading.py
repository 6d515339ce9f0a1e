"""Settings from TOML files, `--set` overrides and mappings, with mistakes answered in one line."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedspan.config.aliases import ALIASES, canonical, canonical_key, refuse_second_name
from fedspan.config.paths import located, reads_files
from fedspan.config.sections import Config, FederationConfig, valid_keys
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.paths import exists
from fedspan.support.suggest import nearest

_DEEPEST = 10
_TASK_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "builtin:digits": {
        "model": {"name": "builtin:vit"},
        "federation": {"partition": "dirichlet", "dirichlet_alpha": 0.1},
    },
}


def load(
    path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = (), *, must_exist: bool = False
) -> Config:
    """Read a TOML file (None: the built-in defaults) and apply `key=value` overrides.

    Later overrides win over earlier ones and over the file. A relative path of data or of the model is looked up beside
    the TOML file first and then in the working folder; one in an override the other way round.

    Parameters
    ----------
    must_exist
        Refuse files of data that are found at neither place.

    Raises
    ------
    FedspanError
        One line naming the key or value and what was expected.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows editors mark the file
        except OSError as error:
            raise FedspanError(f"cannot read the config {path}: {error.strerror}") from None
        except RecursionError:
            raise FedspanError(f"{path} is not valid TOML: nested too deeply; expected sections") from None
        except ValueError as error:  # of TOML, of UTF-8, or of a number with thousands of digits
            raise FedspanError(f"{path} is not valid TOML: {one_line(error, 200)}") from None
        _check_depth(f"the settings of {path}", tree)
    # Our names from here on, so that an override under an alias replaces the file's value.
    tree = canonical(tree)
    names: dict[str, str] = {}
    for item in [overrides] if isinstance(overrides, str) else overrides:
        _override(tree, item, names)
    return located(from_mapping(tree), None if path is None else Path(path).parent, names, must_exist)


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Validate nested settings, filling gaps with the defaults of the task.

    Raises
    ------
    FedspanError
        One line naming the key or value and what was expected.
    """
    _check_depth("the settings", tree)
    complete = _with_task_defaults(canonical(tree))
    try:
        return Config.model_validate(complete)
    except ValidationError as error:
        raise FedspanError(_one_line(error)) from None


def _check_depth(where: str, tree: object) -> None:
    """Refuse what is nested deeper than any setting: nothing below would end in an answer."""
    level: list[object] = [tree]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return
    raise FedspanError(f"{where} are nested over {_DEEPEST} deep: expected sections of settings")


def with_absolute_paths(config: Config) -> Config:
    """Return the settings with absolute paths of files and folders, so that they mean the same from anywhere."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.resolve()) if exists(path) else name

    data, model, tracking = config.data, config.model, config.tracking
    logs = tracking.folder and str(Path(tracking.folder).expanduser().resolve())
    paths = {part: tuple(map(absolute, getattr(data, part))) for part in ("train", "test", "unseen")}
    return config.model_copy(
        update={
            "data": data.model_copy(update=paths if reads_files(data) else {}),
            "tracking": tracking.model_copy(update={"folder": logs}),
            "model": model.model_copy(
                update={"name": absolute(model.name), "adapter": model.adapter and absolute(model.adapter)}
            ),
        }
    )


def _with_task_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    complete = dict(tree)
    if isinstance(tree.get("method"), dict):
        # An option of the default method may be set without naming it.
        complete["method"] = {"name": "glora", **tree["method"]}
    data = tree.get("data")
    task = data.get("task") if isinstance(data, dict) else None
    for section, values in _TASK_DEFAULTS.get(str(task), {}).items():
        given = tree.get(section, {})
        if isinstance(given, Mapping):
            complete[section] = {**values, **given}
    return _with_schedule_rounds(_with_file_defaults(complete))


def _with_schedule_rounds(tree: dict[str, Any]) -> dict[str, Any]:
    """Write down the rounds of a schedule, which must not change when the run is extended."""
    local, federation = tree.get("local"), tree.get("federation", {})
    if not isinstance(local, Mapping) or not isinstance(federation, Mapping):
        return tree
    if local.get("schedule", "constant") == "constant" or local.get("schedule_rounds") is not None:
        return tree
    rounds = federation.get("rounds", FederationConfig.model_fields["rounds"].default)
    return {**tree, "local": {**local, "schedule_rounds": rounds}}


def _with_file_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """Add what training files say by themselves: that they are the task, and that several are a client each."""
    data, federation = tree.get("data"), tree.get("federation", {})
    train = data.get("train") if isinstance(data, Mapping) else None
    if not train or not isinstance(data, Mapping) or data.get("task", "files") != "files":
        return tree
    complete = {**tree, "data": {"task": "files", **data}}
    if not isinstance(federation, Mapping):
        return complete
    count, given = len(train) if isinstance(train, list | tuple) else 1, federation.get("num_clients")
    if count > 1 and "field_column" not in data and given in (None, count):
        federation = {"partition": "files", **federation}
    if federation.get("partition") == "files":
        federation = {"num_clients": count, **federation}
    return {**complete, "federation": federation}


def _override(tree: dict[str, Any], item: str, names: dict[str, str]) -> None:
    """Apply one `a.b=value`; the value is TOML, or a plain string where it is not."""
    given, separator, text = item.partition("=")
    given = given.strip()
    if not separator or not given:
        raise FedspanError(f"--set {item!r}: expected key=value, such as federation.rounds=20")
    try:
        value: Any = tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):
        value = text.strip()
    key = canonical_key(given)
    refuse_second_name(names, key, given)
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise FedspanError(f"--set {item!r}: {parent} is a value, not a section")
        node = child
    node[last] = value


def _one_line(error: ValidationError) -> str:
    """Return the first setting with a problem, and what was expected there, in one line."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return _unknown(".".join(map(str, first["loc"])), isinstance(first["input"], Mapping))
    key = _setting_of(first["loc"])
    if first["type"] in ("model_type", "dict_type"):
        return f"{key} = {first['input']!r}: expected a section, [{key}]"
    # One value of several types has one problem for each.
    messages = list(dict.fromkeys(problem["msg"] for problem in problems if _setting_of(problem["loc"]) == key))
    if len(messages) > 1:
        kinds = [message.removeprefix("Input should be ").partition(", unable to")[0] for message in messages]
        messages = [f"Input should be {', or '.join(dict.fromkeys(kinds))}"]
    message = messages[0].removeprefix("Value error, ").replace("a valid tuple", "a valid list")
    # A check of a whole section names its settings.
    if not key or (key in Config.model_fields and first["type"] == "value_error"):
        return message
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def _unknown(key: str, section: bool) -> str:
    """Return the line on an unknown key, with the keys that may have been meant."""
    same_end = [valid for valid in valid_keys() if valid.rpartition(".")[2] == key]
    if same_end and not section:
        return f"unknown key {key!r}; did you mean {' or '.join(map(repr, same_end))}?"
    hint = nearest(key, valid_keys())
    if "did you mean" not in hint:
        hint = nearest(key, [*valid_keys(), *ALIASES])
    if "did you mean" not in hint:
        hint = "; `fedspan config` prints all of them"
    if "." not in key and not section and not get_close_matches(key, valid_keys(), cutoff=0.8):
        hint += f" (an option of the method is 'method.{key}')"
    return f"unknown key {key!r}{hint}"


def _setting_of(location: Sequence[int | str]) -> str:
    """Return the setting that pydantic's path leads to; what follows in it are types and places in a list."""
    keys = {*valid_keys(), ""}
    return next(key for i in range(len(location), -1, -1) if (key := ".".join(map(str, location[:i]))) in keys)
