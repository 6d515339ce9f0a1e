"""A comparison carried out on tiny bases: what is run, what is kept, and that an interruption changes nothing."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedspan.comparison import compare, dry_run, runner
from fedspan.config import load
from fedspan.data import load as load_data
from fedspan.runs.execution import run
from fedspan.support.errors import FedspanError

TEXT = """
name = "tiny"
seeds = [0, 1, 2]
baseline = "flexlora"
figure = "mean_last"
last_rounds = 2

[base]
model.name = {base}
data = {{ task = "files", train = [{texts}], holdout = 0.3 }}
federation = {{ num_clients = 3, rounds = 2, participation = 1.0, ranks = 2, partition = "iid" }}
local = {{ steps = 2, batch_size = 4, learning_rate = 1e-2 }}
evaluation.diagnostics = false
engine.workers = 1

[[arms]]
name = "flexlora"
settings.method.name = "flexlora"

[[arms]]
name = "glora"
settings.method.name = "glora"
grid.local.learning_rate = [1e-2, 3e-2]

[[conditions]]
name = "iid"

[tuning]
share = 0.25
seeds = [100]
widen = 0
"""
GROWN = """
[[conditions]]
name = "skew"
settings.federation = { partition = "dirichlet", dirichlet_alpha = 5.0, drop_empty = true }
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], texts: Path) -> Path:
    path = tmp_path_factory.mktemp("suite") / "suite.toml"
    path.write_text(TEXT.format(base=json.dumps(str(bases["bert"])), texts=json.dumps(str(texts))))
    return path


@pytest.fixture(scope="module")
def finished(suite: Path) -> tuple[Path, list[str]]:
    shown: list[str] = []
    out = suite.parent / "finished"
    compare(suite, out, shown.append, at_once=3)
    return out, shown


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_was_run(suite: Path, finished: tuple[Path, list[str]]) -> None:
    out, shown = finished
    lines = lines_of(out)
    assert [line["stage"] for line in lines] == ["tune"] * 2 + ["final"] * 6
    assert len(shown) == 8
    assert shown[0].startswith("tune iid/glora seed 100 learning_rate 0.01: accuracy ")
    assert (out / "suite.toml").read_text() == suite.read_text()
    for line in lines:
        summary = json.loads((out / line["folder"] / "summary.json").read_text())
        records = [json.loads(row) for row in (out / line["folder"] / "metrics.jsonl").read_text().splitlines()]
        assert line["figures"]["last"] == summary["federated"]
        assert line["figures"]["mean_last"] == pytest.approx(np.mean([r["eval"]["accuracy"] for r in records]))
        assert line["figures"]["best"] == max(r["eval"]["accuracy"] for r in records)
        assert (line["rows"], line["bytes_up"]) == (summary["data"]["rows"]["test"], summary["totals"]["bytes_up"])
        assert line["versions"] == summary["versions"]
        assert set(line) >= {"settings", "config_digest", "revision", "seconds", "bytes_down"}
    # The untouched base has a new head for every seed, so it is measured once a seed, and in no tuning run.
    assert [line["seed"] for line in lines if line["base"] is not None] == [0, 1, 2]


