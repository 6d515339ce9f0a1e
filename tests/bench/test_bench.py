"""`fedspan bench`: what is timed, how it is kept, and that tables say what was measured. No time is asserted."""

from __future__ import annotations

import gc
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedspan.bench import (
    clients_suite,
    galore_suite,
    harness,
    machine,
    pool_worker,
    rounds_suite,
    scaling_suite,
    server_suite,
    suites,
    table,
    tiny,
)
from fedspan.bench.harness import Arm, Bench, Floor, Options, Timed
from fedspan.bench.rounds_suite import Program
from fedspan.cli import main
from fedspan.methods import METHODS
from fedspan.models import load_processor
from fedspan.support.errors import FedspanError

CASE = {"size": 3}
TINY: dict[str, Any] = {
    "server": lambda quick: [(24, 2, 3)],
    "clients": lambda quick: [{"hidden": 32, "batch": 1, "K": 2, "ranks": "2-16", "steps": 1}],
    "scaling": lambda quick: [{"d": 24, "r": 2, "layers": 2, "K": 5}],
    "galore": lambda quick: [(24, 16, 2)],
}
EXPERIMENT = {"clients": 2, "rounds": 1, "steps": 1, "batch": 2, "hidden": 64, "r": 2}


@pytest.fixture(scope="module", autouse=True)
def small_ceilings() -> Iterator[None]:
    """Shrink the measurement of the machine's rates, which is frequent here and of no interest.

    And keep what the libraries hold out of the collection of garbage before every call of an arm.
    """
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "_READ", 2**16)
        patch.setattr(machine, "_GEMM", 64)
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All suites at tiny sizes, the grids and the choice of engines replaced."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (server_suite, clients_suite, scaling_suite, galore_suite):
            patch.setattr(module, "_grid", TINY[module.SUITE])
        patch.setattr(rounds_suite, "_case", lambda quick: EXPERIMENT)
        patch.setattr(rounds_suite, "_engines", lambda options: [("cohort", 1)])
        yield tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def options(folder: Path) -> Options:
    return Options(folder, quick=True, repeat=1, budget=30.0, processes=1, peers=folder)


@pytest.fixture(scope="module")
def records(options: Options) -> list[dict[str, Any]]:
    suites.run((), options, lambda line: None)
    return harness.read_results(options.out / "results.jsonl")


def arms(records: list[dict[str, Any]], suite: str) -> set[str]:
    return {r["arm"] for r in records if r["suite"] == suite and r["median"] is not None}


@pytest.mark.long
def test_every_suite_measures_every_arm(records: list[dict[str, Any]]) -> None:
    adapter = {n for n, f in METHODS.items() if f().info.trains == "adapter" and not f().info.personalised}
    adapter -= {n for n, f in METHODS.items() if f().info.pooled or len(f().exchanges) > 1}
    assert arms(records, "server") == adapter | set(server_suite.PEERS)
    assert arms(records, "clients") == {"plain", "trainer", "sequential", "cohort"}
    assert arms(records, "rounds") == {"fedspan cohort x1"}
    assert arms(records, "scaling") == set(scaling_suite.ARMS)
    assert arms(records, "galore") == {"adamw", "galore", "exact", "randomized", "power"}


@pytest.mark.long
def test_a_measurement_is_complete(records: list[dict[str, Any]]) -> None:
    for r in records:
        assert {"suite", "case", "arm", "median", "quick", "machine", "details"} <= r.keys()
        assert {"cpu", "cores", "bandwidth", "gemm", "torch", "dtype", "threads"} <= r["machine"].keys()
        if r["median"] is not None:
            assert 0 < r["min"] <= r["median"] <= r["max"]
            assert isinstance(r["reliable"], bool)
    with_floor = [r for r in records if r["suite"] in ("server", "galore") and r["median"] is not None]
    assert all(r["floor_seconds"] > 0 for r in with_floor)


@pytest.mark.long
def test_arms_that_must_agree_do(records: list[dict[str, Any]]) -> None:
    agreeing = [r for r in records if "agrees" in r["details"]]
    assert {r["suite"] for r in agreeing} == {"server", "clients", "rounds", "scaling"}
    assert [r["arm"] for r in agreeing if not r["details"]["agrees"]] == []
    exact = {r["arm"]: r["details"]["distance"] for r in agreeing if r["suite"] == "server"}
    assert max(exact[name] for name in ("flexlora", "peft_svd", "flora", "fedex_lora", "peft_cat")) < 1e-4


@pytest.mark.long
def test_a_skipped_arm_says_why(records: list[dict[str, Any]]) -> None:
    reasons = {r["arm"]: r["skipped"] for r in records if r.get("skipped")}
    assert reasons["flower x1"] == "no --flower-python was given"
    assert reasons["plain loop x1"] == "plain.py is not in --peers"


