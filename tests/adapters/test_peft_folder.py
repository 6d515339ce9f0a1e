"""PEFT folders in and out, checked against PEFT itself, and every way in which a folder is refused."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedspan.adapters import peft_folder
from fedspan.adapters.lora_config import CARRIED, pattern_value
from fedspan.adapters.peft_folder import CONFIG_NAME, WEIGHTS_NAME, load, save
from fedspan.adapters.state_dict import Adapter
from fedspan.methods.messages import Factors
from fedspan.support.seeding import generator

torch.set_num_threads(1)
IDS = torch.arange(12).reshape(2, 6)


def llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _seeded(lambda: LlamaForCausalLM(config))


def tied_llama() -> nn.Module:
    return llama(tied=True)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    return _seeded(lambda: GPT2LMHeadModel(config))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    return _seeded(lambda: BertForSequenceClassification(config))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@dataclass(frozen=True)
class Case:
    base: Callable[[], nn.Module]
    options: dict[str, Any]
    num_dense: int = 0
    embeddings: frozenset[str] = field(default_factory=frozenset)


CASES = {
    "llama": Case(llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}),
    "rslora": Case(llama, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": Case(
        llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {
                "q_proj": 2,
                r"layers\.1\..*v_proj": 7,
                "^model.layers.0.mlp.up_proj": 3,
                "j": 9,
            },
            "alpha_pattern": {r"layers\.0\.self_attn\.(q|v)_proj": 5, "up_proj": 11},
        },
    ),
    "embeddings": Case(
        llama,
        {"r": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        embeddings=frozenset({"model.embed_tokens"}),
    ),
    "whole embedding": Case(
        llama, {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, 2
    ),
    "tied": Case(
        tied_llama,
        {
            "r": 3,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        1,
    ),
    "gpt2": Case(
        gpt2,
        {"r": 4, "target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True},
        embeddings=frozenset({"transformer.wte"}),
    ),
    "bert": Case(bert, {"r": 4, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}, 2),
}


def trained(case: Case, seed: int = 1) -> PeftModel:
    """PEFT's own model with random factors and heads, so that no update is zero."""
    model = get_peft_model(case.base(), LoraConfig(**case.options)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator(seed, name))
            parameter.data = parameter.data * 0.5 + 0.3 * noise
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """PEFT's ΔW per module, in the layout of the stored weight."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def applied(base: nn.Module, adapter: Adapter) -> nn.Module:
    """The base with our ΔW and heads written into its weights: no PEFT involved."""
    model = copy.deepcopy(base)
    for name, f in adapter.factors.items():
        delta = f.delta().dense()
        turned = name in adapter.embeddings or adapter.config["fan_in_fan_out"]
        layer = model.get_submodule(name)
        # A new parameter, because PEFT's adapter on an embedding leaves the head that is tied to it alone.
        layer.weight = nn.Parameter(layer.weight + (delta.mT if turned else delta))
    for name, tensor in adapter.dense.items():
        model.get_parameter(name).data.copy_(tensor)
    return model


def reload(base: nn.Module, folder: Path) -> PeftModel:
    """PEFT's loading with every warning about missing keys an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_load_reads_what_peft_wrote(name: str, tmp_path: Path) -> None:
    """The products equal PEFT's own get_delta_weight in every module; heads equal its copies."""
    case = CASES[name]
    model = trained(case)
    model.save_pretrained(tmp_path / "a")
    adapter = load(tmp_path / "a")
    expected = deltas(model)
    assert adapter.factors.keys() == expected.keys()
    assert adapter.embeddings == case.embeddings
    assert len(adapter.dense) == case.num_dense
    for module, delta in expected.items():
        ours = adapter.factors[module].delta().dense()
        turned = module in case.embeddings or model.get_submodule(f"base_model.model.{module}").fan_in_fan_out
        torch.testing.assert_close(ours.mT if turned else ours, delta, rtol=1e-5, atol=1e-6)
        assert delta.norm() > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_save_wrote(name: str, tmp_path: Path) -> None:
    """PEFT's model on our folder = the trained one = the base with ΔW added, and not the untouched base."""
    case = CASES[name]
    model = trained(case)
    model.save_pretrained(tmp_path / "a")
    first = load(tmp_path / "a")
    resave(first, tmp_path / "b")
    again = load(tmp_path / "b")
    ranks = {f.rank for f in again.factors.values()}
    assert ranks == {max(f.rank for f in first.factors.values())}
    assert {f.scaling for f in again.factors.values()} == {1.0}
    for key in (*CARRIED, "task_type", "fan_in_fan_out"):
        assert again.config[key] == first.config[key]
    base = case.base()
    untouched = logits(base)
    ours = logits(reload(case.base(), tmp_path / "b"))
    torch.testing.assert_close(ours, logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, logits(applied(base, again)), rtol=1e-4, atol=1e-5)
    assert (ours - untouched).abs().max() > 0.05


