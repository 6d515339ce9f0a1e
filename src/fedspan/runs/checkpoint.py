"""Checkpoints: everything that a run needs to resume, in one safetensors file that is replaced atomically.

Tensors are stored as they are; the structure around them is JSON in the file's header, so nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedspan.methods.base import ServerState
from fedspan.methods.messages import ClientState
from fedspan.methods.state_file import pack_state, pack_tensors, separate, unpack_state, unpack_tensors
from fedspan.runs.client_numbers import number_tensors, numbers_of
from fedspan.support.errors import FedspanError, one_line
from fedspan.support.files import StrPath, read_tensors, write_bytes

_FORMAT = 5
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
    identity: Mapping[str, Any] = field(default_factory=dict)
    """The settings, base, data and libraries of the run, as `fedspan.runs.identity` describes them."""


def write(path: StrPath, checkpoint: Checkpoint) -> None:
    """Replace the file at `path` by this checkpoint; if that fails, the file that was there survives.

    Raises
    ------
    OSError
        When the disk is full or the folder is not writable.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(checkpoint, tensors)
    whole = separate(tensors)
    content = {"format": _FORMAT, "sha256": _checksum(structure, whole), "checkpoint": structure}
    write_bytes(path, save(whole, metadata={"fedspan": json.dumps(content)}))


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
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FedspanError(f"{path} is damaged ({one_line(error, 200)}): expected a checkpoint") from None
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise FedspanError(f"{path} is not a checkpoint of format {_FORMAT}")
    if meta.get("sha256") != _checksum(meta.get("checkpoint"), tensors):
        raise FedspanError(f"{path} is damaged (its content is not that of its checksum): expected a checkpoint")
    try:
        return _unpack(meta["checkpoint"], tensors)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FedspanError(f"{path} is damaged (incomplete: {error}): expected a checkpoint") from None


def _checksum(structure: object, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the structure, as JSON writes it, and of the tensors' names, types, shapes and bits."""
    digest = hashlib.sha256(json.dumps(structure).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        **pack_state(checkpoint.state, tensors),
        "client_states": {
            client: pack_tensors(kept, f"client/{client}", tensors) for client, kept in checkpoint.client_states.items()
        },
        "seen": pack_tensors(number_tensors(checkpoint.seen), "seen", tensors),
        "counted": pack_tensors(number_tensors(checkpoint.counted), "counted", tensors),
        "history": list(checkpoint.history),
        "notes": dict(checkpoint.notes),
        "identity": dict(checkpoint.identity),
    }


def _unpack(meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    state = unpack_state(meta, tensors)
    clients = {client: unpack_tensors(keys, tensors) for client, keys in meta["client_states"].items()}
    seen, counted = (numbers_of(unpack_tensors(meta[name], tensors)) for name in ("seen", "counted"))
    return Checkpoint(state, clients, seen, tuple(meta["history"]), meta["notes"], counted, meta["identity"])
