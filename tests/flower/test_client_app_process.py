"""The ClientApp process against a SuperNode's own runtime API: every message is answered, and no failure ends it."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from supernodes import SuperNode, free_port, supernode

from fedspan.flower import node as node_command
from fedspan.flower import records
from fedspan.flower.client_app import refusal
from fedspan.flower.client_app_process import TaskLoop
from fedspan.flower.runtime import Runtime, SuperNodeLost
from fedspan.wire.refusals import Code, unpacked

HERE = Path(__file__).parent
START = """
import sys
from fedspan.flower.client_app_process import main
site, *rest = sys.argv[1:]
main(["--site", site, *rest], command=[sys.executable, {stand_in!r}, site, "--lifeline"])
"""


@contextmanager
def client_app_process(site: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    site.mkdir(exist_ok=True)
    script = START.format(stand_in=str(HERE / "stand_in.py"))
    command = [sys.executable, "-c", script, str(site), "--runtime-api-address", f"127.0.0.1:{port}", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def ask(made: SuperNode, content: bytes, lifetime: float = 60.0, late: float = 0.0) -> tuple[bytes | None, str | None]:
    """The answer, or the error."""
    ticket = made.put(records.pack(content, lifetime), records.MESSAGE_TYPE, ttl=60.0, late=late)
    reply = made.reply()
    assert reply.metadata.reply_to_message_id == ticket
    if reply.has_error():
        return None, reply.error.reason
    return records.unpack(reply)[0], None


def failure(outcome: tuple[bytes | None, str | None]) -> str:
    """The code of a failure, which is all that is said of it beside the incident's number."""
    answer, error = outcome
    assert answer is None
    assert error is not None
    assert unpacked(error) is not None, error
    return error.split()[0]


def worker(made: SuperNode) -> int:
    """The process that answers."""
    answer, error = ask(made, b"who")
    assert error is None
    assert answer is not None
    return int(answer.split()[0])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_every_message_is_answered_and_no_failure_ends_the_loop(tmp_path: Path) -> None:
    """A refusal, a worker that exits and one that hangs each cost their own answer and nothing else."""
    with supernode() as made, client_app_process(tmp_path / "clinic", made.port) as process:
        first = worker(made)
        assert ask(made, b"x" * 6_000_000)[0] == f"{first} ".encode() + b"x" * 6_000_000
        assert ask(made, b"late", late=0.5)[0] == f"{first} late".encode()
        assert failure(ask(made, b"raise")) == "worker-gone"
        made.put(records.pack(b"?"), "train")
        assert failure((None, made.reply().error.reason)) == "unreadable"

        assert failure(ask(made, b"exit")) == "worker-gone"
        second = worker(made)
        assert second != first

        began = time.monotonic()
        assert failure(ask(made, b"hang", lifetime=1.0)) == "worker-late"
        assert time.monotonic() - began < 5
        assert gone(second), "the hung worker is still there"
        third = worker(made)
        assert third != second
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 0
        assert gone(third)


def test_a_worker_does_not_outlive_a_client_app_process_that_was_killed(tmp_path: Path) -> None:
    with supernode() as made, client_app_process(tmp_path / "clinic", made.port) as process:
        pid = worker(made)
        process.send_signal(signal.SIGKILL)
        assert gone(pid)


def test_a_worker_that_died_between_messages_is_replaced(tmp_path: Path) -> None:
    with supernode() as made, client_app_process(tmp_path / "clinic", made.port):
        pid = worker(made)
        os.kill(pid, signal.SIGKILL)
        assert worker(made) != pid


def test_a_worker_that_cannot_start_is_said_and_comes_back_when_it_can(tmp_path: Path) -> None:
    site = tmp_path / "clinic"
    site.mkdir()
    (site / "broken").touch()
    with supernode() as made, client_app_process(site, made.port):
        assert failure(ask(made, b"?")) == "worker-gone"
        (site / "broken").unlink()
        end = time.monotonic() + 15
        while ask(made, b"?")[0] is None:
            assert time.monotonic() < end
            time.sleep(0.2)


def test_it_waits_for_its_supernode_and_outlives_it(tmp_path: Path) -> None:
    port = free_port()
    with client_app_process(tmp_path / "clinic", port) as process:
        with supernode(port) as made:
            pid = worker(made)
        time.sleep(0.3)
        with supernode(port) as made:
            assert worker(made) == pid
        assert process.poll() is None


