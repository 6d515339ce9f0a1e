"""`~` is the home folder in every path, also where no shell has put it in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from fedspan.cli.main import main
from fedspan.config import load
from fedspan.models.base_facts import read_facts
from fedspan.models.loading import load_processor


def adapter(folder: Path, rank: int) -> None:
    folder.mkdir()
    module = "base_model.model.layer.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(rank, 6), f"{module}.lora_B.weight": torch.ones(5, rank)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize("out", [["--out=~/merged"], ["--out", "~/merged"]])
def test_paths_of_the_command_line(home: Path, out: list[str]) -> None:
    for name, rank in (("a", 2), ("b", 3)):
        adapter(home / name, rank)
    assert main(["merge", "~/a", "~/b", "--method", "flora", "--base=~/base", *out]) == 0
    config = json.loads((home / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "base")
    assert list((home / "elsewhere").iterdir()) == []


def test_a_base_in_the_home_folder(home: Path, bases: dict[str, Path]) -> None:
    (home / "bert").symlink_to(bases["bert"])
    assert read_facts("~/bert").encoder == "bert"
    assert load_processor("~/bert", "classification").pad_token_id == tiny.ENDS["pad_token_id"]


def test_settings_beside_a_file_are_still_found(home: Path) -> None:
    (home / "a.csv").write_text("text,label\na,b\n")
    (home / "run.toml").write_text('[data]\ntrain = "~/a.csv"\n')
    found = Path(load(home / "run.toml", must_exist=True).data.train[0])
    assert found.expanduser() == home / "a.csv"
