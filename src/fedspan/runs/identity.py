"""The things that a run's bits depend on, kept with its checkpoints: settings, data, base and libraries.

A run is resumed only with the same. What lies elsewhere (the base's folder, the files of the data) is compared by its
content, so it may have moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedspan.config import Config
from fedspan.data import Encoded
from fedspan.privacy.gaussian import fingerprint
from fedspan.support.errors import FedspanError
from fedspan.support.versions import installed_version

LIBRARIES = ("fedspan", "torch", "transformers", "peft", "numpy")
MAY_CHANGE = (
    *("federation.rounds", "device", "threads", "deployment", "tracking", "privacy.epsilon"),
    *(f"engine.{name}" for name in ("name", "cohort_size", "memory", "workers", "device_map", "compile")),
    *(f"evaluation.{name}" for name in ("every", "batch_size", "max_examples", "base", "local", "per_rank")),
    *("evaluation.patience", "evaluation.every_seconds"),
    *("evaluation.diagnostics", "model.name", "model.adapter", "data.train", "data.test", "data.unseen"),
)
"""Settings and sections that may differ when a run is resumed. Of paths the content is compared instead."""
_AT_ONCE = 512  # examples in one batch of the digest


def identity(config: Config, base: str, data: Mapping[str, Encoded]) -> dict[str, Any]:
    """Return the description of a run that its checkpoints keep, as JSON holds it.

    Parameters
    ----------
    base
        Digest of the untouched base, with the adapter that the run starts from.
    data
        The encoded splits.
    """
    described = {
        "settings": _settings(config),
        "base": base,
        "data": {split: _data_digest(examples) for split, examples in data.items()},
        # The build for a device or a CUDA version is no other version.
        "libraries": {name: installed_version(name).partition("+")[0] for name in LIBRARIES},
    }
    restored: dict[str, Any] = json.loads(json.dumps(described))
    return restored


def check_identity(where: object, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume what is not the same run any more.

    Parameters
    ----------
    where
        The run, as the message names it.
    began, now
        The descriptions of the run in its checkpoint, and of the attempt to resume it.

    Raises
    ------
    FedspanError
        Naming what changed, with both values where these are settings or versions.
    """
    changed = list(_changes(began, now))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise FedspanError(
            f"{where} cannot be resumed: {'; '.join(changed[:3])}{more}; expected what it began with, or a new run, "
            "which may start from this one's adapter (model.adapter)"
        )


def _changes(began: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    settings = list(_differing(began.get("settings", {}), now["settings"]))
    yield from settings
    if not settings:  # another seed or maximum length gives other heads and other data: consequences
        yield from _other_contents(began, now)
    yield from _differing(began.get("libraries", {}), now["libraries"])


def _other_contents(began: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if began.get("base") != now["base"]:
        yield "the base (model.name, model.adapter) has other weights than it began with"
    splits = sorted({*began.get("data", {}), *now["data"]})
    other = [split for split in splits if began.get("data", {}).get(split) != now["data"].get(split)]
    if other:
        yield f"the {' and '.join(other)} data is not what it began with, or its tokenizer or image processor is not"


def _differing(began: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*began, *now}):
        if began.get(key) != now.get(key):
            yield f"{key} is {now.get(key)!r}, and it began with {began.get(key)!r}"


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings by their keys, without those that may change."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        flat |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    return {key: v for key, v in flat.items() if key not in MAY_CHANGE and key.partition(".")[0] not in MAY_CHANGE}


def _data_digest(examples: Encoded) -> str:
    """Return a digest of the examples as the model sees them, of their targets and of their fields."""
    starts = range(0, len(examples), _AT_ONCE)
    batches = (examples.batch(range(start, min(start + _AT_ONCE, len(examples)))) for start in starts)
    seen = fingerprint((f"{i} {name}", t) for i, batch in enumerate(batches) for name, t in sorted(batch.items()))
    digest = hashlib.sha256(seen.encode())
    for value in (*examples.all_targets, *examples.all_fields):
        digest.update(repr(value).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
