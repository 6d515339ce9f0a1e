"""Clients' updates as a folder of safetensors files, one per update, read module by module on demand.

A server rule that goes module by module over the updates of a spool holds one module's factors at a time: nothing is
mapped into memory, and what was read is freed with the tensor that holds it. Tensors are stored as they are; the
client and the structure are JSON in the file's own header, so nothing is unpickled.

Shapes: B (m, r), A (r, n), as in `fedspan.algebra.lowrank`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import torch
from safetensors.torch import save
from torch import Tensor

from fedspan.algebra.finite import is_finite
from fedspan.methods.messages import Factors, Payload, Update, Vector
from fedspan.support.errors import FedspanError
from fedspan.support.files import write_bytes

_FORMAT = 1
_SUFFIX = ".safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_HEADER = 100_000_000  # bytes; a longer one is a damaged length, not a header


class Spool:
    """A folder of updates, iterated in sorted client order; every pass reads the files again.

    Parameters
    ----------
    folder
        Holds the files; made by the first `add`.

    Raises
    ------
    FedspanError
        While iterating, naming the file: when it is damaged, changed or not an update of the client it is named after.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def add(self, update: Update) -> Path:
        """Write one update, whole or not at all; a FedspanError when the client has already sent one."""
        path = self.folder / _file_name(update.client_id)
        if path.exists():
            raise FedspanError(f"{self.folder} already holds an update of {update.client_id}: expected one each")
        write_update(path, update)
        return path

    def clients(self) -> list[str]:
        """Return the ids of the clients whose updates are there, sorted."""
        if not self.folder.is_dir():
            raise FedspanError(f"{self.folder} is no folder: expected one with updates")
        # A writer that was killed leaves a file of another suffix behind.
        names = (entry.name for entry in os.scandir(self.folder))
        return sorted(unquote(name.removesuffix(_SUFFIX)) for name in names if name.endswith(_SUFFIX))

    def __len__(self) -> int:
        return len(self.clients())

    def __iter__(self) -> Iterator[Update]:
        for client_id in self.clients():
            path = self.folder / _file_name(client_id)
            update = read_update(path)
            if update.client_id != client_id:
                raise FedspanError(f"{path} holds an update of {update.client_id}: expected that of {client_id}")
            yield update


def write_update(path: Path, update: Update) -> None:
    """Replace `path` by this update; on any failure the previous file survives.

    Raises
    ------
    FedspanError
        When a tensor is of a kind that updates do not hold (not float64, float32, float16 or bfloat16).
    OSError
        When the disk is full or the folder is not writable.
    """
    tensors: dict[str, Tensor] = {}

    def keep(value: Tensor) -> str:
        if value.dtype not in _DTYPES.values():
            raise FedspanError(f"{update.client_id} holds a tensor of {value.dtype}: expected floating point")
        # Numbered, so that the file holds them in the order in which a server asks for them.
        key = f"{len(tensors):06d}"
        # A copy where it is a view: the format refuses tensors that share memory.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return key

    modules: dict[str, Any] = {}
    for name, payload in update.modules.items():
        if isinstance(payload, Factors):
            modules[name] = {"b": keep(payload.b), "a": keep(payload.a), "scaling": payload.scaling}
        else:
            modules[name] = {"values": {field: keep(value) for field, value in payload.values.items()}}
    about = {
        "format": _FORMAT,
        "client_id": update.client_id,
        "num_examples": update.num_examples,
        "modules": modules,
        "dense": {name: keep(value) for name, value in update.dense.items()},
    }
    write_bytes(path, save(tensors, metadata={"fedspan_update": json.dumps(about)}))


