"""One request and one reply, in bytes, between two processes of a machine over a Unix socket.

File permissions decide who may call: only its owner can open the socket. Torch is not imported here, so that a
process that only forwards messages stays small.
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

from fedspan.support.errors import FedspanError, one_line

_REQUEST_HEAD = struct.Struct(">Q")
"""Length of the request."""
_REPLY_HEAD = struct.Struct(">BQ")
"""0 or `_FAILED`, and the length of the reply or of the line that says why there is none."""
_FAILED = 1
MAX_MESSAGE_BYTES = 2**36
"""Length above which an announced message is taken for a mistake."""
_MAX_PATH_BYTES = 100
"""Length of a socket's path that every system accepts."""


class CallFailed(FedspanError):
    """A call without a reply; the message says why in one line."""


class CallTimedOut(CallFailed):
    """A call without a reply in time; the worker may still be busy with it."""


def socket_path(folder: Path) -> Path:
    """Return the path of the socket on which the worker of a site's folder listens.

    It is in the folder or, where that path is too long for a socket, in a folder of the user's own under the system's
    temporary folder.
    """
    path = folder.resolve() / "worker.sock"
    if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"fedspan-{os.getuid()}" / f"{name}.sock"


def call(folder: Path, content: bytes, timeout: float) -> bytes:
    """Send a request to the worker of a site's folder and return its reply.

    Raises
    ------
    CallFailed
        When there is no worker, it ended, or it replied that it failed; `CallTimedOut` after `timeout` seconds.
    """
    try:
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as channel:
            channel.settimeout(timeout)
            channel.connect(os.fspath(socket_path(folder)))
            channel.sendall(_REQUEST_HEAD.pack(len(content)))
            if content:  # the reply to an empty request may come, and end the connection, before a second write
                channel.sendall(content)
            failed, length = _REPLY_HEAD.unpack(_receive_exactly(channel, _REPLY_HEAD.size))
            reply = _receive_exactly(channel, length)
    except TimeoutError:
        raise CallTimedOut(f"the worker of {folder.name} did not answer within {timeout:.3g} s") from None
    except (OSError, EOFError) as error:
        raise CallFailed(f"the worker of {folder.name} cannot be reached ({error})") from None
    if failed:
        raise CallFailed(reply.decode(errors="replace"))
    return reply


class Listener:
    """Answers the calls to one folder's worker, one at a time, in the thread that calls `serve`."""

    def __init__(self, folder: Path) -> None:
        self.path = socket_path(folder)
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        if self.path.parent != folder.resolve():
            # In a temporary folder that all users share, another user may have made this folder first.
            status = self.path.parent.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise FedspanError(f"{self.path.parent} is open to other users: expected a folder of the user's own")
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not a chmod after the bind, which would leave a moment in which others could connect.
        before = os.umask(0o177)
        try:
            self._socket.bind(os.fspath(self.path))
        finally:
            os.umask(before)
        self._socket.listen(16)
        self._ended = threading.Event()

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        """Answer calls until `close`; an exception of `answer` goes to its caller as one line, and ends nothing."""
        while not self._ended.is_set():
            try:
                channel, _ = self._socket.accept()
            except OSError:
                return
            # A caller that goes away in the middle must not end the service for the next one.
            with closing(channel), suppress(OSError, EOFError):
                (length,) = _REQUEST_HEAD.unpack(_receive_exactly(channel, _REQUEST_HEAD.size))
                request = _receive_exactly(channel, length)
                try:
                    failed, reply = 0, answer(request)
                except Exception as error:
                    failed, reply = _FAILED, one_line(error).encode()
                channel.sendall(_REPLY_HEAD.pack(failed, len(reply)))
                channel.sendall(reply)

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._ended.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.path.unlink(missing_ok=True)


def _receive_exactly(channel: socket.socket, length: int) -> bytes:
    if length > MAX_MESSAGE_BYTES:
        raise EOFError(f"a message of {length} bytes was announced")
    parts: list[bytes] = []
    while length:
        part = channel.recv(min(length, 1 << 20))
        if not part:
            raise EOFError("the connection ended in the middle of a message")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
