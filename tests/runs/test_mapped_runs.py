"""Laws of whole runs over a base on several devices: results, the choice of the engine, and what cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lazy_device
import pytest
import tiny
import torch
from lazy_device import LAZY
from safetensors.torch import load_file

from fedspan.client.executors import num_worker_processes
from fedspan.config import Config, EngineConfig, load, to_toml
from fedspan.display.check import check_lines
from fedspan.distributed.environment import Place
from fedspan.federation import requirements
from fedspan.runs.check import check
from fedspan.runs.distributed import _check
from fedspan.runs.events import Event
from fedspan.runs.execution import resume, run
from fedspan.support.errors import FedspanError

TABLE = {
    **{"model.embed_tokens": LAZY, "model.layers.0": LAZY, "model.layers.1": "cpu"},
    **{"model.norm": "cpu", "lm_head": "cpu"},
}
REASON = "the base's layers lie on several devices (engine.device_map)"


@pytest.fixture(autouse=True)
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    lazy_device.begin()
    lazy_device.plain_optimizers(monkeypatch)


def configured(
    bases: dict[str, Path],
    instructions: Path,
    method: str = "fedit",
    federation: Mapping[str, Any] | None = None,
    **engine: Any,
) -> Config:
    evaluation = {"base": False, "max_examples": 4, "max_new_tokens": 1}
    options = {"device_map": TABLE, **engine}
    return tiny.config(
        bases["llama"], instructions, method, federation=federation or {}, evaluation=evaluation, engine=options
    )


@pytest.mark.parametrize("method", ["fedit", "fedavg"])
def test_a_run_ends_with_what_it_ends_with_on_one_device(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, method: str
) -> None:
    """The saved adapter or model, the figures, and the engine that was chosen, with its reason."""
    seen: list[Event] = []
    whole = configured(bases, instructions, method, device_map="none", name="sequential")
    results = [
        run(whole, tmp_path / "whole"),
        run(configured(bases, instructions, method), tmp_path / "parts", seen.append),
    ]
    wanted, found = (
        load_file(next(file for part in ("adapter", "model") for file in (r.out / part).glob("*.safetensors")))
        for r in results
    )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= 2e-3 * float(value.norm()), name
    losses = [[record["train_loss"] for record in r.history] for r in results]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    start = next(event for event in seen if event.kind == "start")
    assert (start.data["engine"], start.data["reason"]) == ("sequential", REASON)
    notes = [event.data["line"] for event in seen if event.kind == "note"]
    assert any("on several devices, which work in turn: lazy:0: model.embed_tokens" in note for note in notes)


def test_a_run_over_several_devices_goes_on_over_one(
    bases: dict[str, Path], instructions: Path, tmp_path: Path
) -> None:
    """Its base has the same digest, and its checkpoint says nothing of devices."""
    federation = {"rounds": 1, "num_clients": 2, "participation": 1.0}
    parts = configured(bases, instructions, federation=federation)
    run(parts, tmp_path / "run")
    whole = configured(bases, instructions, federation={**federation, "rounds": 2}, device_map="none")
    (tmp_path / "run" / "config.toml").write_text(to_toml(whole))
    losses = [record["train_loss"] for record in resume(tmp_path / "run").history]
    assert losses == pytest.approx(
        [record["train_loss"] for record in run(whole, tmp_path / "whole").history], rel=1e-3
    )


def test_a_check_says_where_the_layers_will_lie(bases: dict[str, Path], instructions: Path) -> None:
    found = check(configured(bases, instructions, workers="auto"))
    assert (found.device, found.workers) == ("lazy:0 and cpu", 1)
    assert found.engine == "sequential"
    assert found.reason == REASON
    assert any("lazy:0: model.embed_tokens, model.layers.0 (" in note for note in found.notes)
    assert list(check_lines(found))


def test_a_cohort_is_refused(bases: dict[str, Path], instructions: Path, tmp_path: Path) -> None:
    with pytest.raises(FedspanError, match=r"^engine\.name = 'cohort': the base's layers lie on several devices"):
        run(configured(bases, instructions, name="cohort"), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"engine": {"compile": True}}, "engine.compile with engine.device_map: a compiled pass stays on one device"),
        ({"engine": {"workers": 2}}, "engine.workers = 2 with engine.device_map: one process leads all devices"),
        ({"privacy": {"dp": "example"}}, "privacy.dp = 'example' with engine.device_map: the gradients of single"),
        ({"device": "cpu"}, "device = 'cpu' with engine.device_map, which names the devices; expected 'auto'"),
        (
            {"engine": {"device_map": {"": 1, "lm_head": "cuda:1"}}},
            "engine.device_map names 1 device: expected two or more, or device = 'cuda:1' without it",
        ),
        (
            {"engine": {"device_map": {"": "cpu", "lm_head": "cpu:1"}}},
            "engine.device_map names 1 device: expected two or more, or device = 'cpu' without it",
        ),
        ({"engine": {"device_map": "auto"}, "device": "cuda:1"}, "device = 'cuda:1' with engine.device_map = 'auto'"),
    ],
)
def test_what_a_base_on_several_devices_cannot_have_is_refused_before_anything_is_read(
    bases: dict[str, Path], instructions: Path, changes: dict[str, Any], line: str
) -> None:
    engine = {"device_map": TABLE, "workers": 1, **changes.get("engine", {})}
    config = tiny.config(bases["llama"], instructions, "fedit", **{**changes, "engine": engine})
    with pytest.raises(FedspanError) as caught:
        requirements.chosen(config)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_check_refuses_the_processes_that_the_run_would_refuse(
    bases: dict[str, Path], instructions: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedspanError, match=r"^engine\.workers = 2 with engine\.device_map"):
        check(configured(bases, instructions, workers=2), tmp_path / "run")


def test_processes_of_torchrun_have_a_base_each(bases: dict[str, Path], instructions: Path) -> None:
    with pytest.raises(
        FedspanError, match=r"^engine\.device_map in a run of 2 processes of torchrun: .*expected 'none'"
    ):
        _check(configured(bases, instructions), Place(0, 2, 0))


@pytest.mark.parametrize("value", ['"all"', "true", "2", "{lm_head = -1}", "{lm_head = true}", "{lm_head = 1.5}"])
def test_a_value_of_another_kind_is_refused(value: str) -> None:
    with pytest.raises(
        FedspanError, match=r"^engine\.device_map = .*: (expected none, auto, or a table|input should not)"
    ):
        load(None, [f"engine.device_map={value}"])


def test_names_without_quotes_are_answered_with_how_to_write_them() -> None:
    with pytest.raises(FedspanError, match=r"names in quotes.* in TOML such as \{\"model\.embed_tokens\" = 0, "):
        load(None, ["engine.device_map={model.embed_tokens = 0}"])


def test_a_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    config = load(None, ['engine.device_map={"model.embed_tokens" = 0, "model.layers.0" = "cuda:1"}'])
    assert config.engine.device_map == {"model.embed_tokens": 0, "model.layers.0": "cuda:1"}
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load(tmp_path / "config.toml") == config


def test_one_process_leads_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cuda = torch.device("cuda")
    assert num_worker_processes(EngineConfig(device_map="auto"), 1, cuda, 100) == 1
    assert num_worker_processes(EngineConfig(device_map=TABLE), 1, cuda, 100) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert num_worker_processes(EngineConfig(device_map="auto"), 1, cuda, 100) == 1
    assert num_worker_processes(EngineConfig(device_map="auto"), 1, torch.device("cpu"), 2) <= 2
