"""Files of data as streams of bytes and of text: regular files only, gzip-compressed or not, in a known encoding."""

from __future__ import annotations

import codecs
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedspan.support.errors import FedspanError, one_line

UTF8 = "utf-8"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_PART = 1 << 16


def check_regular(path: Path, name: str | None = None) -> None:
    """Refuse what would block or never end when it is read, such as a named pipe.

    Parameters
    ----------
    name
        The file's name in messages; None: its path.

    Raises
    ------
    FedspanError
        When it is no regular file, or there is none.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # a name may hold a null character
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FedspanError(f"cannot read {name or path}: {reason}") from None
    if not stat.S_ISREG(mode):
        raise FedspanError(f"{name or path} is a {_form(mode)}: expected a regular file")


def _form(mode: int) -> str:
    forms = (
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "pipe"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
    )
    return next((form for matches, form in forms if matches(mode)), "special file")


def check_encoding(encoding: str) -> None:
    """Refuse the name of an encoding that Python does not know, or that is not one of text.

    Raises
    ------
    FedspanError
        Naming the setting.
    """
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise FedspanError(
            f"data.encoding = {encoding!r}: expected the name of a text encoding, such as utf-8, cp1252 or utf-16-le"
        ) from None


def size_of(path: Path) -> str:
    """Return a file's size in MB or kB."""
    num_bytes = path.stat().st_size
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


@contextmanager
def bytes_of(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed where its name ends in ``.gz``; errors of reading it inside the block are one line.

    Raises
    ------
    FedspanError
        If it is missing, no regular file, or not a complete gzip file.
    """
    check_regular(path)
    try:
        with path.open("rb") as raw:
            if not path.name.lower().endswith(".gz"):
                yield raw
                return
            try:
                with gzip.open(raw) as stream:
                    yield io.BufferedReader(stream)
            except (OSError, EOFError, zlib.error) as error:
                raise FedspanError(f"{path} is not a complete gzip file: {error}") from None
    except OSError as error:
        raise FedspanError(f"cannot read {path}: {error.strerror or error}") from None


@contextmanager
def text_of(path: Path, encoding: str, newline: str) -> Iterator[IO[str]]:
    r"""Open a file as text, without the mark of its encoding at the beginning.

    A mark (byte order mark), as Excel and PowerShell write it, says what the encoding is, whatever `encoding` says.

    Parameters
    ----------
    encoding
        That of a file without a mark.
    newline
        The end of a line, which is kept: ``""`` for any of ``\n``, ``\r`` and ``\r\n``.

    Raises
    ------
    FedspanError
        Naming the first byte that is invalid; and as `bytes_of`.
    """
    with bytes_of(path) as stream:
        known, skipped = _marked(stream, path, encoding)
        stream.seek(skipped)
        text = io.TextIOWrapper(stream, known, newline=newline)
        try:
            yield text
        except UnicodeError as error:
            place = _invalid_byte(path, known, skipped)
            said = one_line(error) if place is None else f"byte {place} is invalid"
            hint = "; if it is in another encoding, such as Excel's cp1252, set data.encoding"
            raise FedspanError(f"{path} is not {known.upper()} text: {said}{hint}") from None
        finally:
            text.detach()


def _marked(stream: IO[bytes], path: Path, encoding: str) -> tuple[str, int]:
    """Return the encoding of a stream, and the length of the mark that says so."""
    head = stream.read(4)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, len(mark)
    if encoding == UTF8 and len(head) == 4 and 0 in head:
        order = "le" if head[1] == 0 else "be"
        raise FedspanError(
            f'{path} looks like UTF-16 without a byte order mark: set data.encoding = "utf-16-{order}", or save it as '
            "UTF-8"
        )
    return encoding, 0


def _invalid_byte(path: Path, encoding: str, skipped: int) -> int | None:
    """Return the place of the first byte in a file that is no part of a character."""
    decoder = codecs.getincrementaldecoder(encoding)()
    with bytes_of(path) as stream:
        stream.seek(skipped)
        fed = skipped
        while True:
            part = stream.read(_PART)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(part, not part)
            except UnicodeDecodeError as error:
                return fed - pending + error.start
            except UnicodeError:
                return None
            if not part:
                return None
            fed += len(part)
