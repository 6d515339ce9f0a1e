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
from fedspan.methods.messages import ClientState
from fedspan.methods.state_file import pack_state, pack_tensors, separate, unpack_state, unpack_tensors
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
    write_bytes(path, save(separate(tensors), metadata=meta))


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
    return {
        **pack_state(checkpoint.state, tensors),
        "client_states": {
            client: pack_tensors(kept, f"client/{client}", tensors) for client, kept in checkpoint.client_states.items()
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
