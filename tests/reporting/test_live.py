"""`fedspan watch`: one page for this machine alone, its changes as a stream, and a clean end."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from interrupts import interruptible_children

from fedspan import reporting
from fedspan.cli.main import main
from fedspan.reporting.live import Live
from fedspan.support.errors import FedspanError

pytest.importorskip("matplotlib")


@pytest.fixture
def live(suite: Path, tmp_path: Path) -> Iterator[Live]:
    folder = tmp_path / "run"
    shutil.copytree(suite / "runs" / "all clients" / "glora" / "seed-0", folder)
    served = reporting.serve([folder], lambda folder: [])
    thread = threading.Thread(target=served.run)
    thread.start()
    yield served
    served.stop()
    thread.join(10)
    assert not thread.is_alive()


def ask(live: Live, path: str, host: str | None = None, method: str = "GET") -> http.client.HTTPResponse:
    port = live.server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    return connection.getresponse()


def test_the_page_is_served_with_the_whole_address_only(live: Live) -> None:
    answer = ask(live, f"/{live.token}/")
    assert answer.status == 200
    assert b"data-live" in answer.read()
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in answer.headers
    for path in ("/", "/events", f"/{live.token}", f"/{live.token}x/", "/../../etc/passwd", "//"):
        assert ask(live, path).status == 404
    assert ask(live, f"/{live.token}/", method="POST").status == 501


def test_other_hosts_are_refused(live: Live) -> None:
    """A name of another site that was resolved anew to this machine."""
    port = live.server.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"0.0.0.0:{port}"):
        answer = ask(live, f"/{live.token}/", host)
        assert answer.status == 421
        assert live.token.encode() not in answer.read()
    assert ask(live, f"/{live.token}/", f"localhost:{port}").status == 200
    assert live.server.server_address[0] == "127.0.0.1"


def test_a_change_is_an_event(live: Live) -> None:
    stream = ask(live, f"/{live.token}/events")
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    event = [b"event: change\n", b"data: 1\n", b"\n"]
    assert [stream.readline() for _ in event] == event
    os.utime(live.folders[0] / "metrics.jsonl", (1, 1))
    assert [stream.readline() for _ in event] == event


def test_a_folder_that_goes_away_is_said(live: Live) -> None:
    shutil.rmtree(live.folders[0])
    answer = ask(live, f"/{live.token}/")
    assert answer.status == 503
    assert b"does not exist" in answer.read()


def test_bad_ports_and_folders_are_refused_in_one_line(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = suite / "runs" / "all clients" / "glora" / "seed-0"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FedspanError, match=f"--port {port} of 127.0.0.1 cannot be served"):
            reporting.serve([folder], lambda folder: [], port)
    for text in ("-1", "70000", "x", "", "８０"):
        assert main(["watch", str(folder), f"--port={text}"]) == 2
        assert "expected a number from 0 to 65535" in capsys.readouterr().err
    assert main(["watch", str(tmp_path)]) == 2
    assert "holds no config.toml" in capsys.readouterr().err


def test_ctrl_c_is_the_usual_end(suite: Path) -> None:
    folder = suite / "runs" / "all clients" / "glora" / "seed-0"
    command = [sys.executable, "-m", "fedspan", "watch", str(folder)]
    with (
        interruptible_children(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()  # or the end of the block would wait for it for ever
        assert process.stderr.read() == ""