def read_update(path: Path) -> Update:
    """Open the update in one file. The header is read and checked here, a tensor each time that it is accessed.

    Raises
    ------
    FedspanError
        When the file is damaged or holds no update; later, when a tensor read from it holds NaN or infinity, or the
        file has been replaced.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            opened, about = _open(path, file)
        entry = _Entry(opened, about["client_id"])
        modules = {name: entry.checked(name, keys) for name, keys in about["modules"].items()}
        dense = {name: entry.known(key) for name, key in about["dense"].items()}
        count = about["num_examples"]
        if not isinstance(about["client_id"], str) or not _is_number(count):
            raise FedspanError(f"client_id {about['client_id']!r}, num_examples {count!r}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FedspanError(f"{path} is damaged or no update of a client ({error})") from None
    return Update(about["client_id"], count, _Payloads(entry, modules), _Dense(entry, dense))


def _file_name(client_id: str) -> str:
    return quote(client_id, safe="") + _SUFFIX


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


@dataclass(frozen=True, slots=True)
class _Span:
    """The place of a tensor in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file whose header has been checked."""

    path: Path
    identity: tuple[int, int, int]
    spans: Mapping[str, _Span]


def _identity(file: BinaryIO) -> tuple[int, int, int]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _open(path: Path, file: BinaryIO) -> tuple[_Opened, dict[str, Any]]:
    """Return the checked header of an open file, and its description of the update."""
    identity = _identity(file)
    total = identity[1]
    length = int.from_bytes(_exactly(file, 8), "little")
    if length > min(total - 8, _LARGEST_HEADER):
        raise FedspanError(f"its header should be {length} bytes of {total}")
    header = json.loads(_exactly(file, length))
    about = json.loads(header.pop("__metadata__")["fedspan_update"])
    if about["format"] != _FORMAT:
        raise FedspanError(f"format {about['format']!r}: expected {_FORMAT}")
    spans = {key: _span(key, entry, 8 + length) for key, entry in header.items()}
    # One after the other to the end of the file: no hole, no overlap, nothing missing.
    end = 8 + length
    for span in sorted(spans.values(), key=lambda s: (s.offset, s.size)):
        if span.offset != end:
            raise FedspanError(f"a tensor starts at byte {span.offset}: expected {end}")
        end += span.size
    if end != total:
        raise FedspanError(f"{total} bytes: expected {end}")
    return _Opened(path, identity, spans), about


def _span(key: str, entry: Mapping[str, Any], start: int) -> _Span:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES:
        raise FedspanError(f"a tensor of type {dtype!r}: expected one of {', '.join(_DTYPES)}")
    numbers = [*shape, begin, end]
    if not all(isinstance(x, int) and x >= 0 for x in numbers):
        raise FedspanError(f"tensor {key} has shape and place {numbers}: expected counts")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise FedspanError(f"tensor {key} of shape {shape} has {end - begin} bytes")
    return _Span(_DTYPES[dtype], tuple(shape), start + begin, end - begin)


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise FedspanError(f"it ends after {len(content)} of {size} bytes")
    return content


@dataclass(frozen=True, slots=True)
class _Entry:
    """One client's file, from which its tensors are read."""

    file: _Opened
    client_id: str

    def known(self, key: str) -> str:
        """Return the key, or raise a KeyError where the file has no such tensor."""
        self.file.spans[key]
        return key

    def checked(self, module: str, keys: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the keys of a module, or raise where their tensors are missing or make no payload."""
        if "values" in keys:
            return {"values": {field: self.known(key) for field, key in keys["values"].items()}}
        b, a = (self.file.spans[keys[side]].shape for side in ("b", "a"))
        if len(b) != 2 or len(a) != 2 or b[1] != a[0]:
            raise FedspanError(f"factors of {module} of shapes {b} and {a}: expected (m, r) and (r, n)")
        if not _is_number(keys["scaling"]) or not math.isfinite(keys["scaling"]):
            raise FedspanError(f"scaling {keys['scaling']!r} of {module}: expected a number")
        return keys

    def read(self, name: str, key: str) -> Tensor:
        """Read a tensor into fresh memory; a FedspanError where it is not finite."""
        span = self.file.spans[key]
        raw = torch.empty(span.size, dtype=torch.uint8)
        # A new descriptor for every read: threads share no position, and many clients do not exhaust the limit of them.
        with open(self.file.path, "rb", buffering=0) as file:
            if _identity(file) != self.file.identity:
                raise FedspanError(f"{self.file.path} was changed while it was being read")
            file.seek(span.offset)
            view, done = raw.numpy().data, 0
            while done < span.size:
                got = file.readinto(view[done:])
                if not got:
                    raise FedspanError(f"{self.file.path} ended while it was being read")
                done += got
        value = raw.view(span.dtype).reshape(span.shape)
        if not is_finite(value):
            raise FedspanError(f"{self.file.path}: {name} of {self.client_id} holds NaN or infinity")
        return value


class _Payloads(Mapping[str, Payload]):
    """Module -> payload, read on access."""

    def __init__(self, entry: _Entry, keys: Mapping[str, Any]) -> None:
        self._entry = entry
        self._keys = keys

    def __getitem__(self, module: str) -> Payload:
        keys, read = self._keys[module], self._entry.read
        if "values" in keys:
            return Vector({field: read(module, key) for field, key in keys["values"].items()})
        return Factors(read(module, keys["b"]), read(module, keys["a"]), float(keys["scaling"]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, module: object) -> bool:
        return module in self._keys  # without reading it


class _Dense(Mapping[str, Tensor]):
    """Name -> dense weight, read on access."""

    def __init__(self, entry: _Entry, keys: Mapping[str, str]) -> None:
        self._entry = entry
        self._keys = keys

    def __getitem__(self, name: str) -> Tensor:
        return self._entry.read(name, self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys  # without reading it
