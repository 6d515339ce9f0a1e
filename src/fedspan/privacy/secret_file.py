"""The secret that noise and clients' coins are drawn from: 256 random bits in a file that only its owner can read."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

from fedspan.support.errors import FedspanError
from fedspan.support.files import flush, make_folder

SECRET_BITS = 256
_DIGITS = SECRET_BITS // 4
FOLDER = "privacy"
"""Subfolder of a run's or a site's folder, for its owner alone."""


def secret_of(folder: Path) -> Callable[[], int]:
    """Return a function that returns the secret of a run's or a site's folder, drawn at its first call."""
    return kept_secret(folder / FOLDER / "secret")


def kept_secret(path: Path) -> Callable[[], int]:
    """Return a function that returns the secret in that file.

    At the first call the secret is drawn from the operating system and written. The file belongs to the party that
    adds the noise: it is readable by its owner alone.
    """

    def secret() -> int:
        if not path.exists():
            _write(path, secrets.randbits(SECRET_BITS))
        # Read back even when just drawn: where two processes raced, both take the one that was linked first.
        content = path.read_bytes().strip()
        # All of it: the beginning of a secret is a number too, and one that can be guessed.
        if re.fullmatch(rb"[0-9a-f]{%d}" % _DIGITS, content) is None:
            raise FedspanError(f"{path} is damaged: expected {_DIGITS} hexadecimal digits")
        return int(content, 16)

    return secret


def _write(path: Path, value: int) -> None:
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    # The mode is given at creation, so that there is no moment at which others can read the file.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(f"{value:0{_DIGITS}x}\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # whole or not at all, and never over another one
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)  # before any noise of it is seen: a secret that is lost in a power cut would be drawn anew
