"""Whole runs by the command: output, run folder, a run killed and resumed, curves."""

import json
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command import COMMAND, SMALL, assert_mistake, environment, fedspan, inside, settings, without_waiting
from interrupts import interruptible_children

from fedspan.display.progress import number, size

TIMING = ("server_seconds", "client_seconds", "train_wall_seconds", "peak_server_bytes")


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        drop = (*TIMING, "wall_seconds")
        return {key: without_timing(item) for key, item in value.items() if key not in drop}
    return [without_timing(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One uninterrupted run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, fedspan("run", *settings(SMALL), "--out", folder)


@pytest.mark.slow
def test_a_run_prints_plain_lines_and_a_table(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert without_waiting(done.stderr) == ""
    assert "\x1b" not in done.stdout
    assert re.search(r"^(cohort|sequential) engine.*, \d+ process(es)?$", done.stdout, re.MULTILINE)
    rounds = [line for line in done.stdout.splitlines() if line.startswith("  round ")]
    assert [line.split()[1] for line in rounds] == ["1/3", "2/3", "3/3"] * 2
    assert all("loss" in line and "clients" in line for line in rounds)
    summary = json.loads((folder / "summary.json").read_text())
    for label, key in (("untouched base", "base"), ("average client alone", "local"), ("federation", "federated")):
        row = next(line for line in done.stdout.splitlines() if re.match(rf"{label} (\(|  )", line))
        assert number(summary[key]) in row
    assert size(summary["totals"]["bytes_up"]) in done.stdout
    assert str(folder / "adapter") in done.stdout


def test_a_run_leaves_a_whole_folder(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "checkpoint",
        "adapter",
    }
    history = records(folder)
    assert [record["round_num"] for record in history] == [1, 2, 3]
    for record in history:
        assert record["num_clients"] == 2
        assert record["bytes_up"] > 0
        assert record["bytes_down"] > 0
        assert {"method", "train_loss", "eval", "server_rank", "truncation_error", *TIMING} <= set(record)
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("method", "metric", "higher_is_better", "base", "local", "federated", "seed", "versions"):
        assert key in summary
    assert summary["totals"]["bytes_up"] == sum(record["bytes_up"] for record in history)
    assert (folder / "adapter" / "adapter_config.json").exists()
    resolved = fedspan("config", folder / "config.toml")
    assert resolved.stdout == (folder / "config.toml").read_text(encoding="utf-8")


def test_a_folder_that_holds_a_run_is_refused(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert_mistake(inside(capsys, "run", "--out", folder), str(folder), "fedspan resume")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def stop(args: Sequence[object], line: str, how: signal.Signals) -> tuple[int, str]:
    """Send the signal as soon as a line of the command's output starts so; its exit code and stderr."""
    with interruptible_children():
        process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
    with process:
        assert process.stdout is not None
        for printed in process.stdout:
            if printed.strip().startswith(line):
                process.send_signal(how)
                break
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors


@pytest.mark.slow
def test_a_run_stopped_twice_ends_with_the_same_bits(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Killed in the federation, then interrupted in the control: as if nothing had happened."""
    whole, _ = finished
    folder = tmp_path / "stopped"
    code, _ = stop(["run", *settings(SMALL), "--out", folder], "round 2/3", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 2 <= len(records(folder)) <= 3
    code, errors = stop(["resume", folder], "clients alone", signal.SIGINT)
    assert (code, without_waiting(errors)) == (130, f"fedspan: interrupted; continue with: fedspan resume {folder}\n")
    assert not (folder / "summary.json").exists()
    done = fedspan("resume", folder)
    assert (done.returncode, without_waiting(done.stderr)) == (0, "")
    assert "round" not in done.stdout.partition("clients alone")[0].partition("federation")[2]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert without_timing(records(folder)) == without_timing(records(whole))
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
    assert without_timing(ours) == without_timing(theirs)


def test_plot_draws_a_run(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    folder, _ = finished
    done = inside(capsys, "plot", folder, "--out", tmp_path / "curves.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_mistake(inside(capsys, "plot", tmp_path), "metrics.jsonl")
