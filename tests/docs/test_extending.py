"""The examples of docs/extending.md are taken from the page, registered, and held to what they claim."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pages
import pytest
import tiny
from methods.federations import Case, assert_same, build, distance, gauge, received, regauged, served

from fedspan import methods
from fedspan.config import Config, to_toml
from fedspan.data.metrics import METRICS, Metric, Score
from fedspan.federation import sampling
from fedspan.methods.base import Method
from fedspan.privacy import accounting
from fedspan.privacy.pld import PLDAccountant
from fedspan.runs.events import Event
from fedspan.runs.execution import run

EXAMPLES = pages.examples()
SEAMS = ["method", "metric", "client sampler", "transport", "accountant"]
Factory = Callable[..., Method]


# Files to open


def test_the_page_has_every_seam_and_its_table_agrees() -> None:
    assert list(EXAMPLES) == SEAMS
    page = (pages.DOCS / "extending.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| an? \[(.+?)\]\(#(.+?)\) \| (\d) \|", page, flags=re.MULTILINE)
    assert [(title, int(number)) for title, _, number in table] == [(e.title, e.num_files) for e in EXAMPLES.values()]
    anchors = [line.lower().replace(":", "").replace(" ", "-") for line in re.findall(r"^## (.+)$", page, re.MULTILINE)]
    assert [anchor for _, anchor, _ in table] == anchors


@pytest.mark.parametrize("title", SEAMS)
def test_an_example_opens_as_many_files_as_its_heading_says(title: str) -> None:
    """And beside its own code it adds one entry of a table, and the import that the entry needs."""
    example = EXAMPLES[title]
    assert len({edit.path for edit in example.edits}) == example.num_files
    kinds = [edit.how.split()[0] for edit in example.edits]
    assert kinds == {"transport": ["new"]}.get(title, [*kinds[:1], "changed"])
    for edit in example.edits[1:]:
        lines = edit.text.splitlines()
        assert not [line for line in lines if line.startswith("-")]
        assert len([line for line in lines if line.startswith("+    ")]) == 1
        assert len([line for line in lines if line.startswith("+from ")]) == kinds.count("new")
        assert {line[0] for line in lines} <= set(" +@")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with every example applied, and nothing else."""
    folder = pages.copied_package(tmp_path_factory.mktemp("extended"))
    for example in EXAMPLES.values():
        for edit in example.edits:
            edit.apply(folder)
    return folder


def in_the_copy(folder: Path, *words: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_these_files_are_enough_for_the_command(
    extended: Path, bases: dict[str, Path], instructions: Path, tmp_path: Path
) -> None:
    """Method, metric, sampler and accountant by their names, in a run of the copy from the command line."""
    config = tiny.config(bases["llama"], instructions, "glora", federation={"ranks": [1, 2, 4, 8]})
    (tmp_path / "run.toml").write_text(to_toml(config), encoding="utf-8")
    names = [
        "method.name=clipped_flora",
        "method.bound=0.5",
        "data.metric=prefix_match",
        "federation.sampler=cyclic",
        "privacy.accountant=zcdp",
    ]
    settings = [word for name in names for word in ("--set", name)]
    in_the_copy(extended, "-m", "fedspan", "run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "run"), *settings)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["method"], summary["metric"]) == ("clipped_flora", "prefix_match")


@pytest.mark.slow
def test_the_examples_keep_to_the_layers(extended: Path) -> None:
    layers = Path(__file__).parents[1] / "test_layers.py"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(layers.parent)]
    in_the_copy(extended, "-m", "pytest", *options, str(layers), "-k", "downwards or cycles or layer_is")


# A method


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Factory:
    factory: Factory = EXAMPLES["method"].load().clipped_flora
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "clipped_flora": factory})
    return factory


def test_the_method_has_ten_lines() -> None:
    body = EXAMPLES["method"].edits[0].text.split("def clipped_flora")[1].splitlines()[2:]
    assert len([line for line in body if line.strip()]) <= 10


def test_the_method_is_what_it_claims(method: Factory) -> None:
    case = Case("clipped_flora", method)
    fed = build(case, 1, ranks=(2, 3, 1), counts=(3, 1, 2))
    assert distance(received(fed, served(fed)[0]), fed.ideal) > 0.05  # not exact
    other = regauged(fed, lambda k, rank: gauge(np.random.default_rng(k), rank, 1e3))
    assert_same(received(other, served(other)[0]), received(fed, served(fed)[0]), 1e-9)
    # No client's part is above the bound, and a bound that no client reaches changes nothing.
    top = max(np.linalg.norm(value) for value in received(fed, served(fed)[0]).values())
    assert top <= 1.0 + 1e-12
    free = build(Case("free", lambda: method(bound=1e9)), 1, ranks=(2, 3, 1), counts=(3, 1, 2))
    assert_same(received(free, served(free)[0]), free.ideal, 1e-12)


