"""The settings and shapes that a server and its sites must have in common, and the report of a difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedspan.config import Config
from fedspan.support.versions import installed_version

LIBRARIES = ("torch", "transformers", "peft", "flwr")
"""Libraries whose version may change results, in the last bits or more."""
_PROGRAM, _LIBRARY = "version.fedspan", "version.library."
_SHARED_SECTIONS = ("adapter", "local", "privacy", "wire", "method")

_OF_THE_SAMPLE = ("num_clients", "participation", "min_clients", "sampler")


def terms(config: Config) -> dict[str, Any]:
    """Return every setting that both sides act on, by its key, and the versions of what acts on them.

    The location of the base and the data are each side's own. That the bases are the same is checked by their digests.
    """
    settings = config.model_dump(mode="json")
    shared: dict[str, Any] = {_PROGRAM: installed_version("fedspan")}
    shared |= {f"{_LIBRARY}{name}": installed_version(name) for name in LIBRARIES}
    shared |= {"seed": config.seed, "federation.weighting": config.federation.weighting}
    # Sites that divide one data set must divide it alike.
    shared |= {"data.seed": config.data_seed, "federation.seed": config.federation_seed}
    shared |= {f"model.{key}": settings["model"][key] for key in ("dtype", "quantise", "dropout")}
    shared["engine.autocast"] = settings["engine"]["autocast"]
    for section in _SHARED_SECTIONS:
        shared |= {f"{section}.{key}": value for key, value in settings[section].items()}
    # Sites that read their rows by other prompts, or score them by other metrics, would train and judge another task.
    shared |= {f"data.{key}": settings["data"][key] for key in ("metrics", "template", "system")}
    shared["evaluation.where"] = config.evaluation.where
    if config.evaluation.where != "server":
        shared |= {f"evaluation.{key}": settings["evaluation"][key] for key in ("max_examples", "max_new_tokens")}
    if config.privacy.secure_sums:
        # Each site derives from them the fewest clients that it takes part in a sum with.
        shared |= {f"federation.{key}": settings["federation"][key] for key in _OF_THE_SAMPLE}
        if config.deployment.regions:
            shared["deployment.regions"] = settings["deployment"]["regions"]
    return shared


def shapes(modules: Mapping[str, Sequence[int]], dense: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of the adapted modules and of the trained weights, under names that differ by kind."""
    shape_of = {name: list(shape) for name, shape in modules.items()}
    return shape_of | {f"dense {name}": list(t.shape) for name, t in dense.items()}


def labels(kind: str, num_labels: int, names: Sequence[str] | None) -> str:
    """Return a digest of what the labels of a data set mean: their number, and their names in the order of their ids.

    A site that learns the ids from its own rows would otherwise train other classes under the same ids.
    """
    described = [kind, num_labels, None if names is None else list(names)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def digest(settings: Mapping[str, Any]) -> str:
    """Return one short name for the settings of `terms`; sites with other libraries have the same."""
    return hashlib.sha256(json.dumps(_agreed(settings), sort_keys=True).encode()).hexdigest()


def difference(server: Mapping[str, Any], site: Mapping[str, Any]) -> str | None:
    """Return the first setting in which the two differ, in one line, or None where they agree, libraries apart."""
    server, site = _agreed(server), _agreed(site)
    # In the order of `terms`: the last ones are there only where an earlier one says so.
    for key in dict.fromkeys((*server, *site)):
        if server.get(key) != site.get(key):
            return f"{key} is {site.get(key)!r} on the site and {server.get(key)!r} on the server: expected one value"
    return None


def library_differences(server: Mapping[str, Any], site: Mapping[str, Any]) -> str | None:
    """Return the libraries whose versions differ, in one line, or None where there are none."""
    keys = [key for key in sorted(server) if key.startswith(_LIBRARY) and server[key] != site.get(key)]
    if not keys:
        return None
    return ", ".join(f"{key.removeprefix(_LIBRARY)} {site.get(key)} (server: {server[key]})" for key in keys)


def _agreed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith(_LIBRARY)}
