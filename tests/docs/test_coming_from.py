"""docs/coming_from.md names settings, aliases, methods and functions that exist, and its code runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pages
import pytest
import tiny
import torch

from fedspan import config as settings
from fedspan.adapters.peft_folder import write_adapter
from fedspan.config import ALIASES
from fedspan.methods import METHODS

PAGE = (pages.DOCS / "coming_from.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| `([\w.]+)(?: = [^`]+)?` \| (?:`([\w.]+)`)? ?\|$", PAGE, flags=re.MULTILINE)


def test_every_alias_is_in_its_row_and_means_the_same_setting() -> None:
    rows = {alias: (theirs, ours) for theirs, ours, alias in ROWS if alias}
    assert {alias: ours for alias, (_, ours) in rows.items()} == {
        alias: ours for alias, ours in ALIASES.items() if alias != "federation.rank"  # our own
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


def test_the_code_runs(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters are merged, a strategy starts, and a round is aggregated."""
    pytest.importorskip("flwr")
    model = tiny.load(bases["llama"], "instruction")
    for k, name in enumerate(("alice", "bob")):
        adapter = tiny.random_adapter(model, 4, k, scaling=2.0)
        write_adapter(tmp_path / name, adapter, base=str(bases["llama"]), alpha=8.0)
    monkeypatch.chdir(tmp_path)
    results = [pages.run(block) for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)]
    merged, strategy, round_ = results
    assert merged["report"].rank == 8
    assert (tmp_path / "merged" / "adapter_config.json").exists()
    assert strategy["arrays"].keys()
    assert round_["adapter"]["layer"].rank == 2
    assert torch.isfinite(round_["adapter"]["layer"].b).all()
