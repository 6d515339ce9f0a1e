"""One request and one reply, in bytes, between two processes of a machine over a Unix socket.

Both ends are one account's, which each end sees for itself: the site's folder and the socket in it are this account's
and nobody else's to write, and the kernel names the account at the other end of a connection. Torch is not imported
here, so that a process that only forwards messages stays small.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
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
_BY_DESCRIPTOR = Path("/proc/self/fd")
"""Folder in which an open folder has a short name, on Linux."""
_PEER = struct.Struct("3i")
"""Process, user and group id, as the kernel gives them."""
_OTHERS, _OTHERS_WRITE = 0o077, 0o022
"""Permissions of the group and of everybody."""


class CallFailed(FedspanError):
    """A call without a reply; the message says why in one line."""


class CallTimedOut(CallFailed):
    """A call without a reply in time; the worker may still be busy with it."""


def socket_path(folder: Path) -> Path:
    """Return the path of the socket on which the worker of a site's folder listens, in that folder."""
    return folder.resolve() / "worker.sock"


@contextmanager
def _address(path: Path) -> Iterator[str]:
    """Give a name for a socket that is short enough for the system, while the context lasts.

    Never one in a folder that all users share, where another account could be there first.
    """
    if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        yield os.fspath(path)
        return
    if not _BY_DESCRIPTOR.exists():
        raise FedspanError(f"{path}: expected a path of at most {_MAX_PATH_BYTES} bytes, for a socket of this system")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield os.fspath(_BY_DESCRIPTOR / str(folder) / path.name)
    finally:
        os.close(folder)


def _check_own(path: Path, mask: int) -> None:
    """Check that a folder or a socket is this account's, and that nobody else has the permissions of `mask`."""
    status = path.lstat()
    if status.st_uid not in _allowed_users() or status.st_mode & mask:
        raise FedspanError(
            f"{path} belongs to user id {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}: expected "
            f"user id {os.geteuid()} and none of the permissions {mask:o}"
        )


def _check_peer(channel: socket.socket) -> None:
    """Check that the process at the other end is this account's; a system that cannot say leaves it at the files."""
    if not hasattr(socket, "SO_PEERCRED"):
        return
    _, user, _ = _PEER.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user not in _allowed_users():
        raise FedspanError(f"a process of user id {user} is at the other end: expected user id {os.geteuid()}")


def _allowed_users() -> set[int]:
    return {os.geteuid(), 0}  # root may do everything anyway


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
            _connect(channel, socket_path(folder))
            channel.sendall(_REQUEST_HEAD.pack(len(content)))
            if content:  # the reply to an empty request may come, and end the connection, before a second write
                channel.sendall(content)
            failed, length = _REPLY_HEAD.unpack(_receive_exactly(channel, _REPLY_HEAD.size))
            reply = _receive_exactly(channel, length)
    except TimeoutError:
        raise CallTimedOut(f"the worker of {folder.name} did not answer within {timeout:.3g} s") from None
    except (OSError, EOFError) as error:
        raise CallFailed(f"the worker of {folder.name} cannot be reached ({error})") from None
    except FedspanError as error:
        raise CallFailed(f"the worker of {folder.name} is not used: {error}") from None
    if failed:
        raise CallFailed(reply.decode(errors="replace"))
    return reply


def _connect(channel: socket.socket, path: Path) -> None:
    _check_own(path.parent, _OTHERS_WRITE)
    _check_own(path, _OTHERS)
    with _address(path) as address:
        channel.connect(address)
    _check_peer(channel)


class Listener:
    """Answers the calls to one folder's worker, one at a time, in the thread that calls `serve`."""

    def __init__(self, folder: Path) -> None:
        self.path = socket_path(folder)
        _check_own(self.path.parent, _OTHERS_WRITE)
        self.path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not a chmod after the bind, which would leave a moment in which others could connect.
        before = os.umask(0o177)
        try:
            with _address(self.path) as address:
                self._socket.bind(address)
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
            with closing(channel), suppress(OSError, EOFError, FedspanError):
                _check_peer(channel)
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
