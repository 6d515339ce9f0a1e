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
from fedspan.methods.messages import ClientState
from fedspan.methods.state_file import pack_state, pack_tensors, separate, unpack_state, unpack_tensors
from fedspan.support.files import read_tensors, write_bytes
from fedspan.support.errors import FedspanError

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
    write_bytes(path, save(separate(tensors), metadata=meta))


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
    return {
        **pack_state(checkpoint.state, tensors),
        "client_states": {
            client: pack_tensors(kept, f"client/{client}", tensors)
            for client, kept in checkpoint.client_states.items()
        },
        "seen": dict(checkpoint.seen),
        "counted": dict(checkpoint.counted),
        "history": list(checkpoint.history),
        "notes": dict(checkpoint.notes),
    }


def _unpack(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    state = unpack_state(meta, tensors)
    clients = {client: unpack_tensors(keys, tensors) for client, keys in meta["client_states"].items()}
    return Checkpoint(state, clients, meta["seen"], tuple(meta["history"]), meta["notes"], meta["counted"])
