"""Files that are written whole or not at all, and safetensors files read without unpickling."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

StrPath = str | os.PathLike[str]
"""A path as callers may give it; functions that take one make a `Path` of it."""


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file or nothing; its folder is created where it is missing.

    A temporary file is written beside it, flushed to the disk and renamed, so that a reader sees the old content or
    the new one, even after a power cut.
    """
    path = Path(path)
    make_folder(path.parent)
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
    flush(path.parent)  # or the rename itself may not survive a power cut


def write_new(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file that must not exist, so that of two writers at once one fails; its folder is created if missing.

    Raises
    ------
    FileExistsError
        When it exists; it is left as it is.
    """
    path = Path(path)
    make_folder(path.parent)
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    flush(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder, and those above it, where they are missing; each survives a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush(folder.parent)


def flush(path: Path) -> None:
    """Write a file's content, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: str | os.PathLike[str], key: str) -> tuple[Any, dict[str, Tensor]]:
    """Return the JSON under `key` of a safetensors file's header (None where it has no such key), and its tensors.

    Raises
    ------
    SafetensorError, json.JSONDecodeError
        When the file or its JSON is damaged. Callers know what the file was for, and say so to the user.
    """
    from safetensors import safe_open  # writers need not wait for this import

    with safe_open(os.fspath(path), framework="pt") as file:
        meta = json.loads((file.metadata() or {}).get(key, "null"))
        names = file.keys()  # an open file is not a mapping and cannot itself be iterated over
        return meta, {name: file.get_tensor(name) for name in names}
