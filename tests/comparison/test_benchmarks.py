"""The benchmarks' suites are comparisons that can run, and their pages are those of the committed runs."""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scipy import stats

from fedspan.comparison import dry_run
from fedspan.comparison.plan import combinations
from fedspan.comparison.results import comparison
from fedspan.comparison.suite import Suite, read
from fedspan.comparison.tuning import Choice
from fedspan.config.paths import reads_files
from fedspan.config.sections import DataConfig

ROOT = Path(__file__).parents[2]
SUITES = sorted(ROOT.glob("benchmarks/*/suite.toml"))
WITH_RUNS = [path for path in SUITES if (path.parent / "runs.jsonl").exists()]
pytestmark = pytest.mark.skipif(not SUITES, reason="installed without the repository")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return {name: importlib.import_module(name) for name in ("keep", "claims", "algebra", "table")}


def data_files(suite: Suite) -> set[str]:
    """The files that any of the runs reads."""
    trees = [suite.base.get("data", {}), *(one.settings.get("data", {}) for one in suite.conditions)]
    data = [DataConfig.model_validate({**trees[0], **tree}) for tree in trees]
    return {name for one in data if reads_files(one) for name in (*one.train, *one.test, *one.unseen)}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.parent.name)
def test_every_suite_is_accepted(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With empty files in place of the data, which a dry run does not open."""
    monkeypatch.chdir(tmp_path)
    copied = tmp_path / "benchmarks" / path.parent.name / "suite.toml"
    copied.parent.mkdir(parents=True)
    shutil.copy(path, copied)
    suite = read(copied)
    for name in data_files(suite):
        file = copied.parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    shown = dry_run(copied)
    num_runs = sum(len(suite.conditions_of(arm)) for arm in suite.arm_names) * len(suite.seeds)
    assert any(line.startswith(f"final: {num_runs} runs") for line in shown), shown
    assert not (tmp_path / "runs").exists()


def test_every_suite_is_on_the_page(scripts: dict[str, ModuleType]) -> None:
    assert {path.parent.name for path in SUITES} == set(scripts["claims"].SUITES)
    assert WITH_RUNS


@pytest.mark.parametrize("path", WITH_RUNS, ids=lambda path: path.parent.name)
def test_the_committed_runs_can_be_judged(path: Path) -> None:
    """Every arm and condition that is there has all seeds with one value, and was tuned where it has several to try."""
    suite, cells, tuned = read(path), {}, set()
    for line in lines_of(path.parent / "runs.jsonl"):
        if line["stage"] == "final":
            cells.setdefault((line["condition"], line["arm"]), []).append(line)
        else:
            tuned.add((line["condition"], line["arm"]))
    grids = {arm.name: arm.grid for arm in suite.arms}
    assert {cell for cell in cells if len(combinations(grids[cell[1]])) > 1} == tuned
    for cell, own in cells.items():
        assert sorted(line["seed"] for line in own) == sorted(suite.seeds), cell
        assert len({json.dumps(line["settings"]) for line in own}) == 1, cell
    found = comparison(suite, cells, {cell: Choice(own[0]["settings"]) for cell, own in cells.items()})
    assert len(found["differences"]) == sum(arm != suite.baseline for _, arm in cells)
    assert any(base["mean"] is not None for base in found["base"])


def test_a_verdict_is_that_of_its_own_interval(scripts: dict[str, ModuleType]) -> None:
    """As SciPy's paired test has it, from the committed lines."""
    found = scripts["claims"].rows()
    assert found
    for row in found:
        values = row.found.pairs.values
        low, high = stats.t.interval(0.95, len(values) - 1, statistics.mean(values), stats.sem(values))
        exact = row.found.pairs.deviation == pytest.approx(
            statistics.stdev(values)
        )  # not at the resolution of the rows
        expected = "better" if low > 0 else "worse" if high < 0 else "equivalent" if max(-low, high) < 0.01 else "open"
        assert row.verdict == expected or not exact, row
        if row.found.verdict != "open":
            assert row.verdict == row.found.verdict, "what stands after the correction stands before it"


def test_the_figure_at_a_traffic_is_the_last_before_it(scripts: dict[str, ModuleType]) -> None:
    rounds = [
        {"bytes_up": 3, "bytes_down": 2, "eval": {"accuracy": 0.1 * k} if k % 2 else None, "round_num": k}
        for k in range(1, 7)
    ]
    line = {"rounds": rounds, "metric": "accuracy", "base": 0.05, "figures": {"last": 0.6}}
    at = scripts["claims"].at_traffic
    for budget, expected in ((4, 0.05), (5, 0.1), (14, 0.1), (15, 0.3), (1000, 0.5)):
        assert at(line, {"bytes_up": budget, "bytes_down": 0}, None) == pytest.approx(expected)


def test_the_pages_are_those_of_the_committed_runs(scripts: dict[str, ModuleType]) -> None:
    """`python benchmarks/table.py` changes nothing."""
    for path, text in scripts["table"].pages().items():
        assert path.read_text(encoding="utf-8") == text, path.name


def finished(folder: Path, arms: tuple[str, ...]) -> Path:
    """A comparison's folder with one finished run of each arm."""
    lines = []
    for arm in arms:
        run = folder / "runs" / "base" / arm / "seed-0"
        run.mkdir(parents=True)
        totals = {"server_seconds": 1.5, "client_seconds": 2.5}
        (run / "summary.json").write_text(json.dumps({"data": {"rows": {"test": 9, "unseen": 4}}, "totals": totals}))
        record = {"train_loss": 0.123456, "eval": None, "bytes_up": 123456, "bytes_down": 7, "ranks": [1, 2]}
        measured = {"diagnostics": {"drift": 0.123456, "worst": {"x": 1}}}
        records = [{"round_num": k} | record | measured for k in range(1, 7)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        line = {"stage": "final", "condition": "base", "arm": arm, "seed": 0, "settings": {}, "config_digest": "d"}
        lines.append(line | {"folder": f"runs/base/{arm}/seed-0"})
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_kept_lines_hold_what_the_pages_need(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    assert scripts["keep"].keep(finished(tmp_path / "one", ("a",)), suite) == 1
    (line,) = lines_of(suite / "runs.jsonl")
    assert (line["unseen_rows"], line["server_seconds"], line["client_seconds"]) == (4, 1.5, 2.5)
    kept = {"train_loss": 0.123456, "eval": None, "bytes_up": 123456, "bytes_down": 7}
    diagnosed = {"diagnostics": {"drift": 0.1235}}
    assert line["rounds"] == [{"round_num": k} | kept | (diagnosed if k in (1, 4, 6) else {}) for k in range(1, 7)]
    assert scripts["keep"].keep(finished(tmp_path / "grown", ("a", "b")), suite) == 2
    with pytest.raises(SystemExit, match="holds 1 runs that"):
        scripts["keep"].keep(finished(tmp_path / "other", ("b",)), suite)
    assert len(lines_of(suite / "runs.jsonl")) == 2
