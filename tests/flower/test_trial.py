"""A whole deployment on this machine, by its own scripts: it comes up, does its work, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedspan
from fedspan.config import load
from fedspan.flower import trial

COMMAND = [sys.executable, "-c", "from fedspan.cli.flower import app; app()", "up"]
SETTINGS = ["federation.rounds=2", "federation.participation=1.0", "local.steps=2", "data.max_test=20"]
SMALL = ["--sites", "2", *(word for setting in SETTINGS for word in ("--set", setting))]


def processes_in(folder: Path) -> list[int]:
    """The processes that work in a folder, as all of a deployment do."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            place = os.readlink(entry / "cwd")
        except OSError:
            continue
        if Path(place).is_relative_to(folder):
            found.append(int(entry.name))
    return found


def none_within(folder: Path, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while processes_in(folder):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
def test_a_whole_federation_gives_the_same_bits_as_one_process(tmp_path: Path) -> None:
    """TLS, node keys, the proxy and four kinds of processes are on the way, and change nothing."""
    folder, alone = tmp_path / "fed", tmp_path / "alone"
    done = subprocess.run([*COMMAND, str(folder), *SMALL], capture_output=True, text=True, cwd="/", timeout=240)
    assert done.returncode == 0, done.stderr
    assert none_within(folder, 5)
    for line in ("2 sites registered", "round 2: 2 sites", "untouched base", "federation (GLoRA)"):
        assert line in done.stdout
    settings = [*SETTINGS, "federation.num_clients=2", "evaluation.local=false", "engine.name=sequential"]
    fedspan.run(load(overrides=settings), alone)
    result = folder / "server/runs/trial-1"
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (result / name).read_bytes() == (alone / name).read_bytes(), name
    if trial.choose_proxy("auto") == "nginx":
        assert "/v1/fleet/push-messages" in (folder / "server/state/access.log").read_text()
    # What is on the disk is its owner's alone, the SuperLink's database with the messages too.
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder / "server/state").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "proxy", "when", "alive"),
    [
        (signal.SIGKILL, "auto", "registered and starting", 5),  # the SuperLink, its executor, the proxy, two sites
        (signal.SIGTERM, "python", "forwards the fleet API", 3),
    ],
)
def test_nothing_is_left_when_the_command_is_ended(
    tmp_path: Path, number: int, proxy: str, when: str, alive: int
) -> None:
    command = subprocess.Popen(
        [*COMMAND, str(tmp_path / "fed"), "--proxy", proxy, *SMALL], stdout=subprocess.PIPE, text=True, cwd="/"
    )
    try:
        assert command.stdout is not None
        for line in command.stdout:
            if when in line:
                break
        assert len(processes_in(tmp_path / "fed")) >= alive
        command.send_signal(number)
        rest = command.communicate(timeout=60)[0]
        assert ("taking everything down" in rest) == (number != signal.SIGKILL)
        assert none_within(tmp_path / "fed", 20)
    finally:
        command.kill()
        command.wait()
