"""A whole deployment on this machine, by its own scripts: it comes up, does its work, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-c", "from fedspan.flower.commands import app; app()", "up"]
SMALL = ["--sites", "2", "--set", "federation.rounds=2", "--set", "local.steps=2", "--set", "data.max_test=20"]


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


@pytest.mark.parametrize(
    ("number", "proxy", "when", "alive"),
    [
        (signal.SIGKILL, "auto", "registered and starting", 5),  # superlink, its executor, the proxy, two sites
        (signal.SIGTERM, "python", "lets the fleet API through", 3),
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
        command.wait(30)
        assert none_within(tmp_path / "fed", 20)
    finally:
        command.kill()
        command.wait()