@pytest.mark.long
def test_galore_state_is_what_its_formula_says(records: list[dict[str, Any]]) -> None:
    sizes = {r["arm"]: r["details"] for r in records if r["suite"] == "galore" and "state_bytes" in r["details"]}
    assert {name: d["state_bytes"] for name, d in sizes.items()} == {"adamw": 4 * 2 * 24 * 16, "galore": 4 * 2 * 64}
    assert all(d["state_bytes"] == d["formula_bytes"] for d in sizes.values())


@pytest.mark.long
def test_what_is_measured_is_not_measured_again(
    records: list[dict[str, Any]], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything prepared for it: no process is started, no factor drawn."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done before")

    for place, name in ((subprocess, "Popen"), (subprocess, "run"), (server_suite.Case, "draw"), (torch, "randn")):
        monkeypatch.setattr(place, name, never)
    before = (options.out / "results.jsonl").read_bytes()
    suites.run((), options, lambda line: None)
    assert (options.out / "results.jsonl").read_bytes() == before


def test_cases_can_be_chosen(bench: Bench) -> None:
    """By the values of their keys; a case that lacks the key is not left out."""
    bench.options = replace(bench.options, only={"d": frozenset({"2", "3"})})
    for d, chosen in ((2, True), (4, False)):
        assert bool(bench.missing("server", {"d": d}, ["x"])) is chosen
        bench.measure("server", {"d": d}, [Arm("x", lambda: None)])
        assert (bench.known("server", {"d": d}, "x") is not None) is chosen
    assert bench.missing("clients", {"K": 1}, ["x"])


def test_a_choice_of_no_case_is_refused_with_the_values_that_there_are(bench: Bench) -> None:
    bench.options = replace(bench.options, only={"d": frozenset({"3"})})
    for d in (2, 4):
        bench.measure("server", {"d": d}, [Arm("x", lambda: None)])
    with pytest.raises(FedspanError, match="--only d=3: no case has this value; expected one of 2, 4"):
        bench.check_choice()
    bench.measure("server", {"d": 3}, [Arm("x", lambda: None)])
    bench.check_choice()


@pytest.mark.long
def test_the_keys_that_can_be_chosen_are_those_of_the_cases(records: list[dict[str, Any]]) -> None:
    for name, keys in suites.CASE_KEYS.items():
        assert {key for r in records if r["suite"] == name for key in r["case"]} == set(keys)


@pytest.mark.long
def test_other_effort_or_machine_is_measured_again(records: list[dict[str, Any]], options: Options) -> None:
    full = Bench(Options(options.out, quick=False), lambda line: None)
    case = next(r["case"] for r in records if r["suite"] == "galore")
    assert full.missing("galore", case, ["adamw", "galore"]) == ["adamw", "galore"]
    same = Bench(options, lambda line: None)
    assert same.missing("galore", case, ["adamw", "galore", "new"]) == ["new"]


@pytest.mark.long
def test_the_table_is_made_of_the_measurements(records: list[dict[str, Any]]) -> None:
    """Each ratio is the baseline's median over the arm's own, and follows the file."""
    changed = json.loads(json.dumps(records))
    for r in changed:
        if r["suite"] == "galore" and r["case"]["phase"] == "step":
            r["median"] = {"adamw": 0.5, "galore": 0.125}[r["arm"]]
            r["reliable"] = r["arm"] != "galore"
    text = table.render(changed)
    assert re.search(r"\| m=24 n=16 r=2 \| 500 ms \(1×\) \| ~125 ms \(4×\) \|", text)
    assert "no --flower-python was given" in text
    assert all(section.title in text for section in table.SECTIONS.values())
    next(r for r in changed if r["arm"] == "adamw")["details"]["agrees"] = False
    assert "| ≠500 ms (1×) |" in table.render(changed)


@pytest.mark.long
def test_pictures_are_drawn(records: list[dict[str, Any]], options: Options) -> None:
    pytest.importorskip("matplotlib")
    assert {path.name for path in suites.write(options.out, lambda line: None)} == {
        "table.md",
        *(f"{suite}.png" for suite in suites.SUITES),
    }


