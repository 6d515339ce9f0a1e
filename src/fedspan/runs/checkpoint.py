"""Everything that a run needs to go on, in one safetensors file that is replaced atomically.

Tensors are stored as they are; the structure around them is JSON in the file's own header, so nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedspan.methods.base import ServerState
from fedspan.methods.messages import ClientState, Template
from fedspan.methods.patches import Patch, PatchLog, patch_of, patch_tensors
from fedspan.support.errors import FedspanError
from fedspan.support.files import read_tensors, write_bytes

_FORMAT = 3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a federation stands between two rounds."""

    state: ServerState
    client_states: Mapping[str, ClientState] = field(default_factory=dict)
    seen: Mapping[str, int] = field(default_factory=dict)
    """Client -> newest patch version that it holds."""
    history: tuple[Mapping[str, Any], ...] = ()
    """One record per finished round."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What else the run has measured so far."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Client -> how many rounds were finished when its answer last counted."""


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Replace `path` by this checkpoint; whatever goes wrong, the file that was there survives.

    Raises
    ------
    OSError
        When the disk is full or the folder is not writable.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(checkpoint, tensors)
    meta = {"fedspan": json.dumps({"format": _FORMAT, "checkpoint": structure})}
    write_bytes(path, save(_apart(tensors), metadata=meta))


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`.

    Raises
    ------
    ValueError
        When the file is no checkpoint of this library, or damaged.
    """
    try:
        meta, tensors = read_tensors(path, "fedspan")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FedspanError(f"{path} is damaged ({error}): expected a checkpoint") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise FedspanError(f"{path} is no checkpoint of format {_FORMAT}")
    try:
        return _unpack(meta["checkpoint"], tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise FedspanError(f"{path} is damaged (something is missing: {error}): expected a checkpoint") from None


def _pack(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    state = checkpoint.state
    t = state.template
    log = state.patches
    return {
        "template": {
            "modules": {name: list(shape) for name, shape in t.modules.items()},
            "rank": t.rank,
            "alpha": t.alpha,
            "rslora": t.rslora,
            "seed": t.seed,
            "num_clients": t.num_clients,
        },
        "round_num": state.round_num,
        "exchange": state.exchange,
        "modules": {name: _named(held, f"module/{name}", tensors) for name, held in state.modules.items()},
        "dense": _named(state.dense, "dense", tensors),
        "extra": _named(state.extra, "extra", tensors),
        "patches": None
        if log is None
        else {
            "version": log.version,
            "total": _pack_patch(log.total, "patch/total", tensors),
            "increments": [_pack_patch(x, f"patch/{i}", tensors) for i, x in enumerate(log.increments)],
        },
        "client_states": {
            client: _named(kept, f"client/{client}", tensors) for client, kept in checkpoint.client_states.items()
        },
        "seen": dict(checkpoint.seen),
        "counted": dict(checkpoint.counted),
        "history": list(checkpoint.history),
        "notes": dict(checkpoint.notes),
    }


def _unpack(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    t = meta["template"]
    log = meta["patches"]
    state = ServerState(
        Template(**{**t, "modules": {n: (m, k) for n, (m, k) in t["modules"].items()}}),
        {name: _load(keys, tensors) for name, keys in meta["modules"].items()},
        _load(meta["dense"], tensors),
        meta["round_num"],
        meta["exchange"],
        None
        if log is None
        else PatchLog(
            _unpack_patch(log["total"], tensors),
            log["version"],
            tuple(_unpack_patch(x, tensors) for x in log["increments"]),
        ),
        _load(meta["extra"], tensors),
    )
    clients = {client: _load(keys, tensors) for client, keys in meta["client_states"].items()}
    return Checkpoint(state, clients, meta["seen"], tuple(meta["history"]), meta["notes"], meta["counted"])


def _named(held: Mapping[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    keys = {name: f"{prefix}/{name}" for name in held}
    tensors.update({keys[name]: value for name, value in held.items()})
    return keys


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and without shared memory, which the file format refuses: a log's first increment is its total."""
    apart: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        apart[name] = whole.clone() if whole.untyped_storage().data_ptr() in held else whole
        held.add(apart[name].untyped_storage().data_ptr())
    return apart


def _load(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[key] for name, key in keys.items()}


def _pack_patch(patch: Mapping[str, Patch], prefix: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    return {name: _named(patch_tensors(p), f"{prefix}/{name}", tensors) for name, p in patch.items()}


def _unpack_patch(meta: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]) -> dict[str, Patch]:
    return {name: patch_of(_load(keys, tensors)) for name, keys in meta.items()}