def resave(adapter: Adapter, path: Path) -> None:
    save(
        path,
        adapter.factors,
        base_model=adapter.base_model,
        task_type=adapter.config["task_type"],
        dense=adapter.dense,
        modules_to_save=adapter.modules_to_save,
        fan_in_fan_out=adapter.config["fan_in_fan_out"],
        embeddings=adapter.embeddings,
        frozen=adapter.frozen,
        carried={key: adapter.config[key] for key in CARRIED},
    )


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["q_proj", "proj", r"0\.a", "^m.0", "0.a.q_proj", ".*q_proj", "a"]),
        st.integers(),
        max_size=4,
    ),
    st.sampled_from(["m.0.a.q_proj", "m.10.a.q_proj", "q_proj", "m.0.a", "xq_proj", "m.0"]),
)
def test_patterns_match_as_in_peft(patterns: dict[str, int], module: str) -> None:
    """rank_pattern and alpha_pattern resolve to PEFT's value, order and anchors included."""
    assert pattern_value(patterns, module, -1) == patterns.get(get_pattern_key(patterns.keys(), module), -1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 6)] * 2, st.integers(0, 5), st.floats(-3, 3)), min_size=1, max_size=3))
def test_mixed_ranks_and_scalings_survive_saving(modules: list[tuple[int, int, int, float]]) -> None:
    """save then load keeps every product, for ranks 0 and above the layer's size too."""
    factors = {
        f"m.{i}.x": Factors(
            torch.randn(m, r, generator=generator("b", i)), torch.randn(r, n, generator=generator("a", i)), s
        )
        for i, (m, n, r, s) in enumerate(modules)
    }
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), factors, base_model="base", task_type=None)
        adapter = load(Path(folder))
    assert adapter.base_model == "base"
    for name, f in factors.items():
        torch.testing.assert_close(adapter.factors[name].delta().dense(), f.delta().dense())


# Every way in which a folder is refused


def plain(folder: Path) -> None:
    """A small valid folder to be damaged."""
    factors = {f"layer.{i}.q": Factors(torch.ones(4, 2), torch.ones(2, 3), 0.5) for i in range(2)}
    head = {"score.weight": torch.ones(2, 3)}
    save(folder, factors, base_model="b", task_type=None, dense=head, modules_to_save=["score"])


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = load_file(folder / WEIGHTS_NAME)
        change(values)
        save_file(values, folder / WEIGHTS_NAME)

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def put(key: str, value: Tensor) -> Callable[[Path], None]:
    return tensors(lambda values: values.update({key: value}))


