"""A run that starts from an adapter: base + saved adapter is the model, in plain PEFT, for every kind of method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_models import CLOSE, KINDS, federated, logits, plain

from fedspan.adapters.peft_folder import load
from fedspan.methods.messages import Broadcast
from fedspan.models.starting_adapter import start_from
from fedspan.runs.execution import run
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "classifier"]}


def trained(bases: dict[str, Path], name: str, path: Path, **options: Any) -> PeftModel:
    """A plain PEFT adapter of rank 3 with random weights, a head where the base is a classifier, saved by PEFT."""
    conv = {"fan_in_fan_out": True} if name == "gpt2" else {}
    targets = [t for t in TARGETS[name] if t != "classifier"]
    saved = {"modules_to_save": ["classifier"]} if name == "bert" else {}
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": targets, **conv, **saved, **options})
    model = get_peft_model(plain(bases, name), config).eval()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator(key))
    model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("name", TARGETS)
def test_the_start_and_the_result_are_what_peft_loads(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Targets beyond those of the run, Conv1D, heads; the saved adapter has the sum of the ranks."""
    start = trained(bases, name, tmp_path / "start")
    model = federated(bases, name, target_modules=(TARGETS[name][0],), seed=1)
    start_from(model, str(tmp_path / "start"))
    sent = tiny.broadcast(model, tiny.random_adapter(model, 2, scaling=0.0))
    model.load(sent)
    if name != "bert":  # whose pooler is new, and so drawn at random
        torch.testing.assert_close(logits(model.model, KINDS[name]), logits(start, KINDS[name]), **CLOSE)
    sent = tiny.broadcast(model, tiny.random_adapter(model, 2, scaling=0.7))
    model.load(sent)
    model.save_adapter(tmp_path / "saved", sent.adapter, sent.dense)
    loaded = PeftModel.from_pretrained(plain(bases, name), str(tmp_path / "saved")).eval()
    torch.testing.assert_close(logits(loaded, KINDS[name]), logits(model.model, KINDS[name]), **CLOSE)
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["r"] == 5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_whole_weights_start_from_the_sum(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    start = trained(bases, name, tmp_path / "start")
    model = federated(bases, name, trains="all")
    start_from(model, str(tmp_path / "start"))
    model.load(Broadcast({}, model.dense()))
    torch.testing.assert_close(logits(model.model, KINDS[name]), logits(start, KINDS[name]), **CLOSE)


@pytest.mark.parametrize("name", ["glora", "flora", "ffa_lora", "fed_sb", "fedavg"])
def test_a_run_goes_on_where_the_last_one_ended(
    bases: dict[str, Path], instructions: Path, tmp_path: Path, name: str
) -> None:
    """The figures of the start are those that the run before ended with, and so once more; ranks only grow."""
    first = run(tiny.config(bases["llama"], instructions, "glora"), tmp_path / "0")
    before, adapter = first.summary["metrics"]["server"], tmp_path / "0" / "adapter"
    evaluation = {"per_rank": False}
    for number in ("1", "2"):
        sections = {"model": {"adapter": str(adapter)}, "evaluation": evaluation, "federation": {"rounds": 1}}
        method = name if number == "1" else "fedit"
        result = run(tiny.config(bases["llama"], instructions, method, **sections), tmp_path / number)
        assert before is not None
        assert result.summary["metrics"]["base"]["loss"] == pytest.approx(before["loss"], rel=1e-4)
        if result.adapter is None:
            break
        before, adapter = result.summary["metrics"]["server"], result.adapter
    ranks = [f.rank for f in load(tmp_path / "0" / "adapter").factors.values()]
    if result.adapter is not None:
        assert min(f.rank for f in load(adapter).factors.values()) > max(ranks)


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {"target_modules": ["embed_tokens"]}, {}, "adapts or resizes the embedding"),
    ("llama", {"modules_to_save": ["norm"]}, {}, "layernorm.weight, which this run does not train"),
    ("llama", {}, {"dtype": "bfloat16"}, "held as torch.bfloat16, in which the sum would be rounded"),
    ("llama", {"use_dora": True}, {}, "use_dora is set"),
]


@pytest.mark.parametrize(("name", "options", "changes", "message"), REFUSED)
def test_what_cannot_be_right_is_refused(
    bases: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    trained(bases, name, tmp_path / "start", **options)
    with pytest.raises(FedspanError, match=message) as caught:
        start_from(federated(bases, name, **changes), str(tmp_path / "start"))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained(bases, "llama", tmp_path / "start")
    with pytest.raises(FedspanError, match=r"model\.adapter = .* which this base does not have: expected its base"):
        start_from(federated(bases, "bert"), str(tmp_path / "start"))
    wide = tiny.load(tiny.save("llama", tmp_path / "wide", intermediate_size=40), "instruction")
    with pytest.raises(FedspanError, match=r"as 32×48, and it is 32×40: expected its base"):
        start_from(wide, str(tmp_path / "start"))
    with pytest.raises(FedspanError, match="does not exist"):
        start_from(federated(bases, "llama"), str(tmp_path / "none"))
