"""docs/coming_from.md names settings, aliases, methods and functions that exist, and its code runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pages
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

import fedspan
from fedspan import config as settings
from fedspan.config import ALIASES
from fedspan.methods import METHODS
from fedspan.support.seeding import generator

PAGE = (pages.DOCS / "coming_from.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| `(\w+)` \| `([\w.]+)(?: = [^`]+)?` \| (?:`([\w.]+)`)? ?\|$",
    PAGE.split("## OpenFedLLM")[0],
    flags=re.MULTILINE,
)

OUR_OWN = {"federation.rank", "data.metric", "evaluation.metric", "evaluation.metrics", "local.head_lr"}


def test_every_alias_is_in_its_row_and_means_the_same_setting() -> None:
    rows = {alias: (theirs, ours) for theirs, ours, alias in ROWS if alias}
    assert {alias: ours for alias, (_, ours) in rows.items()} == {
        alias: ours for alias, ours in ALIASES.items() if alias not in OUR_OWN
    }
    for alias, (theirs, _) in rows.items():
        assert alias.split(".")[1] == theirs


def test_settings_blocks_load() -> None:
    """And the names of other libraries in them come out as ours."""
    blocks = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        tree = tomllib.loads(block)
        config = settings.from_mapping(tree).model_dump()
        for section, values in tree.items():
            for name, value in values.items():
                our_section, our_name = ALIASES.get(f"{section}.{name}", f"{section}.{name}").split(".")
                loaded = config[our_section][our_name]
                assert loaded in (value, (value,), tuple(value) if isinstance(value, list) else value)


def test_methods_and_filters_exist() -> None:
    row = re.search(r"^\| `FedAvg`, .*? \| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert row is not None
    assert set(re.findall(r"`(\w+)`", row[1])) <= set(METHODS)
    for name in re.findall(r"--method (\w+)", PAGE):
        assert name in METHODS


def small_model(rank: int) -> Any:
    """A Llama with an adapter of its own."""
    lora = LoraConfig(
        r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return get_peft_model(tiny.make("llama"), lora)


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers over two rounds, a merge of two folders, a strategy, and a round in plain functions."""
    pytest.importorskip("flwr")
    monkeypatch.chdir(tmp_path)
    server, confined, merge, strategy, plain = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)

    trained = []

    def train(model: Any) -> None:
        trained.append(model)
        with torch.no_grad():
            for k, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator("train", len(trained), k))

    models = {"a": small_model(4), "b": small_model(8)}
    names = pages.run(server, models=models, train=train)
    assert len(trained) == 4
    assert names["report"].round_num == 2
    assert names["report"].weights == pytest.approx({"a": 300 / 420, "b": 120 / 420})
    assert fedspan.Server.load("server.safetensors").round_num == 2

    ids = torch.arange(40).reshape(4, 10)
    alike = {"a": small_model(8), "b": small_model(8)}
    shared = {"fedspan": fedspan} | {key: names[key] for key in names if key.endswith("_peft_model_state_dict")}
    batches = {name: [{"input_ids": ids + k, "labels": ids + k} for k in range(5)] for name in alike}
    names = pages.run(confined, models=alike, train=train, batches=batches, **shared)
    assert (names["report"].round_num, names["server"].asks) == (2, "train")
    assert any(t.any() for key, t in names["server"].adapter().items() if "lora_A" in key)

    models["a"].save_pretrained("alice")
    models["b"].save_pretrained("bob")
    assert pages.run(merge)["report"].rank == 8
    assert (tmp_path / "merged" / "adapter_config.json").exists()

    assert len(pages.run(strategy)["arrays"]) == 2
    adapter = pages.run(plain)["adapter"]
    assert adapter["layer"].rank == 2
    assert torch.isfinite(adapter["layer"].b).all()
