"""Other accounts of the server's and of a site's machine, which reach every port on its loopback."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedspan.config import load
from fedspan.flower import local_peers, node_keys, trial
from fedspan.flower.deployment import Deployment
from fedspan.flower.process_tree import ProcessTree
from fedspan.flower.runtime import Runtime, SuperNodeLost

NOBODY = 65534
OTHER = Path(__file__).with_name("other_account.py")
SHOW = """
import json, os, sys
place = sys.argv[sys.argv.index("--token-file") + 1]
assert os.path.isfile(place)
shown = {{"command": open("/proc/self/cmdline").read().split("\\0")[1:-1], "token": open(place).read()}}
json.dump(shown, open("{folder}/new", "w"))
os.rename("{folder}/new", "{folder}/shown")
"""
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another account")


@dataclass(frozen=True)
class Machine:
    folder: Path
    plan: Deployment
    tree: ProcessTree
    runtime: int
    """Port of the runtime API of the site `north`."""

    def calls(self, user: int, port: int, tls: bool = True, *more: str) -> dict[str, int]:
        ca = str(self.folder / "server/ca.crt") if tls else "-"
        command = [sys.executable, str(OTHER), str(user), "127.0.0.1", str(port), ca, *more]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout) if result.stdout else {}

    def names(self) -> list[str]:
        client = node_keys.connect(f"localhost:{self.plan.superlink_port}", self.folder / "server/ca.crt")
        try:
            return sorted(node.name for node in node_keys.nodes(client))
        finally:
            client.close()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("accounts") / "fed"
    plan = trial.prepare(folder, ["north"], load(overrides=["federation.num_clients=1"]))
    with ProcessTree(folder / "logs") as tree:
        trial.start(tree, folder, plan, "python", lambda line: None, sites=False)
        tree.start("north", ["./start.sh"], folder.resolve() / "sites/north", trial.script_environment())
        runtime = plan.sites[0].runtime_port
        tree.wait("north", lambda: bool(local_peers.listening_users(runtime)), trial.READY)
        yield Machine(folder, plan, tree, runtime)


@pytest.mark.slow
@needs_root
def test_another_account_reaches_neither_control_nor_runtime_api(machine: Machine) -> None:
    own, other = (machine.calls(user, machine.plan.superlink_port) for user in (0, NOBODY))
    for path in own:
        if path.startswith("/v1/fleet/pull-messages"):
            assert own[path] == other[path] == 401  # everybody may call it, and it wants a node's signature
        else:
            assert other[path] == 403, path
            assert own[path] != 403, path
    assert own["/v1/control/list-nodes"] == own["/v1/runtime/acquire-task"] == 200
    # What this account itself registered, so that the call is one that works.
    assert machine.names() == ["intruder", "north"]


@needs_root
def test_a_connection_that_is_closed_at_once_does_not_count_as_roots(machine: Machine) -> None:
    """The kernel gives the row of a closed connection to root; its request may only then be read."""
    before = machine.names()
    machine.calls(NOBODY, machine.plan.superlink_port, True, "--blind")
    time.sleep(1)
    assert machine.names() == before


@needs_root
def test_another_account_of_a_sites_machine_reaches_nothing(machine: Machine) -> None:
    own, other = (machine.calls(user, machine.runtime, False) for user in (0, NOBODY))
    assert set(other.values()) == {403}
    assert own["/health"] == 200
    assert own["/v1/runtime/acquire-task"] == 401  # it wants the site's secret too


@needs_root
def test_a_site_sends_nothing_to_another_account_that_took_its_supernodes_port() -> None:
    """Whoever made a task up would otherwise be given the answer."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setuid(NOBODY)
        taken = socket.create_server(("127.0.0.1", 0))
        os.write(writing, f"{taken.getsockname()[1]}\n".encode())
        while True:
            channel, _ = taken.accept()
            os.write(writing, channel.recv(4096))
    os.close(writing)
    try:
        with open(reading, "rb", buffering=0) as heard:
            port = int(heard.read(100))
            with closing(Runtime(f"127.0.0.1:{port}")) as runtime:
                with pytest.raises(SuperNodeLost, match=f"port {port} belongs to user id {NOBODY}"):
                    runtime.acquire()
                runtime.heartbeat()
            assert select.select([heard], [], [], 0.5)[0] == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_runs_token_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "flwr-serverapp"
    program.write_text(f"#!{sys.executable}\n" + SHOW.format(folder=str(tmp_path)))
    program.chmod(0o755)
    code = (
        "from fedspan.flower import server_app_starter as starter; starter.replace_popen()\n"
        "from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor as Executor\n"
        "from flwr.supercore.superexec.executor.types import ExecutionSpec as Spec\n"
        "from flwr.supercore.constant import TaskType\n"
        "Executor().launch(Spec(TaskType.SERVER_APP, 'localhost:1', 'a-token', True, None, False, None, True, 1, None))"
    )
    environment = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    end = time.monotonic() + 20
    while not (tmp_path / "shown").exists() and time.monotonic() < end:
        time.sleep(0.05)
    shown = json.loads((tmp_path / "shown").read_text())
    assert shown["token"] == "a-token"
    assert "a-token" not in " ".join(shown["command"])
    assert shown["command"][1:3] == ["--runtime-api-address", "localhost:1"]


def test_a_system_that_does_not_tell_accounts_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    local_peers.check_support()
    monkeypatch.setattr(local_peers, "TABLES", (Path("/nonexistent"),))
    with pytest.raises(ValueError, match="does not say which account opened a connection: expected Linux"):
        local_peers.check_support()
