"""Files that are written whole or not at all, and safetensors files read without unpickling."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

StrPath = str | os.PathLike[str]
"""A path as callers may give it; functions that take one make a `Path` of it."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: a temporary file beside it, flushed to the disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the rename itself may not survive a power cut
    finally:
        os.close(folder)


def read_tensors(path: Path, key: str) -> tuple[Any, dict[str, Tensor]]:
    """The JSON under `key` of a safetensors file's header (none: null), and its tensors.

    Raises
    ------
    SafetensorError, json.JSONDecodeError
        When the file or its JSON is damaged.
    """
    from safetensors import safe_open  # torch and safetensors are needed here alone

    with safe_open(str(path), framework="pt") as file:
        meta = json.loads((file.metadata() or {}).get(key, "null"))
        names = file.keys()  # an open file is no mapping: it cannot be iterated itself
        return meta, {name: file.get_tensor(name) for name in names}
