"""What a server and its sites must have set alike, and how a difference is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedspan.config import Config

_ALIKE = ("adapter", "local", "privacy", "wire", "method")


def terms(config: Config) -> dict[str, Any]:
    """Every setting that both sides act on, by its key. Where the base lies and what data there is are each side's own;
    that the bases are the same is seen by their digests."""
    settings = config.model_dump(mode="json")
    found: dict[str, Any] = {"seed": config.seed, "federation.weighting": config.federation.weighting}
    found |= {f"model.{key}": settings["model"][key] for key in ("dtype", "quantise")}
    found["engine.autocast"] = settings["engine"]["autocast"]
    for section in _ALIKE:
        found |= {f"{section}.{key}": value for key, value in settings[section].items()}
    return found


def digest(found: Mapping[str, Any]) -> str:
    """One short name of all the terms."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def difference(server: Mapping[str, Any], site: Mapping[str, Any]) -> str | None:
    """The first setting in which they differ, in one line; none: they agree."""
    for key in sorted(server.keys() | site.keys()):
        if server.get(key) != site.get(key):
            return f"{key} is {site.get(key)!r} on the site and {server.get(key)!r} on the server: expected one value"
    return None
