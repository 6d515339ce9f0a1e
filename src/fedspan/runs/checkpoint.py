"""Checkpoints: everything that a run needs to resume, in one safetensors file that is replaced atomically.

Tensors are stored as they are; the structure around them is JSON in the file's header, so nothing is unpickled.
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
from fedspan.support.files import StrPath, read_tensors, write_bytes

_FORMAT = 3
"""Raised whenever the layout changes: a file of another format is refused, never guessed at."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a federation between two rounds."""

    state: ServerState
    client_states: Mapping[str, ClientState] = field(default_factory=dict)
    """Client -> what it keeps between its rounds, for clients that are simulated."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Client -> the newest patch version that it holds."""
    history: tuple[Mapping[str, Any], ...] = ()
    """One record per finished round."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Measurements from outside the rounds, such as the figures of the untouched base."""
    counted: Mapping[str, int] = field(default_factory=dict)
    """Client -> the number of finished rounds when its answer last counted."""


def write(path: StrPath, checkpoint: Checkpoint) -> None:
    """Replace the file at `path` by this checkpoint; if that fails, the file that was there survives.

    Raises
    ------
    OSError
        When the disk is full or the folder is not writable.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(checkpoint, tensors)
    meta = {"fedspan": json.dumps({"format": _FORMAT, "checkpoint": structure})}
    write_bytes(Path(path), save(_unshared(tensors), metadata=meta))


def read(path: StrPath) -> Checkpoint:
    """Read the checkpoint at `path`.

    Raises
    ------
    FedspanError
        When the file is not a checkpoint of this library, has another format, or is damaged.
    OSError
        When it cannot be read.
    """
    path = Path(path)
    try:
        meta, tensors = read_tensors(path, "fedspan")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FedspanError(f"{path} is damaged ({error}): expected a checkpoint") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise FedspanError(f"{path} is not a checkpoint of format {_FORMAT}")
    try:
        return _unpack(meta["checkpoint"], tensors)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FedspanError(f"{path} is damaged (incomplete: {error}): expected a checkpoint") from None


def _pack(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the structure of a checkpoint, with a key in place of every tensor, and put the tensors into `tensors`."""
    state = checkpoint.state
    template, log = state.template, state.patches
    return {
        "template": {
            "modules": {name: list(shape) for name, shape in template.modules.items()},
            "rank": template.rank,
            "alpha": template.alpha,
            "rslora": template.rslora,
            "seed": template.seed,
            "num_clients": template.num_clients,
        },
        "round_num": state.round_num,
        "exchange": state.exchange,
        "modules": {name: _named(parts, f"module/{name}", tensors) for name, parts in state.modules.items()},
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
    template, log = meta["template"], meta["patches"]
    state = ServerState(
        Template(**{**template, "modules": {name: (m, n) for name, (m, n) in template["modules"].items()}}),
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


def _named(values: Mapping[str, Tensor], prefix: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Put the values into `tensors` and return name -> their key there."""
    keys = {name: f"{prefix}/{name}" for name in values}
    tensors.update({keys[name]: value for name, value in values.items()})
    return keys


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous and without shared memory, which the file format refuses."""
    unshared: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        # Some do share: the first increment of a patch log is its total.
        unshared[name] = whole.clone() if whole.untyped_storage().data_ptr() in written else whole
        written.add(unshared[name].untyped_storage().data_ptr())
    return unshared


def _load(keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[key] for name, key in keys.items()}


def _pack_patch(patch: Mapping[str, Patch], prefix: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    return {name: _named(patch_tensors(p), f"{prefix}/{name}", tensors) for name, p in patch.items()}


def _unpack_patch(meta: Mapping[str, Mapping[str, str]], tensors: Mapping[str, Tensor]) -> dict[str, Patch]:
    return {name: patch_of(_load(keys, tensors)) for name, keys in meta.items()}
