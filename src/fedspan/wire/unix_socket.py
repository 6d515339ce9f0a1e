"""One question and one answer, in bytes, between two processes of a machine over a Unix socket.

Who may ask is a matter of file permissions: the socket is its owner's alone. Torch is not imported here, so that
whoever only forwards stays small.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from fedspan.support.errors import FedspanError

_LENGTH = struct.Struct(">Q")
_FAILED = 1
_HEAD = struct.Struct(">BQ")
MOST = 2**36
"""Bytes of a message that is believed to be one."""
_LONGEST = 100
"""Bytes of a socket's path that every system takes."""


class CallFailed(FedspanError):
    """There is no answer; the message says why in one line."""


class CallTimedOut(CallFailed):
    """There was no answer in time: whoever was asked may still be at work."""


def socket_path(folder: Path) -> Path:
    """Where the worker of that folder listens: in the folder, or, where that name is too long for a socket, in one of
    the user's own under the system's temporary folder."""
    path = folder.resolve() / "worker.sock"
    if len(os.fsencode(path)) <= _LONGEST:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"fedspan-{os.getuid()}" / f"{name}.sock"


def call(folder: Path, content: bytes, timeout: float) -> bytes:
    """Ask the worker of that folder.

    Raises
    ------
    CallFailed
        When there is none, it ended, or it answered that it could not; `CallTimedOut` when `timeout` seconds passed.
    """
    try:
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as channel:
            channel.settimeout(timeout)
            channel.connect(os.fspath(socket_path(folder)))
            channel.sendall(_LENGTH.pack(len(content)))
            if content:  # or an answer to nothing could come first, and end the connection
                channel.sendall(content)
            failed, length = _HEAD.unpack(_exactly(channel, _HEAD.size))
            answer = _exactly(channel, length)
    except TimeoutError:
        raise CallTimedOut(f"the worker of {folder.name} did not answer within {timeout:.3g} s") from None
    except (OSError, EOFError) as error:
        raise CallFailed(f"the worker of {folder.name} cannot be asked ({error})") from None
    if failed:
        raise CallFailed(answer.decode(errors="replace"))
    return answer


class Listener:
    """Answers calls about one folder, one at a time, in the thread that serves."""

    def __init__(self, folder: Path) -> None:
        self.path = socket_path(folder)
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        if self.path.parent != folder.resolve():
            held = self.path.parent.stat()
            if held.st_uid != os.getuid() or held.st_mode & 0o077:
                raise FedspanError(f"{self.path.parent} is open to others: expected a folder of the user's own")
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._socket.bind(os.fspath(self.path))
        finally:
            os.umask(before)
        self._socket.listen(16)
        self._ended = threading.Event()

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer until `close`; what `answer` raises is told to the caller in one line and ends nothing."""
        while not self._ended.is_set():
            try:
                channel, _ = self._socket.accept()
            except OSError:
                return
            # A caller that went away is no concern of the next one.
            with closing(channel), suppress(OSError, EOFError):
                (length,) = _LENGTH.unpack(_exactly(channel, _LENGTH.size))
                asked = _exactly(channel, length)
                try:
                    failed, reply = 0, answer(asked)
                except Exception as error:
                    line = " ".join(str(error).split()) or type(error).__name__
                    failed, reply = _FAILED, line.encode()
                channel.sendall(_HEAD.pack(failed, len(reply)))
                channel.sendall(reply)

    def close(self) -> None:
        """Listen no more."""
        self._ended.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.path.unlink(missing_ok=True)


def _exactly(channel: socket.socket, length: int) -> bytes:
    if length > MOST:
        raise EOFError(f"a message of {length} bytes was announced")
    parts: list[bytes] = []
    while length:
        part = channel.recv(min(length, 1 << 20))
        if not part:
            raise EOFError("it ended in the middle of a message")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
