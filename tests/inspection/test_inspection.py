"""`fedspan inspect`: the table, what it says in words, the picture, on real runs and on made-up figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny

from fedspan import inspection
from fedspan.cli.main import main
from fedspan.config import from_mapping, to_toml
from fedspan.diagnostics.measure import FIGURES
from fedspan.inspection.record import angle, percent
from fedspan.runs.execution import run


def fedspan(*args: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "fedspan", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def inside(capsys: pytest.CaptureFixture[str], *args: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has its libraries loaded already."""
    code = main([str(arg) for arg in args])
    said = capsys.readouterr()
    return subprocess.CompletedProcess(args, code, said.out, said.err)


def folder_with(path: Path, method: str, *rounds: Mapping[str, Any], **options: Any) -> Path:
    """A run folder with these figures; what is not named does not apply."""
    path.mkdir()
    config = to_toml(from_mapping({"method": {"name": method, **options}}))
    (path / "config.toml").write_text(config, encoding="utf-8")
    lines = []
    for number, figures in enumerate(rounds, 1):
        found = {**dict.fromkeys(FIGURES), "worst": {}, **figures}
        lines.append(json.dumps({"round_num": number, "method": method, "diagnostics": found}) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


def said(path: Path, method: str, *rounds: Mapping[str, Any]) -> str:
    return "\n".join(inspection.readings(inspection.read(folder_with(path, method, *rounds))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("glora", "gauge-invariant (GLoRA, Proposition 2)"),
        ("fedit", "not gauge-invariant"),
        ("ffa_lora", "stayed inside the row space of the first A in every round"),
        ("fedftg", "the rule is exact here"),
    ],
)
def test_a_real_run_is_told_as_it_was(
    method: str,
    sentence: str,
    bases: dict[str, Path],
    instructions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run, inspect (once in a process of its own): rows by round, the sentence for this method, JSON, a picture."""
    config = tiny.config(
        bases["llama"], instructions, method, federation={"participation": 1.0}, evaluation={"diagnostics": True}
    )
    run(config, tmp_path / "run")
    given = ("inspect", tmp_path / "run", "--plot", tmp_path / "picture.svg")
    done = fedspan(*given) if method == "glora" else inside(capsys, *given)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["round", "from", "ideal"]
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    assert sentence in done.stdout
    assert lines[-1] == str(tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text(encoding="utf-8")
    printed = json.loads(inside(capsys, "inspect", tmp_path / "run", "--json").stdout)
    assert printed["method"] == method
    assert [r["round_num"] for r in printed["rounds"]] == [1, 2]
    assert set(FIGURES) <= set(printed["rounds"][0])
    assert any(sentence in line for line in printed["readings"])
    if method == "fedftg":  # ranks are of the change since the base, which the engine knows
        assert printed["rounds"][1]["effective_rank"] > 1


def test_a_run_without_diagnostics_says_how_to_have_them(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.config(bases["llama"], instructions, evaluation={"diagnostics": False})
    run(config, tmp_path / "run")
    records = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all("diagnostics" not in json.loads(line) for line in records)
    done = inside(capsys, "inspect", tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--set evaluation.diagnostics=true" in done.stderr


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.jsonl").write_text("3\n")
    for path, part in (
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "odd", "is damaged: expected JSON objects"),
        (folder_with(tmp_path / "new", "glora"), "no round"),
    ):
        done = inside(capsys, "inspect", path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert part in done.stderr
    done = inside(capsys, "inspect", "--help")
    assert done.returncode == 0
    assert "fedspan inspect runs/mine" in done.stdout


def test_sentences_follow_the_figures(tmp_path: Path) -> None:
    """Each statement in both of its outcomes."""
    losses = {"readout_loss": {"2": 0.3, "4": 0.12}, "truncation_loss": {"2": 0.3, "4": 0.05}}
    text = said(tmp_path / "a", "glora", {"distance_from_ideal": 0.12, "distance_from_innovation": 0.4, **losses})
    assert "12% away from the ideal update" in text
    assert "forgotten" in text
    assert "rank 2 starts 30% away" in text
    assert "the least that any adapter of that rank can lose" in text
    text = said(
        tmp_path / "b",
        "glora",
        {"distance_from_ideal": 2e-7, "readout_loss": {"4": 2e-7}, "truncation_loss": {"4": 0.0}},
    )
    assert "the ideal update to rounding" in text
    assert "no readout truncates" in text
    text = said(tmp_path / "c", "fedit", {"distance_from_ideal": 0.3, "cross_terms": 0.3, "gauge_sensitivity": 0.31})
    assert "the cross terms of averaged factors" in text
    assert "by 31%: not gauge-invariant" in text
    text = said(tmp_path / "d", "ffa_lora", {"distance_from_ideal": 0.0, "first_a_escape": 1e-14, "cross_terms": 0.0})
    assert "FFA-LoRA's confinement" in text
    assert "no gauge to choose" in text
    assert "averaging factors loses nothing" in text
    text = said(tmp_path / "e", "glora", {"distance_from_ideal": 0.0, "first_a_escape": 0.25, "row_space_escape": 0.1})
    assert "25% of the change's energy lies outside the row space of the first A, 10% outside" in text
    grown = [{"distance_from_ideal": 0.0, "effective_rank": x, "effective_rank_is_bound": True} for x in (10.0, 30.0)]
    text = said(tmp_path / "f", "fedftg", *grown)
    assert "grew: at least 10.0 at first, at least 30.0 at last (averaged weights gather directions" in text
    fallen = [{"distance_from_ideal": 0.0, "effective_rank": x} for x in (8.0, 2.0)]
    assert "fell: 8.0 at first, 2.0 at last" in said(tmp_path / "g", "hetlora", *fallen)
    assert "models of their own" in said(tmp_path / "h", "local", {"angle_clients_mean": 70.0})


def test_a_long_run_fits_a_screen_and_ends_with_its_last_round(tmp_path: Path) -> None:
    for length in (20, 21, 100):
        rounds = [{"distance_from_ideal": 0.1, "readout_loss": {"4": 0.1}}] * length
        table = inspection.table(inspection.read(folder_with(tmp_path / f"r{length}", "glora", *rounds)))
        assert 10 <= table.row_count <= inspection.MAX_ROWS
        shown = list(table.columns[0].cells)
        assert shown[-1] == str(length)
        assert len({int(y) - int(x) for x, y in pairwise(shown)}) == 1
        assert [column.header for column in table.columns] == ["round", "from ideal", "rank 4"]


def test_figures_are_written_short() -> None:
    assert [percent(x) for x in (None, 0.0, 1e-9, 3.1e-5, 0.1234, 1.5, 25.0)] == [
        "–",
        "0",
        "0",
        "0.0031%",
        "12.3%",
        "150%",
        "25×",
    ]
    assert (angle(None), angle(12.34)) == ("–", "12.3°")


def test_ranks_are_those_of_any_round(tmp_path: Path) -> None:
    rounds = [{"readout_loss": {"2": 0.1, "16": 0.1}}, {"readout_loss": {"4": 0.1}}, {"readout_loss": None}]
    assert inspection.read(folder_with(tmp_path / "run", "glora", *rounds)).ranks() == ["2", "4", "16"]


def test_without_matplotlib_a_plot_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inspection.read(folder_with(tmp_path / "run", "glora", {"distance_from_ideal": 0.1}))
    assert inspection.plot(found, tmp_path / "new" / "a.png").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install"):
        inspection.plot(found, tmp_path / "b.png")
