"""Tensors that a site was sent and keeps on its disk, by their content, so that they need not be sent again."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from fedspan.support.files import make_folder, read_tensors
from fedspan.wire.contents import dense_strides, digest, in_memory_order, num_bytes
from fedspan.wire.schema import MAX_HELD

_NAME = re.compile(r"[0-9a-f]{64}")


class ContentStore:
    """Files named by the digest of the one tensor in them; those that were not used for longest go first.

    A file is renamed into its place when it is whole, and its digest is compared whenever it is read: after a crash,
    or on a damaged disk, a tensor is there with the right bits or not at all. Nothing is flushed to the disk, since
    what is lost is sent again.

    Parameters
    ----------
    folder
        For these files alone. It is made when it is needed.
    limit
        Bytes of tensors that are kept at most; 0: none.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._sizes: dict[str, int] = {}
        """By digest, in the order of their last use."""
        self._gone: dict[str, None] = {}
        for path in sorted(folder.glob("*"), key=_age) if folder.is_dir() else ():
            if limit and _NAME.fullmatch(path.name):
                self._sizes[path.name] = path.stat().st_size
            else:
                _remove(path)  # the rest of a write that was cut off
        self._make_room(0)
        self._gone.clear()  # the greeting says what is held

    def digests(self) -> list[str]:
        """Return the digests of what is held, as many as a greeting may name, the last used ones first."""
        return list(reversed(self._sizes))[:MAX_HELD]

    def gone(self) -> list[str]:
        """Return the digests of what was held when this was last called and is not any more, as many as an answer may
        name."""
        gone, self._gone = list(self._gone), {}
        return gone[:MAX_HELD]

    def get(self, name: str) -> Tensor | None:
        """Return the tensor of that digest, or None where it is not held or its file is damaged."""
        if name not in self._sizes:
            return None
        path = self._folder / name
        try:
            meta, tensors = read_tensors(path, "fedspan")
            tensor = torch.empty_strided(meta["shape"], meta["strides"], dtype=tensors["t"].dtype)
            # Into fresh memory: it is aligned as torch aligns, whatever the file's header takes.
            in_order = torch.as_strided(tensor, (tensor.numel(),), (1,))
            in_order.copy_(tensors["t"])
            found = digest(tensor)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError):
            found = ""
        if found != name:
            self._drop(name)
            return None
        self._sizes[name] = self._sizes.pop(name)
        with suppress(OSError):
            os.utime(path)
        return tensor

    def put(self, tensor: Tensor) -> bool:
        """Keep a tensor; return whether it is held now: one of more bytes than the limit is not."""
        name, size = digest(tensor), num_bytes(tensor)
        if name in self._sizes:
            self._sizes[name] = self._sizes.pop(name)
            return True
        meta = {"shape": list(tensor.shape), "strides": list(dense_strides(tensor))}
        content = save({"t": in_memory_order(tensor)}, metadata={"fedspan": json.dumps(meta)})
        if len(content) > self._limit:
            return False
        self._make_room(len(content))
        make_folder(self._folder)
        temporary = self._folder / f"{name}.{os.getpid()}.partial"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, self._folder / name)
        except OSError:
            _remove(temporary)
            return False  # a full disk costs traffic, and no round
        self._sizes[name] = max(size, len(content))
        self._gone.pop(name, None)
        return True

    def _make_room(self, size: int) -> None:
        total = sum(self._sizes.values())
        for name in list(self._sizes):
            if total + size <= self._limit:
                break
            total -= self._sizes[name]
            self._drop(name)

    def _drop(self, name: str) -> None:
        if self._sizes.pop(name, None) is not None:
            self._gone[name] = None
        _remove(self._folder / name)


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, path.name


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
