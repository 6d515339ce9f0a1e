"""Small Llamas with random weights as local folders, and learnable token sequences: all from seeds, offline.

The folder has the files that `transformers` would save, written here as plain JSON and safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedspan.support.seeding import generator

VOCABULARY = 256
END = 1
"""The token that ends every text; 0 pads."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(path: Path, hidden: int, layers: int = 4, length: int = 64) -> Path:
    """Write a Llama of that hidden size with its tokenizer (word `wN` for token N); equal sizes give equal files.

    Parameters
    ----------
    length
        Longest sequence in tokens.
    """
    path.mkdir(parents=True, exist_ok=True)
    inner = hidden * 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, hidden // 32),
        "num_key_value_heads": max(1, hidden // 32),
        "head_dim": min(hidden, 32),
        "max_position_embeddings": length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": END,
        "eos_token_id": END,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_tokenizer(path, length)
    rng = generator("bench", "llama", hidden, layers)

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn((rows, columns), generator=rng).div_(columns**0.5)

    tensors = {
        "model.embed_tokens.weight": torch.randn((VOCABULARY, hidden), generator=rng),
        "lm_head.weight": draw(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for i in range(layers):
        name = f"model.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{name}.self_attn.{part}.weight"] = draw(hidden, hidden)
        for part in ("gate_proj", "up_proj"):
            tensors[f"{name}.mlp.{part}.weight"] = draw(inner, hidden)
        tensors[f"{name}.mlp.down_proj.weight"] = draw(hidden, inner)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{part}.weight"] = torch.ones(hidden)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _write_tokenizer(path: Path, length: int) -> None:
    words = {"<pad>": 0, "<end>": END} | {f"w{i}": i for i in range(2, VOCABULARY)}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **special} for t, i in (("<pad>", 0), ("<end>", END))],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<pad>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "pad_token": "<pad>",
        "eos_token": "<end>",
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def tokens(num_examples: int, length: int, *key: object) -> Tensor:
    """Make sequences (num_examples, length) in which three of four tokens follow from the one before.

    The rule t → a·t + b differs between keys; the last token is the end token.
    """
    rng = generator("bench", "tokens", *key)
    words = VOCABULARY - 2
    a, b = (int(x) for x in torch.randint(1, words, (2,), generator=rng))
    noise = torch.randint(0, words, (num_examples, length), generator=rng)
    random = torch.rand((num_examples, length), generator=rng) < 0.25
    sequences = noise.clone()
    for i in range(1, length):
        sequences[:, i] = torch.where(random[:, i], noise[:, i], (a * sequences[:, i - 1] + b) % words)
    sequences += 2
    sequences[:, -1] = END
    return sequences


def text(sequence: Tensor) -> tuple[str, str]:
    """Return a sequence as (prompt, answer): the first token, and the others without the end token, added later.

    A causal model's loss never has the first token as a target, so it equals the loss over the whole sequence.
    """
    words = [f"w{int(i)}" for i in sequence[:-1]]
    return words[0], " ".join(words[1:])
