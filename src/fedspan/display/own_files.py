"""Output files that may be replaced only where an earlier call of the same command wrote them."""

from __future__ import annotations

from pathlib import Path

from fedspan.support.errors import FedspanError
from fedspan.support.files import write_bytes


def write_own(path: Path, content: bytes, marker: bytes) -> Path:
    """Write a file, in place of one that was written the same way, and return its path.

    Parameters
    ----------
    marker
        Bytes that every file of this kind holds, and by which an earlier one is known.

    Raises
    ------
    FedspanError
        When there is something else at the path, or it cannot be written.
    """
    assert marker in content, "a file without its mark could not be replaced again"
    try:
        if path.exists() and (not path.is_file() or marker not in path.read_bytes()):
            raise FedspanError(f"{path} exists and was not made by fedspan: expected a new file, or one to replace")
        write_bytes(path, content)
    except OSError as error:
        raise FedspanError(f"{path} cannot be written: {error.strerror or error}") from None
    return path
