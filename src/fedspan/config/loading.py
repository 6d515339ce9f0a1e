"""Settings from TOML files, `--set` overrides and mappings, with mistakes answered in one line."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedspan.config.aliases import ALIASES, canonical, canonical_key, refuse_second_name
from fedspan.config.sections import Config, valid_keys
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

_TASK_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "builtin:digits": {
        "model": {"name": "builtin:vit"},
        "federation": {"partition": "dirichlet", "dirichlet_alpha": 0.1},
    },
}


def load(path: str | os.PathLike[str] | None = None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (None: the built-in defaults) and apply `key=value` overrides.

    Later overrides win over earlier ones and over the file.

    Raises
    ------
    FedspanError
        One line naming the key or value and what was expected.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise FedspanError(f"cannot read the config {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FedspanError(f"{path} is not valid TOML: {error}") from None
    # Our names from here on, so that an override under an alias replaces the file's value.
    tree = canonical(tree)
    names: dict[str, str] = {}
    for item in overrides:
        _override(tree, item, names)
    return from_mapping(tree)


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Validate nested settings, filling gaps with the defaults of the task.

    Raises
    ------
    FedspanError
        One line naming the key or value and what was expected.
    """
    complete = _with_task_defaults(canonical(tree))
    try:
        return Config.model_validate(complete)
    except ValidationError as error:
        raise FedspanError(_one_line(error)) from None


def with_absolute_paths(config: Config) -> Config:
    """Return the settings with absolute paths of files and folders, so that they mean the same from anywhere."""

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name

    data, model = config.data, config.model
    paths = {part: tuple(map(absolute, getattr(data, part))) for part in ("train", "test", "unseen")}
    return config.model_copy(
        update={
            "data": data.model_copy(update=paths if data.task == "files" else {}),
            "model": model.model_copy(update={"name": absolute(model.name)}),
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
    return complete


def _override(tree: dict[str, Any], item: str, names: dict[str, str]) -> None:
    """Apply one `a.b=value`; the value is TOML, or a plain string where it is not."""
    given, separator, text = item.partition("=")
    given = given.strip()
    if not separator or not given:
        raise FedspanError(f"--set {item!r}: expected key=value, such as federation.rounds=20")
    try:
        value: Any = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
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
    """Return the first problem in one line."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if isinstance(part, str) and part.isidentifier())
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, [*valid_keys(), *ALIASES])}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"
