"""Faults of a base are named as the base's, in one line, before anything is trained."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from fedspan.adapters.state_dict import Adapter
from fedspan.merging.full_model import write_model
from fedspan.models import load_processor
from fedspan.models.base_checks import check_causal, check_pixels, check_tokens, usable_positions
from fedspan.models.base_facts import read_facts
from fedspan.support.errors import FedspanError

SMALL: dict[str, Any] = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT: dict[str, Any] = {**SMALL, "hidden_size": 32}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: t.BertConfig(**BERT),
    "roberta": lambda: t.RobertaConfig(**BERT),
    "electra": lambda: t.ElectraConfig(**BERT, embedding_size=32),
    "xlnet": lambda: t.XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=48),
}
DECODERS: dict[str, Callable[[], Any]] = {
    "bert as a decoder": lambda: t.BertConfig(**BERT, is_decoder=True),
    "gpt2": lambda: t.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "mixtral": lambda: t.MixtralConfig(**BERT, num_key_value_heads=2),
    "mamba": lambda: t.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2),
    "bloom": lambda: t.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4),
}


def causal(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return t.AutoModelForCausalLM.from_config(config).eval().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_no_causal_model(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"'x' \(\w+\) reads later tokens too"):
        check_causal(causal(ENCODERS[name](), dtype), "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_one(name: str, dtype: torch.dtype) -> None:
    check_causal(causal(DECODERS[name](), dtype), "x")


def test_an_encoder_is_refused_for_instruction_data(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="reads later tokens too"):
        tiny.load(bases["bert"], "instruction")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_the_base_s_fault(tmp_path: Path, value: float) -> None:
    base = tiny.save("llama", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for kind in ("instruction", "classification"):
        with pytest.raises(
            ValueError, match=r"base'.*its weight model.layers.1.mlp.up_proj.weight holds NaN"
        ) as caught:
            tiny.load(base, kind, pad_token_id=0)
        assert "\n" not in str(caught.value)


def test_a_base_that_overflows_in_its_type_is_named() -> None:
    model = causal(DECODERS["gpt2"]())
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.fill_(3e38)
    with pytest.raises(ValueError, match="its output is NaN or infinite"):
        check_causal(model, "x")


CODE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, ViTImageProcessor, LlamaForCausalLM
class OwnConfig(PreTrainedConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM): pass
class OwnTokenizer(PreTrainedTokenizerFast): pass
class OwnProcessor(ViTImageProcessor): pass
"""


def with_code(base: Path, mark: Path, model_type: str | None) -> None:
    """Give every file of a base an entry that names code beside it; without a known type there is no way around it."""
    (base / "own.py").write_text(CODE.format(mark=str(mark)), encoding="utf-8")
    entries = {
        "config.json": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
    }
    for name, entry in entries.items():
        stated = json.loads((base / name).read_text(encoding="utf-8"))
        stated["auto_map"] = entry
        if model_type is not None and name == "config.json":
            stated["model_type"] = model_type
        (base / name).write_text(json.dumps(stated), encoding="utf-8")


