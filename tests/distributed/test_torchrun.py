"""Real runs under torchrun: the bits of one process, and what happens when a process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from run_folders import same_outcome

from fedspan.config import Config, to_toml
from fedspan.runs.execution import resume, run

_PATIENCE = 1200
"""Seconds after which a command is taken to hang. Each of its processes imports torch and transformers, which takes
many times longer where others work on the same cores; how soon a death is noticed is asserted apart from this."""


def settings(bases: dict[str, Path], texts: Path, rounds: int, method: str = "glora") -> Config:
    federation = {"participation": 1.0, "ranks": [1, 8, 2, 4], "rounds": rounds}
    return tiny.config(bases["bert"], texts, method, federation=federation, evaluation={"base": False, "local": False})


@contextmanager
def torchrun(size: int, *args: object) -> Iterator[subprocess.Popen[str]]:
    """The command in that many processes, whose output goes to pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "fedspan"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    started = subprocess.Popen(
        [*command, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield started
    finally:
        started.terminate()  # torchrun ends its processes
        started.communicate(timeout=_PATIENCE)


def process_of(rank: int, parent: int) -> int:
    """Return the process id of one of torchrun's processes."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def wait_for_a_round(started: subprocess.Popen[str], out: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def said_by_fedspan(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("fedspan: ")]


def killed_in_a_round(size: int, rank: int, config: Config, folder: Path) -> tuple[str, float]:
    """Kill one process after the first round; return its line, and the seconds to the end of all."""
    (folder / "config.toml").write_text(to_toml(config))
    with torchrun(size, "run", folder / "config.toml", "--out", folder / "run") as started:
        wait_for_a_round(started, folder / "run")
        children = [process_of(own, started.pid) for own in range(size)]
        os.kill(children[rank], signal.SIGKILL)
        began = time.monotonic()
        _, stderr = started.communicate(timeout=_PATIENCE)
        seconds = time.monotonic() - began
        assert started.returncode != 0
    for child in children:
        assert not Path(f"/proc/{child}").exists()
    (line,) = said_by_fedspan(stderr)
    return line, seconds


def rounds_of(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines())


pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the processes from /proc")


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_goes_on_in_one(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    line, seconds = killed_in_a_round(2, 1, settings(bases, texts, 200), tmp_path)
    assert line.startswith("fedspan: process 1 of 2 (")
    assert "was lost at" in line
    assert line.endswith(f"; continue with: fedspan resume {tmp_path / 'run'}")
    assert seconds < 30
    rounds = rounds_of(tmp_path / "run") + 1
    resume(tmp_path / "run", workers=1, rounds=rounds)
    run(settings(bases, texts, rounds), tmp_path / "alone")
    same_outcome(tmp_path / "alone", tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("method", ["glora", "fedftg", "fedsa_lora"])
def test_four_processes_end_with_the_bits_of_one(
    bases: dict[str, Path], texts: Path, tmp_path: Path, method: str
) -> None:
    config = settings(bases, texts, 2, method)
    if method == "fedsa_lora":
        config = config.model_copy(update={"federation": config.federation.model_copy(update={"ranks": 4})})
    (tmp_path / "config.toml").write_text(to_toml(config))
    with torchrun(4, "run", tmp_path / "config.toml", "--out", tmp_path / "four") as started:
        stdout, stderr = started.communicate(timeout=_PATIENCE)
    assert started.returncode == 0, stderr
    assert stdout.count("4 processes") == 1  # one process prints
    run(config, tmp_path / "one")
    same_outcome(tmp_path / "one", tmp_path / "four")


@pytest.mark.long
def test_the_death_of_the_leading_process_is_said_once_and_the_run_goes_on_with_another_number(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    line, seconds = killed_in_a_round(3, 0, settings(bases, texts, 200), tmp_path)
    assert line.startswith("fedspan: process 0 of 3, which leads the run, was lost (")
    assert seconds < 30
    rounds = rounds_of(tmp_path / "run") + 2
    with torchrun(2, "resume", tmp_path / "run", "--rounds", rounds) as started:
        _, stderr = started.communicate(timeout=_PATIENCE)
    assert started.returncode == 0, stderr
    run(settings(bases, texts, rounds), tmp_path / "alone")
    same_outcome(tmp_path / "alone", tmp_path / "run")


@pytest.mark.long
def test_an_idle_process_that_is_stopped_is_lost_by_its_silence(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """Stopped (SIGSTOP), it keeps its connections, as a machine does whose network is gone."""
    (tmp_path / "config.toml").write_text(to_toml(settings(bases, texts, 2000)))
    with torchrun(2, "run", tmp_path / "config.toml", "--out", tmp_path / "run") as started:
        wait_for_a_round(started, tmp_path / "run")
        child = process_of(1, started.pid)
        os.kill(child, signal.SIGSTOP)
        began = time.monotonic()
        leading = process_of(0, started.pid)
        while Path(f"/proc/{leading}/cmdline").exists() and Path(f"/proc/{leading}/cmdline").read_bytes():
            assert time.monotonic() - began < 40
            time.sleep(0.2)
        assert time.monotonic() - began < 30
        os.kill(child, signal.SIGKILL)
        _, stderr = started.communicate(timeout=_PATIENCE)
    (line,) = said_by_fedspan(stderr)
    assert "process 1 of 2" in line
    assert "no sign of life for 2" in line


@pytest.mark.long
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run", "--set", "methd.name=glora"], "methd"),
        (["run", "--set", "engine.workers=2"], "engine.workers = 2 in a run of 2 processes"),
        (["run", "--engine", "flower-simulation"], "--engine flower-simulation in processes of torchrun"),
        (["compare", "suite.toml"], "compare in processes of torchrun: expected run or resume"),
    ],
)
def test_a_mistake_is_one_line_and_ends_all(args: list[str], said: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")] if args[0] == "run" else []
    with torchrun(2, *args, *out) as started:
        stdout, stderr = started.communicate(timeout=_PATIENCE)
    (line,) = said_by_fedspan(stderr)
    assert said in line
    assert stdout == ""
    assert started.returncode != 0
    assert not (tmp_path / "run").exists()