def test_whoever_does_not_share_the_secret_gets_no_task() -> None:
    with supernode(secret=b"s" * 32) as made:
        made.put(records.pack(b"who", 60.0), records.MESSAGE_TYPE)
        for secret in (None, b"t" * 32):
            stranger = Runtime(f"127.0.0.1:{made.port}", secret=secret)
            with closing(stranger), pytest.raises(SuperNodeLost, match="401"):
                stranger.acquire()
        with closing(Runtime(f"127.0.0.1:{made.port}", secret=b"s" * 32)) as friend:
            assert friend.acquire()
            assert records.unpack(friend.pull()[0]) == (b"who", 60.0)


def test_a_task_in_hand_is_kept_alive_and_one_that_is_done_is_not() -> None:
    """A SuperNode gives up a task that shows no sign of life for half a minute."""
    with supernode() as made, closing(Runtime(f"127.0.0.1:{made.port}")) as runtime:
        made.put(records.pack(b"?", 60.0), records.MESSAGE_TYPE)
        assert runtime.acquire()
        message, context = runtime.pull()
        (held,) = made.state.task_token_store.values()
        held.active_until = until = held.active_until - timedelta(seconds=20)
        runtime.heartbeat()
        assert held.active_until - until > timedelta(seconds=15)
        runtime.push(refusal(message, Code.FAILED, "no"), context)
        sent: list[object] = []
        runtime._client.SendTaskHeartbeat = sent.append
        runtime.heartbeat()
        assert not sent


class Away:
    """A runtime whose SuperNode is away for a while."""

    def __init__(self, looks: int) -> None:
        self.looks, self.loop = looks, None

    def acquire(self) -> bool:
        self.looks -= 1
        if self.looks:
            raise SuperNodeLost("connection refused")
        self.loop.stop()
        return False


class Idle:
    """A supervisor without a worker."""

    def ensure(self) -> bool:
        return True


def test_a_supernode_that_is_away_for_long_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedspan.flower.client_app_process._RETRY", 0.01)
    runtime: Any = Away(4)
    supervisor: Any = Idle()
    runtime.loop = TaskLoop(runtime, ClientApp())
    runtime.loop.run(supervisor)
    assert [r.message for r in caplog.records if "waiting for it" in r.message] == [
        "the SuperNode cannot be reached, waiting for it: connection refused"
    ]


def test_an_answer_that_cannot_be_pushed_is_refused_instead() -> None:
    """Whatever an app makes of a message, the server hears of it."""
    app = ClientApp()

    @app.query("fedspan")
    def answer(message: Message, context: Context) -> Message:
        return RecordDict()

    with supernode() as made, closing(Runtime(f"127.0.0.1:{made.port}")) as runtime:
        made.put(records.pack(b"?", 60.0), records.MESSAGE_TYPE)
        assert runtime.acquire()
        TaskLoop(runtime, app).handle()
        assert failure((None, made.reply().error.reason)) == "not-passed-on"
        assert not runtime.acquire()


def test_a_site_without_a_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fedspan.flower.client_app_process",
        "--runtime-api-address",
        "127.0.0.1:1",
        "--site",
        "none",
    ]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.strip() == "error: --site none: expected a site's folder"


def test_the_client_app_and_its_process_import_no_torch() -> None:
    script = (
        "import sys, fedspan.flower.client_app_process, fedspan.flower.client_app; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_nodes_poll_is_ours_and_the_rest_is_flowers() -> None:
    assert node_command.split_arguments(["--insecure", "--poll", "0.3", "--port", "1"]) == (
        0.3,
        ["--insecure", "--port", "1"],
    )
    assert node_command.split_arguments(["--poll=0.4"]) == (0.4, [])
    assert node_command.split_arguments([]) == (node_command.POLL, [])
    with pytest.raises(ValueError, match="--poll 'x'"):
        node_command.split_arguments(["--poll", "x"])


def test_sleeps_are_shortened_and_never_lengthened(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("fedspan.flower.node.time.sleep", slept.append)
    sleeps = node_command.ShortSleeps(0.2)
    for asked in (3, 0.5, 0.001, 3):
        sleeps.sleep(asked)
    assert slept == [0.15, 0.02, 0.001, 0.15]
    assert sleeps.monotonic is time.monotonic


def test_a_main_loop_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import start_client_internal as loop

    with monkeypatch.context() as patch:
        patch.setitem(vars(loop), "time", time)
        node_command.shorten_sleeps(0.2)
        assert isinstance(vars(loop)["time"], node_command.ShortSleeps)
        with pytest.raises(ValueError, match="no sleeps to shorten"):
            node_command.shorten_sleeps(0.2)  # what is there now is not the module any more
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda x: source(x).replace("time.sleep(3)", "wait(3)"))
    with pytest.raises(ValueError, match="no sleeps to shorten"):
        node_command.shorten_sleeps(0.2)