@pytest.mark.long
def test_without_matplotlib_that_is_said(
    records: list[dict[str, Any]], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    assert [path.name for path in suites.write(options.out, said.append)] == ["table.md"]
    assert len(said) == 1
    assert "matplotlib" in said[0]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A harness on an idle machine, whose clock goes by what arms say."""
    monkeypatch.setattr(machine, "calibration", lambda device: 0.01)
    return Bench(Options(tmp_path, quick=True, repeat=3, budget=10.0), lambda line: None)


class Work:
    """An arm that takes the seconds it is agreeing, and remembers who was called when."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def arm(self, name: str, *seconds: float, **more: Any) -> Arm:
        left = list(seconds)

        def run() -> Timed:
            self.log.append(name)
            return Timed(left.pop(0) if len(left) > 1 else left[0], name)

        return Arm(name, run, **more)


def test_arms_take_turns_after_a_warm_up(bench: Bench) -> None:
    log: list[str] = []
    work = Work(log)
    bench.measure("s", CASE, [work.arm("a", 9.0 / 4, 2.0, 1.0, 0.5), work.arm("b", 1.0)], floor=Floor(1e9, 0))
    assert log == ["a", "b"] * 4
    first = harness.read_results(bench.path)[0]
    assert (first["median"], first["min"], first["max"], first["repeats"]) == (1.0, 0.5, 2.0, 3)
    assert first["floor_seconds"] == pytest.approx(1e9 / bench.machine.bandwidth)


def test_an_arm_is_timed_as_often_as_its_budget_allows(bench: Bench) -> None:
    work = Work([])
    bench.measure(
        "s", CASE, [work.arm("once", 8.0), work.arm("twice", 3.0, per=2.0), work.arm("never", 1.0, expected=11)]
    )
    found = {r["arm"]: r for r in harness.read_results(bench.path)}
    assert (found["once"]["repeats"], found["twice"]["repeats"]) == (1, 2)
    assert found["twice"]["median"] == 1.5
    assert found["never"]["median"] is None
    assert "11 s" in found["never"]["skipped"]


def test_a_busy_machine_shows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.measure("s", CASE, [Work([]).arm("a", 1.0)])
    monkeypatch.setattr(machine, "calibration", lambda device: 0.012)
    bench.measure("s", {"size": 4}, [Work([]).arm("a", 1.0)])
    idle, busy = harness.read_results(bench.path)
    assert idle["reliable"]
    assert not busy["reliable"]
    assert busy["drift"] == pytest.approx(0.2)
    again = Bench(replace(bench.options, redo=True), lambda line: None)
    assert again.missing("s", {"size": 4}, ["a"]) == ["a"]
    assert again.missing("s", CASE, ["a"]) == []


def test_an_interrupted_bench_goes_on(bench: Bench) -> None:
    """A half-written line is dropped; whole ones are kept and their arms not called again."""
    log: list[str] = []
    bench.measure("s", CASE, [Work(log).arm("a", 1.0)])
    whole = bench.path.read_text()
    bench.path.write_text(whole + whole[: len(whole) // 2])
    again = Bench(bench.options, lambda line: None)
    assert bench.path.read_text() == whole
    log.clear()
    again.measure("s", CASE, [Work(log).arm("a", 1.0), Work(log).arm("b", 1.0)])
    assert set(log) == {"b"}
    bench.path.write_text("{nothing\n" + whole)
    with pytest.raises(ValueError, match="damaged"):
        Bench(bench.options, lambda line: None)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9), st.floats(1e-3, 1e3))
def test_ratios_do_not_depend_on_the_unit(times: list[float], unit: float) -> None:
    case = [{"arm": str(i), "median": t} for i, t in enumerate(times)]
    scaled = [{"arm": str(i), "median": t * unit} for i, t in enumerate(times)]
    for record, other in zip(case, scaled, strict=True):
        value = table.ratio(record, case, ("none", "0"), lambda r: r["median"])
        assert value == pytest.approx(times[0] / record["median"])
        assert table.ratio(other, scaled, ("none", "0"), lambda r: r["median"]) == pytest.approx(value)


def test_sequences_survive_the_tokenizer(tmp_path: Path) -> None:
    """The library trains on exactly the tokens that the peers are given."""
    from fedspan.bench.local import encoded

    tokens = tiny.tokens(5, 12, "a")
    batch = encoded(str(tiny.llama(tmp_path / "base", 32, 1)), tokens).batch(range(5))
    assert torch.equal(batch["input_ids"], tokens)
    assert torch.equal(batch["labels"][:, 1:], tokens[:, 1:])
    assert int(batch["attention_mask"].min()) == 1
    assert load_processor(str(tmp_path / "base"), "instruction").eos_token_id == tiny.END


def test_a_pool_worker_reports_what_went_wrong(tmp_path: Path) -> None:
    answers = io.StringIO()
    pool_worker.serve(torch.device("cpu"), ['{"op": "calibrate"}'], answers)
    assert json.loads(answers.getvalue())["seconds"] > 0
    base = str(tmp_path / "nowhere")
    case = {"base": base, "batch": 1, "steps": 1, "length": 8, "num_clients": 1, "ranks": [2]}
    requests = [json.dumps({"op": "prepare", "case": case, "arm": "cohort"})]
    with pytest.raises(ValueError, match="could not be read"):
        pool_worker.serve(torch.device("cpu"), requests, answers)


def test_a_failing_program_is_named_with_its_last_words(tmp_path: Path) -> None:
    program = Program("other", (sys.executable, "-c", "raise SystemExit('no such model')"))
    with pytest.raises(ValueError, match="other ended with code 1: no such model"):
        rounds_suite._execute(program, tmp_path, Options(tmp_path), [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["servr"], "unknown suite 'servr'"),
        (["--repeat", "0"], "--repeat 0: expected at least 1"),
        (["--budget", "-1"], "--budget -1.0: expected seconds above 0"),
        (["--device", "abacus"], "--device 'abacus'"),
        (
            ["server", "--only", "hidden=64"],
            "--only hidden=64: no case of server has 'hidden'; expected one of K, d, phase, r",
        ),
    ],
)
def test_mistakes_are_answered_at_once(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["bench", *words, "--out", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