def to_bin(folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")


P = "base_model.model."
A, B = f"{P}layer.0.q.lora_A.weight", f"{P}layer.0.q.lora_B.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG_NAME).unlink(), r"holds no adapter_config\.json"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), r"holds no adapter_model\.safetensors"),
    "pickle": (to_bin, r"adapter_model\.bin, a pickle, which is never opened"),
    "config cut": (cut(CONFIG_NAME, 40), r"adapter_config\.json is not valid JSON"),
    "config not text": (lambda f: (f / CONFIG_NAME).write_bytes(b"\xff\xfe\xff"), "not valid JSON"),
    "config a list": (lambda f: (f / CONFIG_NAME).write_text("[]"), "holds a JSON list"),
    "weights cut": (cut(WEIGHTS_NAME, 300), r"adapter_model\.safetensors cannot be read"),
    "weights empty": (cut(WEIGHTS_NAME, 0), r"adapter_model\.safetensors cannot be read"),
    "weights short by a byte": (
        lambda f: os.truncate(f / WEIGHTS_NAME, (f / WEIGHTS_NAME).stat().st_size - 1),
        r"adapter_model\.safetensors cannot be read",
    ),
    "weights not safetensors": (lambda f: (f / WEIGHTS_NAME).write_bytes(b"x" * 99), "cannot be read"),
    "type": (config(peft_type="IA3"), "peft_type 'IA3': expected 'LORA'"),
    "dora": (config(use_dora=True), "use_dora is set"),
    "lora bias": (config(lora_bias=True), "lora_bias is set"),
    "alora": (config(alora_invocation_tokens=[1]), "alora_invocation_tokens is set"),
    "replication": (config(layer_replication=[[0, 1]]), "layer_replication is set"),
    "parameters": (config(target_parameters=["x"]), "target_parameters = .*no factors of theirs"),
    "tokens": (config(trainable_token_indices=[3]), "trainable_token_indices is set"),
    "bias": (config(bias="lora_only"), "bias='lora_only' also trains biases"),
    "pissa": (
        config(init_lora_weights="pissa_niter_4"),
        "pissa_niter_4.*path_initial_model_for_weight_conversion",
    ),
    "olora": (config(init_lora_weights="olora"), "olora.*path_initial_model_for_weight_conversion"),
    "corda": (config(init_lora_weights="corda"), "corda.*path_initial_model_for_weight_conversion"),
    "lora-ga": (config(init_lora_weights="lora_ga"), "lora_ga.*path_initial_model_for_weight_conversion"),
    "loftq": (config(init_lora_weights="loftq"), "loftq.*expected an adapter trained on the original base"),
    "unknown init": (
        config(init_lora_weights="magic"),
        "init_lora_weights='magic': expected true, false or one of",
    ),
    "rank missing": (config(r=None), "rank r = None"),
    "rank zero": (config(r=0), "rank r = 0"),
    "rank wrong": (config(r=3), r"layer\.0\.q: lora_A \(2, 3\).*expected \(3, in\) and \(out, 3\)"),
    "rank pattern": (config(rank_pattern={"1.q": 4}), r"layer\.1\.q: lora_A \(2, 3\).*expected \(4, in\)"),
    "pattern a list": (config(alpha_pattern=[1]), r"alpha_pattern = \[1\]"),
    "pattern broken": (config(rank_pattern={"(": 2}), "rank_pattern '\\(' .*regular expression"),
    "alpha": (config(lora_alpha="x"), "alpha lora_alpha = 'x': expected a finite number"),
    "alpha infinite": (config(alpha_pattern={"q": float("inf")}), "alpha q = inf"),
    "saved names": (config(modules_to_save="score"), "modules_to_save = 'score': expected a list"),
    "no B": (tensors(lambda v: v.pop(B)), r"layer\.0\.q has lora_A without lora_B"),
    "no A": (tensors(lambda v: v.pop(A)), r"layer\.0\.q has lora_B without lora_A"),
    "nothing": (tensors(lambda v: [v.pop(k) for k in list(v) if "lora" in k]), "holds no lora_A and lora_B"),
    "A and B differ": (put(B, torch.ones(4, 3)), r"lora_A \(2, 3\) and lora_B \(4, 3\)"),
    "nan": (put(B, torch.full((4, 2), float("nan"))), r"layer\.0\.q\.lora_B\.weight' holds NaN"),
    "infinite head": (put(f"{P}score.weight", torch.full((2, 3), float("inf"))), r"score\.weight' holds NaN"),
    "convolution": (put(A, torch.ones(2, 3, 1, 1)), r"lora_A has shape \(2, 3, 1, 1\).*convolutions"),
    "integers": (put(A, torch.ones(2, 3, dtype=torch.int8)), "lora_A is torch.int8"),
    "no prefix": (
        put("layer.0.q.lora_A.weight", torch.ones(2, 3)),
        "expected names that start with 'base_model",
    ),
    "adapter name": (
        put(f"{P}layer.0.q.lora_A.default.weight", torch.ones(2, 3)),
        "is none that this adapter",
    ),
    "magnitude": (
        put(f"{P}layer.0.q.lora_magnitude_vector", torch.ones(4)),
        "lora_magnitude_vector' is none that",
    ),
    "B's bias": (put(f"{P}layer.0.q.lora_B.bias", torch.ones(4)), r"lora_B\.bias' is none that"),
    "stranger": (put(f"{P}norm.weight", torch.ones(4)), r"norm\.weight' is none that"),
    "head lost": (
        tensors(lambda v: v.pop(f"{P}score.weight")),
        r"modules_to_save = \['score'\]: expected weights",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_refuses(name: str, tmp_path: Path) -> None:
    """Every damaged or unsupported folder gets one line that names it; the undamaged one loads."""
    damage, message = DAMAGES[name]
    plain(tmp_path / "a")
    load(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_refuses_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "nothing")


ONE = {"x.q": Factors(torch.ones(4, 2), torch.ones(2, 3), 1.0)}


def test_save_never_overwrites(tmp_path: Path) -> None:
    """A file or a non-empty folder is refused and left alone; an empty folder is used."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="exists already"):
            save(tmp_path / name, ONE, base_model=None, task_type=None)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["notes"]
    save(tmp_path / "empty", ONE, base_model=None, task_type=None)
    assert load(tmp_path / "empty").base_model is None


@pytest.mark.parametrize("after", ["weights", "config"])
def test_a_failed_save_leaves_nothing(after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle leaves no folder, whole or half, and no scratch."""

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*(peft_folder, "save_file") if after == "weights" else (Path, "write_text"), full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "out", ONE, base_model=None, task_type=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {}}, "no module to write"),
        (
            {"factors": {"q": Factors(torch.ones(4, 2), torch.ones(3, 3), 1.0)}},
            "expected \\(m, r\\) and \\(r, n\\)",
        ),
        ({"factors": {"q": Factors(torch.ones(4, 2), torch.ones(2, 3), float("nan"))}}, "NaN or infinite"),
        (
            {"dense": {"score.weight": torch.ones(1)}},
            "weight 'score.weight': expected one in modules_to_save",
        ),
        ({"modules_to_save": ["q"]}, "x.q has factors and is in modules_to_save"),
        ({"embeddings": ["wte"]}, "embedding 'wte' has no factors"),
        ({"carried": {"r": 3}}, "config entry 'r': expected one of"),
    ],
)
def test_save_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"factors": ONE, "base_model": None, "task_type": None} | changes
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []
