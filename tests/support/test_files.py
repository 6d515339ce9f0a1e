"""Files that are written whole or not at all, and tensors read from files that may be damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from fedspan.support import files
from fedspan.support.files import read_tensors, write_bytes, write_new


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_written_into_a_new_folder_and_over_an_old_file(tmp_path: Path, kind: type) -> None:
    """Whichever type the path has, and with no temporary file left beside it."""
    path = tmp_path / "a" / "b" / "file"
    write_bytes(kind(path), b"old and longer")
    write_bytes(kind(path), b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A full disk shows when the content is flushed; the new file's name is taken only after that."""
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def tensor_file(path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(save({"x": torch.arange(6.0).reshape(2, 3)}, metadata))
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_tensors_and_the_json_of_a_key_are_read(tmp_path: Path, kind: type) -> None:
    path = tensor_file(tmp_path / "file", {"mine": '{"a": [1]}'})
    meta, tensors = read_tensors(kind(path), "mine")
    assert meta == {"a": [1]}
    assert torch.equal(tensors["x"], torch.arange(6.0).reshape(2, 3))
    assert read_tensors(path, "other")[0] is None
    assert read_tensors(tensor_file(tmp_path / "bare"), "mine")[0] is None


def test_a_damaged_file_is_an_error_and_never_other_tensors(tmp_path: Path) -> None:
    """Cut anywhere, or with JSON under its key that is none."""
    whole = tensor_file(tmp_path / "file", {"mine": "[]"}).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(SafetensorError):
            read_tensors(tmp_path / "cut", "mine")
    with pytest.raises(ValueError, match="Expecting"):
        read_tensors(tensor_file(tmp_path / "odd", {"mine": "[1,"}), "mine")


def test_of_two_writers_of_a_new_file_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    write_new(path, b"first")
    with pytest.raises(FileExistsError):
        write_new(str(path), b"second")
    assert path.read_bytes() == b"first"


def test_a_new_file_is_not_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_new(tmp_path / "file", b"all")
    assert list(tmp_path.iterdir()) == []
