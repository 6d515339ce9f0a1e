"""`adapter.modules_to_save`: embeddings, norms and output layers trained whole, and read back by plain PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedspan.merging.one_shot import merge
from fedspan.methods.messages import Factors, Recipe
from fedspan.models import FederatedModel
from fedspan.models.selection import Selection
from fedspan.models.starting_adapter import start_from
from fedspan.support.errors import FedspanError

CASES = {
    "embeddings": ("llama", ("embed_tokens",), False),
    "tied embeddings": ("llama", ("embed_tokens",), True),
    "all norms": ("llama", ("norm", "input_layernorm"), False),
    "tied output layer": ("llama", ("lm_head",), True),
    "output layer": ("llama", ("lm_head",), False),
    "norms of an encoder": ("bert", ("LayerNorm", "word_embeddings"), False),
    "embeddings of gpt2": ("gpt2", ("wte", "ln_f"), False),
}


def made(case: str, tmp_path: Path, **changes: object) -> tuple[FederatedModel, Path]:
    name, modules, tied = CASES[case]
    options = {"tie_word_embeddings": tied} if name == "llama" else {}
    base = tiny.save(name, tmp_path / "base", **options)
    selection = Selection(modules_to_save=modules)
    return tiny.load(base, tiny.KIND[name], max_rank=4, selection=selection, **changes), base


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(4, 90, (3, 11), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("case", ["tied embeddings", "tied output layer", "norms of an encoder", "embeddings of gpt2"])
def test_whole_models_and_other_runs_begin_with_what_was_trained_whole(case: str, tmp_path: Path) -> None:
    """An adapter with every name of a weight that has several: they are one weight in `merge --full` and at a start."""
    import transformers as t

    model, base = made(case, tmp_path)
    dense = {name: value + 0.1 * torch.randn_like(value) for name, value in model.dense().items()}
    model.load(tiny.broadcast(model, tiny.random_adapter(model, 4), dense=dense))
    model.save_adapter(tmp_path / "adapter", model.adapter(), model.dense())
    wanted = logits(model.model)
    merge([tmp_path / "adapter"], "flora", full=True, out=tmp_path / "whole")
    auto = t.AutoModelForCausalLM if model.kind == "instruction" else t.AutoModelForSequenceClassification
    whole = auto.from_pretrained(str(tmp_path / "whole")).eval()
    torch.testing.assert_close(logits(whole), wanted, rtol=1e-4, atol=1e-4)
    other = tiny.load(base, model.kind, max_rank=4, selection=Selection(modules_to_save=CASES[case][1]), seed=1)
    start_from(other, str(tmp_path / "adapter"))
    other.load(tiny.broadcast(other, tiny.random_adapter(other, 2, scaling=0.0)))
    torch.testing.assert_close(logits(other.model), wanted, rtol=1e-4, atol=1e-4)


def test_names_of_one_weight_that_differ_are_refused(tmp_path: Path) -> None:
    model, base = made("tied embeddings", tmp_path)
    model.load(tiny.broadcast(model, tiny.random_adapter(model, 4)))
    model.save_adapter(tmp_path / "adapter", model.adapter(), model.dense())
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FedspanError, match=r"one weight for \S+ and \S+, of which the adapter changes one"):
        merge([tmp_path / "adapter"], "flora", full=True, out=tmp_path / "whole")
    other = tiny.load(base, "instruction", max_rank=4, selection=Selection(modules_to_save=("embed_tokens",)))
    with pytest.raises(FedspanError, match=r"holds lm_head\.weight, which this run does not train"):
        start_from(other, str(tmp_path / "adapter"))


@pytest.mark.parametrize("case", CASES)
def test_plain_peft_reads_what_was_trained_whole(case: str, tmp_path: Path) -> None:
    import transformers as t
    from peft import PeftModel

    model, base = made(case, tmp_path)
    trained = {id(p) for p in model.dense_parameters.values()}
    owners = [n for n, p in model.model.named_parameters(remove_duplicate=False) if id(p) in trained]
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in owners}
    assert set(CASES[case][1]) <= names
    dense = {name: value + 0.1 * torch.randn_like(value) for name, value in model.dense().items()}
    adapter = {n: Factors(f.b, f.a, f.scaling) for n, f in tiny.random_adapter(model, 4).items()}
    model.load(tiny.broadcast(model, adapter, dense=dense))
    model.save_adapter(tmp_path / "adapter", model.adapter(), model.dense())
    auto = t.AutoModelForCausalLM if model.kind == "instruction" else t.AutoModelForSequenceClassification
    labels = {} if model.kind == "instruction" else {"num_labels": 3}
    plain = auto.from_pretrained(str(base), **labels)
    before = logits(plain)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded), logits(model.model), rtol=1e-4, atol=1e-4)
    assert float((logits(loaded) - before).norm()) > 0.1


def test_a_whole_module_in_a_half_precision_base_is_trained_in_float32(tmp_path: Path) -> None:
    model, _ = made("all norms", tmp_path, dtype="bfloat16")
    assert {p.dtype for p in model.dense_parameters.values()} == {torch.float32}
    assert torch.isfinite(logits(model.model)).all()
    assert set(model.dense_parameters) <= set(model.trainable(Recipe()))


def test_a_whole_module_has_no_adapter_inside(tmp_path: Path, bases: dict[str, Path]) -> None:
    model = tiny.load(bases["llama"], "instruction", max_rank=4, selection=Selection(modules_to_save=("mlp",)))
    assert not any(".mlp." in name for name in model.layers)
    assert sum(".mlp." in name for name in model.dense_parameters) == 6
    with pytest.raises(FedspanError, match=r"'q_proj' matches no linear layer|is in modules_to_save"):
        tiny.load(bases["llama"], "instruction", selection=Selection(("q_proj",), modules_to_save=("self_attn",)))
