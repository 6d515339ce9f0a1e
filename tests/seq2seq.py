"""Tiny encoder-decoders with tokenizers of their own kind, built from a configuration, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import processors

SIZE = 32
MODELS = ("t5", "bart", "mbart", "pegasus", "t5gemma")
_SIDES = {
    "d_model": SIZE,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "init_std": 0.15,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


def tokenizer(form: str) -> Any:
    """A character tokenizer that adds special tokens as the named model's does: `$A </s>` or `<s> $A </s>`.

    mBART's `$A </s> LANGUAGE`, in which `<unk>` stands for the language.
    """
    made = tiny.tokenizer()
    single = {"bart": "<s> $A </s>", "mbart": "$A </s> <unk>", "t5gemma": "<s> $A"}.get(form, "$A </s>")
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2), ("<unk>", 3)]
    )
    return made


def make(name: str, **changes: Any) -> Any:
    """A randomly initialised encoder-decoder, the same every time."""
    import transformers as t

    vocab = len(tiny.SPECIAL) + len(tiny.CHARACTERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        if name == "t5":
            sizes = {"d_model": SIZE, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
            ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
            config = t.T5Config(vocab_size=vocab, initializer_factor=2.0, **{**sizes, **ends, **changes})
            return t.T5ForConditionalGeneration(config)
        if name == "t5gemma":
            return t.T5GemmaForConditionalGeneration(_t5gemma(vocab, **changes))
        kinds = {
            "bart": (t.BartConfig, t.BartForConditionalGeneration, 2),
            "mbart": (t.MBartConfig, t.MBartForConditionalGeneration, None),
            "pegasus": (t.PegasusConfig, t.PegasusForConditionalGeneration, 0),
        }
        config_type, model_type, start = kinds[name]
        ends = {**tiny.ENDS, "decoder_start_token_id": start}
        return model_type(config_type(vocab_size=vocab, **{**_SIDES, **ends, **changes}))


def _t5gemma(vocab: int, **changes: Any) -> Any:
    import transformers as t

    side = {
        "vocab_size": vocab,
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.15,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
        **tiny.ENDS,
    }
    return t.T5GemmaConfig(encoder=side, decoder=side, dropout_rate=0.0, vocab_size=vocab, **{**tiny.ENDS, **changes})


def save(name: str, path: Path, **changes: Any) -> Path:
    """A base and its tokenizer as a local folder."""
    base = make(name, **changes)
    base.generation_config.forced_eos_token_id = None  # BART's would cut the last token off what is written
    base.save_pretrained(str(path))
    tokenizer(name).save_pretrained(str(path))
    return path