def test_tuning_sees_no_test_row(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    rows: dict[str, list[set[tuple[str, ...]]]] = {"tune": [], "final": []}
    for line in lines_of(out):
        config = load(out / line["folder"] / "config.toml")
        corpus = load_data(config.data, config.data_seed)
        rows[line["stage"]].append({*corpus.test.inputs})
        if line["stage"] == "final":
            trained = {*corpus.train.inputs}
            assert not trained & {*corpus.test.inputs}
            assert all(tested < trained for tested in rows["tune"])
        else:
            rows["train"] = [*rows.get("train", []), {*corpus.train.inputs}]
            assert corpus.unseen is None
    tested = set.union(*rows["final"])
    assert all(one == tested for one in rows["final"]), "every seed has the same test rows"
    assert not any(one & tested for one in (*rows["tune"], *rows["train"]))


def test_the_best_values_on_held_out_rows_are_used(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    lines = lines_of(out)
    tried = {line["settings"]["local.learning_rate"]: line["figures"]["mean_last"] for line in lines[:2]}
    chosen = max(tried, key=lambda rate: tried[rate])
    assert {json.dumps(line["settings"]) for line in lines if line["arm"] == "glora" and line["stage"] == "final"} == {
        json.dumps({"local.learning_rate": chosen})
    }


def test_the_intervals_are_those_of_the_lines(finished: tuple[Path, list[str]]) -> None:
    """Recomputed from runs.jsonl alone, by SciPy's formulas."""
    out, _ = finished
    content = json.loads((out / "comparison.json").read_text())
    figures: dict[str, dict[int, float]] = {"flexlora": {}, "glora": {}}
    for line in lines_of(out):
        if line["stage"] == "final":
            figures[line["arm"]][line["seed"]] = line["figures"]["mean_last"]
    rows = lines_of(out)[-1]["rows"]
    values = np.array([figures["glora"][seed] - figures["flexlora"][seed] for seed in (0, 1, 2)])
    error = max(np.std(values, ddof=1), 1 / (rows * 6**0.5)) / 3**0.5
    (found,) = content["differences"]
    assert found["mean"] == pytest.approx(values.mean())
    half = stats.t.ppf(0.975, 2) * error
    assert (found["low"], found["high"]) == pytest.approx((values.mean() - half, values.mean() + half))
    assert found["p"] == found["p_adjusted"] == pytest.approx(2 * stats.t.sf(abs(values.mean()) / error, 2))
    assert (found["condition"], found["arm"], found["baseline"]) == ("iid", "glora", "flexlora")
    for cell in content["cells"]:
        own = [*figures[cell["arm"]].values()]
        assert (cell["n"], cell["mean"], cell["std"]) == pytest.approx((3, np.mean(own), np.std(own, ddof=1)))
        assert cell["values"] == {str(seed): value for seed, value in figures[cell["arm"]].items()}
    table = (out / "table.md").read_text()
    assert f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]" in table
    assert "Fewer than 5 seeds" in table
    assert content["margin"] == 0.01


def test_its_runs_can_be_kept_as_a_benchmark(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parents[2] / "benchmarks"
    if not folder.exists():
        pytest.skip("installed without the repository")
    monkeypatch.syspath_prepend(str(folder))
    keep = importlib.import_module("keep")
    keep.keep(finished[0], tmp_path)
    for line, kept in zip(lines_of(finished[0]), lines_of(tmp_path), strict=True):
        assert {key: kept[key] for key in line} == line
        assert round(kept["server_seconds"] + kept["client_seconds"], 3) == line["seconds"]
        assert [record["round_num"] for record in kept["rounds"]] == [1, 2]
        accuracies = [record["eval"]["accuracy"] for record in kept["rounds"]]
        assert sum(accuracies) / 2 == line["figures"]["mean_last"]
    measured = {line["seed"]: line["base"] for line in lines_of(tmp_path) if line["base"] is not None}
    final = keep.final_runs(tmp_path)
    assert [line["base"] for line in final] == [measured[line["seed"]] for line in final]


def test_a_run_has_the_bits_that_it_has_alone(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, _ = finished
    for line in lines_of(out)[-2:]:
        alone = run(load(out / line["folder"] / "config.toml"), tmp_path / str(line["seed"]))
        together = (out / line["folder"] / "adapter" / "adapter_model.safetensors").read_bytes()
        assert alone.adapter is not None
        assert (alone.adapter / "adapter_model.safetensors").read_bytes() == together


def test_a_finished_comparison_runs_nothing_and_is_the_same(
    suite: Path, finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    before = {name: (out / name).read_bytes() for name in ("table.md", "comparison.json", "runs.jsonl")}
    monkeypatch.setattr(runner, "run_many", None)
    compare(suite, out)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert dry_run(suite, out)[1:3] == [
        "tuning: at least 2 runs of 2 rounds, 2 done",
        "final: 6 runs of 2 rounds, 6 done",
    ]


def test_added_parts_are_all_that_is_run(suite: Path, finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "grown"
    shutil.copytree(finished[0], out)
    before = lines_of(out)
    grown = tmp_path / "suite.toml"
    grown.write_text(suite.read_text().replace("seeds = [0, 1, 2]", "seeds = [0, 1, 2, 3]") + GROWN)
    compare(grown, out)
    lines = lines_of(out)
    assert lines[: len(before)] == before
    added = [(line["stage"], line["condition"], line["seed"]) for line in lines[len(before) :]]
    new = [("tune", "skew", 100)] * 2 + [("final", "iid", 3)] * 2
    assert sorted(added) == sorted([*new, *[("final", "skew", seed) for seed in (0, 1, 2, 3)] * 2])
    with pytest.raises(FedspanError, match=r"was begun with another seeds \(without 3\), condition skew: expected"):
        compare(suite, out)


def test_a_folder_that_holds_something_else_is_left_alone(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FedspanError, match="holds something else"):
        compare(suite, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_run_that_fails_is_named(suite: Path, tmp_path: Path) -> None:
    broken = tmp_path / "suite.toml"
    broken.write_text(suite.read_text().replace("batch_size = 4", "batch_size = 4, keep_optimizer = true, epochs = 1"))
    with pytest.raises(FedspanError, match=r"^base: .*not both"):
        compare(broken, tmp_path / "out")
    broken.write_text(suite.read_text().replace('"iid"\n\n[tun', '"iid"\nsettings.data.label_column = "mood"\n\n[tun'))
    with pytest.raises(FedspanError, match=r"^tune iid/glora seed 100 learning_rate 0\.01: .*mood"):
        compare(broken, tmp_path / "out")


@pytest.mark.slow
def test_killed_at_any_point_it_ends_with_the_same_table(
    suite: Path, finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """SIGKILL at three random points, of which the last leave half-written lines; then once to the end."""
    out = tmp_path / "out"
    word = f"from fedspan.comparison import compare; compare({str(suite)!r}, {str(out)!r}, at_once=3)"
    draw, killed = random.Random(time.time_ns()), 0
    for num_lines in sorted(draw.sample(range(8), 3)):
        process = subprocess.Popen([sys.executable, "-c", word], start_new_session=True)
        while process.poll() is None:
            path = out / "runs.jsonl"
            if (len(path.read_bytes().splitlines()) if path.exists() else 0) >= num_lines and out.exists():
                time.sleep(draw.random() * 0.3)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        killed += process.wait() == -signal.SIGKILL
        if (out / "runs.jsonl").exists():
            with open(out / "runs.jsonl", "ab") as file:
                file.write(b'{"stage": "fin')
    assert killed == 3
    compare(suite, out, at_once=3)
    whole, _ = finished
    for name in ("table.md", "comparison.json"):
        one, other = (path / name for path in (out, whole))
        if name == "comparison.json":
            assert without_times(one) == without_times(other)
        else:
            assert one.read_bytes() == other.read_bytes()


def without_times(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    for cell in content["cells"]:
        del cell["seconds"]
    return content


def test_training_that_diverges_is_a_result_of_its_arm(suite: Path, tmp_path: Path) -> None:
    """In tuning another value is chosen, and in a final run the seeds count as diverged; nothing is run again."""
    text = suite.read_text().replace("seeds = [0, 1, 2]", "seeds = [0]").replace("[1e-2, 3e-2]", "[1e-2, 1e30]")
    own = tmp_path / "suite.toml"
    own.write_text(
        text.replace(
            "[[conditions]]",
            '[[arms]]\nname = "wild"\nsettings.method.name = "flexlora"\n'
            "settings.local = { learning_rate = 1e30 }\n\n[[conditions]]",
        )
    )
    found = compare(own, tmp_path / "out")
    cells = {cell["arm"]: cell for cell in found.content["cells"]}
    assert cells["glora"]["settings"] == {"local.learning_rate": 1e-2}
    assert (cells["wild"]["n"], cells["wild"]["diverged"], cells["wild"]["mean"]) == (0, 1, None)
    assert {one["arm"]: one["verdict"] for one in found.content["differences"]}["wild"] == "open"
    assert "– (1 diverged)" in found.table
    assert found.content["base"][0]["mean"] is not None
    lines: list[str] = []
    assert compare(own, tmp_path / "out", lines.append).table == found.table
    assert not lines
