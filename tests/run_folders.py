"""Run folders, compared and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fedspan.config import Config
from fedspan.config import load as load_config
from fedspan.data import load as load_data
from fedspan.federation.clients import make_clients
from fedspan.methods import METHODS
from fedspan.runs import checkpoint
from fedspan.runs.events import Event
from fedspan.runs.execution import Result

NAMES = sorted(METHODS)
ONE_OF_EACH_KIND = {
    *("centralised", "local", "fedavg", "fedftg", "scaffold", "shared_galore"),
    *("fedit", "ffa_lora", "fedsa_lora", "hetlora", "flora", "fedex_lora", "fed_sb", "ravan", "fedadamw"),
    *("glora", "glora_plus", "glora_sums"),
}
"""Methods that between them send, keep and broadcast everything that any method does. In tests of whole runs the
others, whose server rules the laws check, have the mark `long`."""
TIMINGS = ("server_seconds", "client_seconds", "train_wall_seconds", "peak_server_bytes")


RECORD = {
    "round_num",
    "method",
    "num_clients",
    "train_loss",
    "eval",
    "bytes_up",
    "bytes_down",
    "server_seconds",
    "client_seconds",
    "train_wall_seconds",
    "peak_server_bytes",
    "rejected",
}


def trains(name: str) -> str:
    return METHODS[name]().info.trains


def strict(text: str) -> Any:
    """JSON that every parser reads: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMINGS}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the server's state in the checkpoint of a run folder."""
    return tiny.state_tensors(checkpoint.read(folder / "checkpoint" / "federation.safetensors").state)


def same_outcome(x: Path, y: Path) -> None:
    """The same bits in the adapter or model, and the same figures, except for the time and memory they took."""
    for part in ("adapter", "model"):
        assert (x / part).exists() == (y / part).exists()
        for file in sorted((x / part).glob("*.safetensors")):
            tiny.same(load_file(file), load_file(y / part / file.name))
        for file in sorted((x / part).glob("*.json")):
            assert file.read_bytes() == (y / part / file.name).read_bytes()
    lines = [[untimed(strict(line)) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (x, y)]
    assert lines[0] == lines[1]
    summaries = [strict((d / "summary.json").read_text()) for d in (x, y)]
    for summary in summaries:
        for key in (*TIMINGS, "wall_seconds"):
            del summary["totals"][key]
    assert summaries[0] == summaries[1]
    for file in (x / "checkpoint").iterdir():
        one, other = (checkpoint.read(d / "checkpoint" / file.name) for d in (x, y))
        tiny.same_state(one.state, other.state)
        assert one.seen == other.seen
        assert one.client_states.keys() == other.client_states.keys()
        for client, kept in one.client_states.items():
            tiny.same(kept, other.client_states[client])
    assert (x / "config.toml").read_bytes() == (y / "config.toml").read_bytes()


def check_folder(result: Result, config: Config) -> None:
    out, name = result.out, config.method["name"]
    info = METHODS[name]().info
    assert load_config(out / "config.toml") == config
    records = [strict(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["round_num"] for r in records] == list(range(1, config.federation.rounds + 1))
    for record in records:
        assert record.keys() >= RECORD
        assert record["method"] == name
        assert record["num_clients"] == (1 if info.pooled else 2)
        assert record["rejected"] == {}
        assert record["train_loss"] > 0
    assert set(records[-1]["eval"]) >= {"loss"}
    weights = out / ("adapter/adapter_model.safetensors" if info.trains == "adapter" else "model/model.safetensors")
    assert weights.exists() != info.personalised
    assert result.adapter == (out / "adapter" if info.trains == "adapter" and not info.personalised else None)
    assert (out / "checkpoint" / "federation.safetensors").exists()
    assert not list(out.rglob("*.partial"))
    summary = strict((out / "summary.json").read_text())
    assert summary["method"] == name
    assert summary["higher_is_better"] is True
    for key in ("base", "federated"):
        assert 0 <= summary[key] <= 1
    assert summary["seed"] == config.seed
    assert set(summary["versions"]) >= {"fedspan", "torch", "transformers", "peft"}
    assert summary["totals"]["bytes_up"] == sum(r["bytes_up"] for r in records)
    assert [c["rank"] for c in summary["clients"]] == [c.rank for c in clients_of(config)]


def clients_of(config: Config) -> list[Any]:
    corpus = load_data(config.data, config.seed)
    return make_clients(corpus, config.federation, config.seed, config.data.client_holdout)


class Stop(Exception):
    """What ends a run from outside."""


class StopAt:
    """Ends a run at its `count`-th event."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.last = ""

    def __call__(self, event: Event) -> None:
        self.last = f"{event.kind} {event.data.get('phase', '')}".strip()
        self.left -= 1
        if self.left == 0:
            raise Stop(self.last)


TIMES = ("server_seconds", "client_seconds", "train_wall_seconds", "peak_server_bytes", "wall_seconds")


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves behind but times: files by their bytes, figures, the states of all clients."""
    found: dict[str, Any] = {
        str(file.relative_to(folder)): file.read_bytes()
        for part in ("adapter", "model")
        for file in sorted((folder / part).rglob("*"))
        if file.is_file()
    }
    found["metrics"] = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["summary"] = timeless(json.loads((folder / "summary.json").read_text()))
    for file in sorted((folder / "checkpoint").iterdir()):
        for name, tensor in load_file(file).items():
            found[f"{file.name}/{name}"] = (str(tensor.dtype), tensor.shape, tensor.numpy().tobytes())
        saved = checkpoint.read(file)
        found[f"{file.name}/seen"] = saved.seen
    return found


def of_each_kind(names: Iterable[str]) -> list[Any]:
    """The names as parameters, all but one of each kind with the mark `long`."""
    return [name if name in ONE_OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long) for name in names]
