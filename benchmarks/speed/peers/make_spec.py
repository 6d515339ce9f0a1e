"""Make an experiment for `--spec`: a tiny random Llama, and data in which every client follows a rule of its own.

A client's tokens walk through a window of the vocabulary with a stride of its own, so that the next token is known from
the present one: the loss falls, and it falls for everyone's tokens only when the clients' updates are combined.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import common
import numpy as np
from safetensors.numpy import save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(folder: Path, hidden: int, layers: int, heads: int, vocab: int, length: int, seed: int) -> None:
    """Write a random Llama to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(length, 64),
        # Larger than usual: the head is frozen, and with 0.02 its logits could never be far from one another.
        initializer_range=1.6 / math.sqrt(hidden),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_data(num_clients: int, examples: int, length: int, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Token ids (examples, length) for every client."""
    window = max(5, vocab // num_clients)
    held = {}
    for client in range(num_clients):
        rng = np.random.default_rng([seed, client])
        strides = [s for s in range(1, window) if math.gcd(s, window) == 1]
        stride = strides[client % len(strides)]
        first = rng.integers(window, size=(examples, 1))
        walk = (first + stride * np.arange(length)) % window
        held[common.client_name(client)] = ((walk + client * window) % vocab).astype(np.int64)
    return held


def main() -> None:
    """Make SPEC.json, model/ and data.npz in a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--num-clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--participation", type=float, default=1.0)
    parser.add_argument("--local-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=64, help="for each client")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=256)
    o = parser.parse_args()
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "model", o.hidden, o.layers, o.heads, o.vocab, o.length, o.seed)
    np.savez(folder / "data.npz", **make_data(o.num_clients, o.examples, o.length, o.vocab, o.seed))
    spec = {
        "model": "model",
        "data": "data.npz",
        "num_clients": o.num_clients,
        "rounds": o.rounds,
        "participation": o.participation,
        "local_steps": o.local_steps,
        "batch_size": o.batch_size,
        "learning_rate": o.learning_rate,
        "rank": o.rank,
        "alpha": o.alpha,
        "target_modules": list(LINEAR),
        "seed": o.seed,
        "weight_decay": 0.0,
        "clip_norm": None,
    }
    path = folder / "SPEC.json"
    path.write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
    save_file(common.initial_adapter(str(path)), folder / "initial.safetensors")
    path.write_text(json.dumps({**spec, "initial_adapter": "initial.safetensors"}, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