@pytest.mark.parametrize("way", ["a run", "a run on quantised weights", "merge --full"])
def test_code_of_a_class_that_the_base_s_type_does_not_have_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Its type is known, so that its configuration is read without a question; its class would be the code's."""
    base, mark = tiny.save("llama", tmp_path / "base"), tmp_path / "mark"
    (base / "own.py").write_text(CODE.format(mark=str(mark)), encoding="utf-8")
    stated = json.loads((base / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoModelForImageClassification": "own.OwnModel", "AutoModelForSeq2SeqLM": "own.OwnModel"}
    (base / "config.json").write_text(json.dumps({**stated, "auto_map": classes}), encoding="utf-8")
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    config = {"base_model_name_or_path": str(base), "task_type": "SEQ_2_SEQ_LM"}
    use = {
        "a run": lambda: tiny.load(base, "image"),
        "a run on quantised weights": lambda: tiny.load(base, "image", quantise="int8"),
        "merge --full": lambda: write_model(tmp_path / "out", Adapter({}, {}, config)),
    }[way]
    with pytest.raises(FedspanError, match=r"never run here|contains custom code"):
        use()
    assert not asked
    assert not mark.exists()


@pytest.mark.parametrize("model_type", [None, "own"])
def test_code_beside_a_base_is_neither_asked_about_nor_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str | None
) -> None:
    """On a terminal, whose user says yes to everything; a base of a known type is read without its code."""
    base, mark = tiny.save("llama", tmp_path / "base"), tmp_path / "mark"
    with_code(base, mark, model_type)
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": asked.append(text) or "y")
    assert len(load_processor(str(base), "instruction")) > 90  # tokenizer.json says all of it
    if model_type is None:
        assert tiny.load(base, "instruction").model.config.model_type == "llama"
        read_facts(str(base))
    else:
        for read in (
            lambda: tiny.load(base, "instruction"),
            lambda: read_facts(str(base)),
        ):
            with pytest.raises(
                ValueError, match=r"needs code of its own \(auto_map in its files\), which is never run"
            ):
                read()
    assert not asked
    assert not mark.exists()


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_base_without_tokenizer_files_is_refused(tmp_path: Path, name: str) -> None:
    """Where transformers makes a tokenizer up, every word would be its unknown token."""
    tiny.make(name).save_pretrained(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"no usable tokenizer files|could not be read") as caught:
        load_processor(str(tmp_path / "base"), "instruction")
    assert "\n" not in str(caught.value)


def test_data_stays_within_the_tables_of_the_base() -> None:
    bert = t.BertForSequenceClassification(t.BertConfig(**BERT, max_position_embeddings=32, type_vocab_size=1))
    check_tokens(bert, "x", 59, 32, 0)
    check_tokens(bert, "x", 59, 32, None)
    with pytest.raises(ValueError, match=r"the token id 60, and its embedding has 60 rows"):
        check_tokens(bert, "x", 60, 32, 0)
    with pytest.raises(ValueError, match=r"data.max_length: a row has 33 tokens, .* 32 positions; .* at most 32"):
        check_tokens(bert, "x", 59, 33, 0)
    with pytest.raises(ValueError, match=r"token type 1, and the base has 1; .* one text in data.text_columns"):
        check_tokens(bert, "x", 59, 32, 1)


def test_a_processor_of_another_base_is_named(bases: dict[str, Path]) -> None:
    model = tiny.load(bases["vit"], "image").model
    check_pixels(model, "x", torch.zeros(1, 3, 16, 16))
    for shape in ((3, 24, 24), (1, 16, 16)):
        with pytest.raises(ValueError, match="'x' does not take what its image processor makes of an image") as caught:
            check_pixels(model, "x", torch.zeros(1, *shape))
        assert "\n" not in str(caught.value)


POSITIONS: dict[str, tuple[Callable[[], Any], int]] = {
    "bert": (lambda: t.BertConfig(**BERT, max_position_embeddings=34), 34),
    "roberta": (lambda: t.RobertaConfig(**BERT, max_position_embeddings=34, pad_token_id=1), 32),
    "mpnet": (lambda: t.MPNetConfig(**BERT, max_position_embeddings=34, pad_token_id=1), 32),
    "gpt2": (
        lambda: t.GPT2Config(
            vocab_size=60,
            n_embd=32,
            n_layer=1,
            n_head=4,
            n_positions=34,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        34,
    ),
    "opt": (
        lambda: t.OPTConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
            max_position_embeddings=34,
        ),
        34,
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_the_number_of_positions_is_the_longest_row_that_the_base_takes(tmp_path: Path, name: str) -> None:
    """By its configuration and by its table alike: a longer row fails, that one does not."""
    config, positions = POSITIONS[name][0](), POSITIONS[name][1]
    config.save_pretrained(str(tmp_path))
    assert read_facts(str(tmp_path)).num_positions == positions
    model = t.AutoModelForSequenceClassification.from_config(config).eval()
    tables = [
        usable_positions(key.rpartition(".")[2], module)
        for key, module in model.named_modules()
        if key.rpartition(".")[2] in ("position_embeddings", "wpe", "embed_positions")
    ]
    assert tables == [positions]
    with torch.no_grad():
        model(input_ids=torch.full((1, positions), 5))
        with pytest.raises((IndexError, RuntimeError)):  # in the tables, or in buffers of their size
            model(input_ids=torch.full((1, positions + 1), 5))


def test_a_base_states_its_end_tokens(tmp_path: Path) -> None:
    """Those of its settings for generation, which may be several, before that of its configuration."""
    t.LlamaConfig(eos_token_id=5).save_pretrained(str(tmp_path))
    assert read_facts(str(tmp_path)).end_tokens == (5,)
    t.GenerationConfig(eos_token_id=[7, 5, 7]).save_pretrained(str(tmp_path))
    assert read_facts(str(tmp_path)).end_tokens == (7, 5)
    assert read_facts(str(tmp_path)).num_positions == 2048
    t.T5Config().save_pretrained(str(tmp_path / "t5"))
    facts = read_facts(str(tmp_path / "t5"))
    assert (facts.num_positions, facts.classifies_at) == (None, 1)


def test_a_base_that_hashes_its_token_ids_takes_any() -> None:
    """CANINE reads characters by their code points, for which it has no table of embeddings."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    canine = t.CanineForSequenceClassification(t.CanineConfig(**sizes, max_position_embeddings=64))
    check_tokens(canine, "x", 0x10FFFF, 32, None)
    with pytest.raises(ValueError, match="64 positions"):
        check_tokens(canine, "x", 0x10FFFF, 65, None)
