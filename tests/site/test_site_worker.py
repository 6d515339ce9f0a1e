"""A site's long-lived process, asked over its socket."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import tiny

from fedspan.config import to_toml
from fedspan.wire import protocol
from fedspan.wire.unix_socket import CallFailed, CallTimedOut, Listener, call, socket_path


@pytest.fixture
def folder(bases: dict[str, Path], texts: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(to_toml(tiny.config(bases["bert"], texts, "flexlora")))
    (tmp_path / "site.toml").write_text('client_id = "client-1"\n')
    return tmp_path


@contextmanager
def worker(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedspan.site.worker", str(folder), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while not socket_path(folder).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.communicate()


def hello(folder: Path) -> dict[str, object]:
    return protocol.decode(call(folder, protocol.encode({"kind": "hello"}, protocol.MessageTensors()), 120))[0]


@pytest.mark.slow
def test_it_answers_and_goes_on_answering_after_odd_messages(folder: Path) -> None:
    with worker(folder) as process:
        greeting = hello(folder)
        assert (greeting["client_id"], greeting["rank"]) == ("client-1", 4)
        assert protocol.decode(call(folder, b"rubbish", 10))[0]["code"] == "unreadable"
        with closing(socket.socket(socket.AF_UNIX)) as rude:  # announces more than it sends
            rude.connect(str(socket_path(folder)))
            rude.sendall((10**9).to_bytes(8, "big") + b"x")
        assert hello(folder) == greeting
        mode = stat.S_IMODE(socket_path(folder).stat().st_mode)
        assert mode & 0o077 == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not socket_path(folder).exists()
    with pytest.raises(CallFailed, match="cannot be reached"):
        call(folder, b"", 1)


@pytest.mark.slow
def test_it_ends_when_its_stdin_closes(folder: Path) -> None:
    with worker(folder, "--lifeline") as process:
        hello(folder)
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ('client_id = "client-9"', "client_id = 'client-9': expected one of client-0"),
        ("", "client_id = None, expected the name"),
        ('client_id = "client-0"\ncolour = 1', "unknown key 'colour'"),
        ('client_id = "client-0"\nrank = 0', "rank = 0, expected a positive integer"),
        ("client_id = ", "not valid TOML"),
        ('client_id = "../client-0"', "client_id = '../client-0': expected at most 64 of the letters"),
        ('client_id = "client-0"\nidentity = "identity.key"', "identity = 'identity.key'"),
    ],
)
def test_a_mistake_in_its_folder_is_reported_to_every_caller(folder: Path, site: str, expected: str) -> None:
    """As a code; what it is stands on the worker's own output alone, with the number of the incident."""
    (folder / "site.toml").write_text(site)
    with worker(folder) as process:
        told = hello(folder)
        assert told.keys() == {"client_id", "code", "incident"}
        assert (told["client_id"], told["code"]) == (None, "not-ready")
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=20)[0].decode()
    assert expected in output
    assert f"incident {told['incident']} (not-ready): " in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_site_with_data_of_its_own(folder: Path, texts: Path) -> None:
    """All of the data is its own, and its rank is that of its settings: the federation names no such client."""
    (folder / "site.toml").write_text(f'client_id = "mayo"\nrank = 3\n[data]\ntrain = ["{texts}"]\n')
    with worker(folder):
        greeting = hello(folder)
    assert (greeting["client_id"], greeting["rank"], greeting["num_examples"]) == ("mayo", 3, 38)


def test_a_slow_answer_is_not_waited_for_longer_than_said(tmp_path: Path) -> None:
    listener = Listener(tmp_path)

    def slowly(content: bytes) -> bytes:
        time.sleep(1.0)
        return content

    thread = threading.Thread(target=listener.serve, args=(slowly,))
    thread.start()
    began = time.monotonic()
    with pytest.raises(CallTimedOut, match=r"did not answer within 0.2 s"):
        call(tmp_path, b"x", 0.2)
    assert time.monotonic() - began < 0.9
    assert call(tmp_path, b"y" * 3_000_000, 20) == b"y" * 3_000_000
    listener.close()
    thread.join(10)


def test_a_folder_with_a_long_name_has_a_socket_too(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    listener = Listener(folder)
    thread = threading.Thread(target=listener.serve, args=(bytes.upper,))
    thread.start()
    # Longer than a socket's name may be, and yet in the site's own folder.
    assert len(os.fsencode(socket_path(folder))) > 108
    assert stat.S_ISSOCK((folder.resolve() / "worker.sock").stat().st_mode)
    assert call(folder, b"abc", 10) == b"ABC"
    listener.close()
    thread.join(10)
