"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from fedspan.support.files import write_bytes


def test_bytes_are_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"", b"three"):
        write_bytes(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]