def test_the_method_runs_by_its_name(method: Factory, bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(
        bases["bert"], texts, "clipped_flora", method={"bound": 0.5}, federation={"ranks": [1, 2, 4, 8]}
    )
    result = run(config, tmp_path / "run")
    assert result.summary["method"] == "clipped_flora"
    assert result.adapter is not None
    with pytest.raises(ValueError, match="bound"):
        methods.create("clipped_flora", bound="much")


# A metric


@pytest.fixture
def metric(monkeypatch: pytest.MonkeyPatch) -> Score:
    score: Score = EXAMPLES["metric"].load().prefix_match
    monkeypatch.setitem(METRICS, "prefix_match", Metric(score, "texts", ("instruction",)))
    return score


def test_the_metric_counts_beginnings(metric: Score) -> None:
    assert metric(["Yes.", "yes, it is", "no", "never"], ["yes", "Yes", "no", "no"]) == 0.75
    assert metric(["a b"], ["a  b c"]) == 0.0
    with pytest.raises(ValueError, match="predictions"):
        metric(["a"], [])


def test_the_metric_is_that_of_a_run(
    metric: Score, bases: dict[str, Path], instructions: Path, texts: Path, tmp_path: Path
) -> None:
    """It is never below exact match, and is refused for data without texts."""
    config = tiny.config(bases["llama"], instructions, "fedit", data={"metric": "prefix_match"})
    result = run(config, tmp_path / "run")
    assert result.summary["metric"] == "prefix_match"
    assert all(record["eval"]["prefix_match"] >= record["eval"].get("exact_match", 0.0) for record in result.history)
    with pytest.raises(ValueError, match="prefix_match"):
        run(tiny.config(bases["bert"], texts, "fedit", data={"metric": "prefix_match"}), tmp_path / "refused")


# A client sampler


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = EXAMPLES["client sampler"].load()
    monkeypatch.setattr(sampling, "SAMPLERS", {**sampling.SAMPLERS, "cyclic": module._cyclic})
    return module


@pytest.mark.parametrize(("num_clients", "participation"), [(10, 0.3), (7, 0.5), (4, 1.0), (5, 0.01)])
def test_the_sampler_gives_turns(sampler: ModuleType, num_clients: int, participation: float) -> None:
    cyclic = sampler.CyclicSampler(participation)
    rounds = [cyclic.draw(num_clients, r) for r in range(25)]
    assert all(drawn == sorted(set(drawn)) and len(drawn) == cyclic.expected_size(num_clients) for drawn in rounds)
    counts = Counter(client for drawn in rounds for client in drawn)
    assert max(counts.values()) - min(counts[client] for client in range(num_clients)) <= 1


def test_the_sampler_draws_the_clients_of_a_run(
    sampler: ModuleType, bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = tiny.config(bases["bert"], texts, "fedit", federation={"sampler": "cyclic", "rounds": 4})
    trained: dict[int, set[str]] = {}

    def listen(event: Event) -> None:
        if event.kind == "client":
            trained.setdefault(event.data["round_num"], set()).add(event.data["client_id"])

    run(config, tmp_path / "run", listen)
    first, second = {"client-0", "client-1"}, {"client-2", "client-3"}
    assert trained == {1: first, 2: second, 3: first, 4: second}
    with pytest.raises(ValueError, match="accounting"):
        run(
            tiny.config(
                bases["bert"], texts, "ffa_lora",
                federation={"sampler": "cyclic", "weighting": "equal"}, privacy={"dp": "client"},
            ),
            tmp_path / "private",
        )  # fmt: skip


# A transport


def test_the_transport_ends_with_the_bits_of_a_simulation(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config: Config = tiny.config(
        bases["bert"],
        texts,
        "flora",
        federation={"ranks": [1, 2, 4, 8]},
        engine={"name": "sequential"},
        evaluation={"diagnostics": False, "base": False, "per_rank": False},
    )
    direct = EXAMPLES["transport"].load()
    there: Any = direct.run_with_sites(config, tmp_path / "there")
    here = run(config, tmp_path / "here")
    file = "adapter_model.safetensors"
    assert (there.adapter / file).read_bytes() == (here.adapter / file).read_bytes()
    assert all(record["wire_up"] > 0 for record in there.history)


# An accountant


@pytest.fixture
def accountant(monkeypatch: pytest.MonkeyPatch) -> type:
    pytest.importorskip("dp_accounting")  # to compare with
    made: type = EXAMPLES["accountant"].load().ZCDPAccountant
    monkeypatch.setattr(accounting, "ACCOUNTANTS", {**accounting.ACCOUNTANTS, "zcdp": made})
    return made


def test_the_accountant_bounds_what_the_tight_one_counts(accountant: type) -> None:
    """At q = 1 by less than a half, and below by far, since it does not count on sampling."""
    for z, steps in ((1.0, 1), (2.0, 12), (8.0, 100)):
        tight, loose = (accounting.epsilon(z, 1.0, steps, 1e-5, make) for make in (PLDAccountant, accountant))
        assert tight < loose < 1.5 * tight
        assert accounting.epsilon(z, 0.1, steps, 1e-5, accountant) == loose
    assert accounting.epsilon(2.0, 0.1, 12, 1e-5) < accounting.epsilon(2.0, 0.1, 12, 1e-5, accountant) / 3


def test_the_accountant_counts_a_run(accountant: type, bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(
        bases["bert"],
        texts,
        "ffa_lora",
        federation={"weighting": "equal"},
        privacy={"dp": "client", "noise_multiplier": 4.0, "accountant": "zcdp"},
    )
    spent = [record["epsilon"] for record in run(config, tmp_path / "run").history]
    assert spent == [accounting.epsilon(4.0, 0.5, rounds, 1e-5, accountant) for rounds in (1, 2)]
