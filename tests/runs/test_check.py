"""`run --check`: what it says beside what the run then does, and that it leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny

from fedspan.cli.main import main
from fedspan.config import Config
from fedspan.runs.check import check
from fedspan.runs.execution import run

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "glora": ("glora", {}),
    "flora": ("flora", {}),
    "hetlora": ("hetlora", {}),
    "ffa_lora": ("ffa_lora", {"federation": {"ranks": 2}}),
    "two_exchanges": ("glora_sums", {}),
    "secure_sums": ("glora_sums", {"privacy": {"secure_sums": True}}),
    "dp_examples": ("glora", {"privacy": {"dp": "example", "noise_multiplier": 1.0, "clip": 1.0}}),
    "dp_clients": (
        "ffa_lora",
        {"federation": {"ranks": 2, "weighting": "equal"}, "privacy": {"dp": "client", "noise_multiplier": 1.0}},
    ),
    "gradient_first": ("fed_sb", {"federation": {"ranks": 2}}),
    "whole_weights": ("fedftg", {}),
    "personalised": ("fedsa_lora", {"federation": {"ranks": 2}}),
    "pooled": ("centralised", {}),
    "half_precision": ("glora", {"wire": {"up": "bfloat16", "down": "bfloat16"}}),
}


def settings(bases: dict[str, Path], texts: Path, name: str, more: dict[str, Any]) -> Config:
    sections: dict[str, Any] = {**more}
    sections["federation"] = {
        "partition": "iid", "num_clients": 4, "ranks": [1, 2, 3, 2], "participation": 1.0, "rounds": 1,
        **more.get("federation", {}),
    }  # fmt: skip
    return tiny.config(bases["bert"], texts, name, **sections)


@pytest.mark.parametrize("case", METHODS)
def test_what_it_says_is_what_the_run_does(bases: dict[str, Path], texts: Path, tmp_path: Path, case: str) -> None:
    """Rows, clients, parameters and the first round's bytes, to the byte."""
    config = settings(bases, texts, *METHODS[case])
    before = sorted(os.listdir(tmp_path))
    found = check(config, tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == before
    result = run(config, tmp_path / "run")
    record, summary = result.history[0], result.summary
    assert found.bytes_up == record["bytes_up"]
    assert found.bytes_down == record["bytes_down"]
    assert [(c["client_id"], c["rank"], c["num_examples"]) for c in summary["clients"]] == list(found.clients)
    assert found.data["rows"] == summary["data"]["rows"]
    assert found.client_memory > 0
    assert found.server_memory > 0
    assert found.client_steps > 0
    assert found.seconds > 0


def test_partly_sampled_rounds_are_expected_rounds(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Half of the clients: half of the bytes of all of them."""
    whole = settings(bases, texts, "glora", {})
    half = settings(bases, texts, "glora", {"federation": {"participation": 0.5}})
    every, some = check(whole, tmp_path / "a"), check(half, tmp_path / "b")
    assert some.clients_a_round == 2
    assert some.bytes_up == every.bytes_up / 2
    assert some.client_steps == every.client_steps / 2


def test_validation_rows_are_evaluated_too(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a second for all test rows: those of the end, and in each of 4 rounds these and the validation rows."""
    monkeypatch.setattr("fedspan.runs.check._Trial._evaluation_seconds", lambda trial: 1.0)
    more = {"federation": {"rounds": 4}, "data": {"validation": 0.5}, "evaluation": {"base": False}}
    found = check(settings(bases, texts, "glora", more), tmp_path / "a")
    rows = found.data["rows"]
    assert rows["validation"] > 0
    assert found.evaluation_seconds == pytest.approx(1 + 4 * (1 + rows["validation"] / rows["test"]))


def test_the_command_prints_it_and_leaves_nothing(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = ["data.task=files", f"data.train={texts}", f"model.name={bases['bert']}", "federation.partition=iid"]
    sets += ["federation.num_clients=20", "federation.ranks=2", "data.max_train=20"]
    arguments = [part for one in sets for part in ("--set", one)]
    assert main(["run", "--check", *arguments]) == 0
    printed = capsys.readouterr().out
    for part in ("rows:", "trained", "20 clients", "up ", "in all", "engine", "about", "12 of the 20 clients", "█"):
        assert part in printed
    assert os.listdir(tmp_path) == []


def test_settings_alone_are_checked_without_data(capsys: Any) -> None:
    assert main(["config", "--check"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["config", "--check", "--set", "privacy.secure_sums=true", "--set", "method.name=flexlora"]) == 2
    assert "flexlora" in capsys.readouterr().err
