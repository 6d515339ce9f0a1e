"""A worker's socket in the hands of other accounts."""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedspan.wire.unix_socket import CallFailed, Listener, call, socket_path

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another account")
pytestmark = needs_root


@contextmanager
def another_account(act: Callable[[], None], first: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Run `first` as this account and `act` as another one, in a process of its own; its number."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            first()
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writing, b"x")
            act()
        finally:
            os._exit(0)  # with its descriptors, the test's own pipe among them
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def impostor(listening: socket.socket, heard: Path) -> None:
    """Answer as a worker does."""
    while True:
        channel, _ = listening.accept()
        with heard.open("ab") as file:
            file.write(channel.recv(4096))
        channel.sendall(struct.pack(">BQ", 0, 6) + b"forged")


def test_a_squatter_in_the_folder_for_temporary_files_is_never_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket in a folder that all accounts share, where a long path used to lead, is another account's."""
    shared = Path(tempfile.mkdtemp(prefix="shared-", dir="/tmp"))
    shared.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    name = hashlib.sha256(os.fsencode(folder.resolve() / "worker.sock")).hexdigest()[:24]
    taken, heard = shared / f"fedspan-{os.getuid()}" / f"{name}.sock", shared / "heard"

    def squat() -> None:
        taken.parent.mkdir()
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(taken))
        listening.listen()
        impostor(listening, heard)

    with another_account(squat):
        while not taken.exists():
            pass
        with pytest.raises(CallFailed, match="cannot be reached"):
            call(folder, b"a secret", 5)
        assert not heard.exists()
        listener = Listener(folder)
        assert listener.path.parent == folder.resolve()
        listener.close()


def test_a_worker_of_another_account_is_not_called(tmp_path: Path) -> None:
    """Everything about the files is right, but the process that listens is another account's."""
    tmp_path.chmod(0o700)
    heard = Path("/dev/null")
    listening = socket.socket(socket.AF_UNIX)

    def prepare() -> None:
        listening.bind(str(socket_path(tmp_path)))
        socket_path(tmp_path).chmod(0o600)

    def squat() -> None:
        listening.listen()
        impostor(listening, heard)

    def call_when_it_listens() -> bytes:
        while True:
            try:
                return call(tmp_path, b"a secret", 5)
            except CallFailed as error:
                if "refused" not in str(error):  # it listens
                    raise

    refusal = f"a process of user id {NOBODY} is at the other end"
    with another_account(squat, prepare), pytest.raises(CallFailed, match=refusal):
        call_when_it_listens()


@pytest.mark.parametrize("part", ["folder", "socket"])
@pytest.mark.parametrize("fault", ["owner", "mode"])
def test_files_that_others_can_change_are_not_used(tmp_path: Path, part: str, fault: str) -> None:
    listener = Listener(tmp_path)
    thread = threading.Thread(target=listener.serve, args=(bytes.upper,))
    thread.start()
    try:
        assert call(tmp_path, b"abc", 5) == b"ABC"
        path = tmp_path if part == "folder" else socket_path(tmp_path)
        if fault == "owner":
            os.chown(path, NOBODY, NOBODY)
        else:
            path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o022)
        with pytest.raises(CallFailed, match=f"is not used: .*{path.name} belongs to user id"):
            call(tmp_path, b"abc", 5)
        if part == "folder":
            with pytest.raises(ValueError, match="belongs to user id"):
                Listener(tmp_path)
    finally:
        listener.close()
        thread.join(10)


def test_a_caller_of_another_account_is_not_answered(tmp_path: Path) -> None:
    """Even where somebody has opened the files to it."""
    tmp_path.chmod(0o711)
    asked: list[bytes] = []
    listener = Listener(tmp_path)
    socket_path(tmp_path).chmod(0o666)
    thread = threading.Thread(target=listener.serve, args=(lambda content: asked.append(content) or b"done",))
    thread.start()
    result, told = os.pipe()

    def ask() -> None:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect("worker.sock")  # the folders above it are closed to this account
        try:
            channel.sendall(struct.pack(">Q", 1) + b"x")  # it may have been hung up on already
            os.write(told, b"<" + channel.recv(100))
        except OSError:
            os.write(told, b"<")

    try:
        with another_account(ask, lambda: os.chdir(tmp_path)):
            assert select.select([result], [], [], 10)[0]
            assert os.read(result, 100) == b"<"
        assert asked == []
    finally:
        listener.close()
        thread.join(10)
