"""The command in a process of its own, and in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedspan.cli.main import main
from fedspan.display.loading import END

COMMAND = [sys.executable, "-m", "fedspan"]
WAITING = ("reading ", "encoding ", "loading ", "preparing ")
SMALL = [
    "federation.num_clients=3",
    "federation.rounds=3",
    "federation.participation=0.7",
    "local.steps=2",
    "data.max_train=120",
    "data.max_test=12",
    "evaluation.max_new_tokens=4",
]
"""Settings of a run that takes seconds."""


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **extra}


def fedspan(*args: object, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(**extra),
        timeout=300,
        check=False,
    )


def inside(capsys: pytest.CaptureFixture[str], *args: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has its libraries loaded already."""
    code = main([str(arg) for arg in args])
    output = capsys.readouterr()
    return subprocess.CompletedProcess(args, code, output.out, output.err)


def settings(items: Sequence[str]) -> list[str]:
    return [part for item in items for part in ("--set", item)]


def without_waiting(stderr: str) -> str:
    """Standard error without the lines on what a command waited for, of which there are more on a busy machine."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not (line.endswith(f"{END}\n") and line.startswith(WAITING)))


def assert_mistake(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and exactly one line on stderr that holds the parts, beside those on what took long before it."""
    assert done.returncode == 2, done.stderr
    said = without_waiting(done.stderr)
    assert said.startswith("fedspan: ")
    assert said.count("\n") == 1, done.stderr
    for part in parts:
        assert part in said
    assert done.stdout == ""
