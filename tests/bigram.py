"""A base that answers perfectly: a real Llama whose next token depends on the last one alone, as its weights say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch

TURN_END = "<|im_end|>"
TURN_END_ID = len(tiny.SPECIAL) + len(tiny.CHARACTERS)
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def tokenizer(chat: str | None = None) -> Any:
    """That of `tiny`, with a special token that ends a turn and is not its end token."""
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": [TURN_END]})
    made.chat_template = chat
    return made


def save(path: Path, chain: str, end: str, *, chat: str | None = None, generation: Mapping[str, Any] = {}) -> Path:
    """A base that writes `chain` one character after the other, then the token `end`, then `q` for ever.

    Its layers add nothing to the residual stream, so its logits are a table by the last token: about 20 for the next
    one, 1 for `q`, which is what a penalty on the answer's letters makes of it, and 0 for all others.
    """
    own = tokenizer(chat)
    size = len(own)
    model = tiny.make(
        "llama", vocab_size=size, hidden_size=size, num_attention_heads=1, num_key_value_heads=1, head_dim=32
    )
    following = {**dict(zip(chain, [*chain[1:], end], strict=True)), end: "q", "q": "q"}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[own.convert_tokens_to_ids("q")] = 0.1
        for now, after in following.items():
            model.lm_head.weight[own.convert_tokens_to_ids(after), own.convert_tokens_to_ids(now)] = 2.0
    model.save_pretrained(str(path))
    own.save_pretrained(str(path))
    stated = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    (path / "generation_config.json").write_text(json.dumps({**stated, **generation}), encoding="utf-8")
    return path
