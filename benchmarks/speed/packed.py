"""CPU seconds of a client-step on longer rows: batches whole, in parts of similar lengths, packed.

    python benchmarks/speed/packed.py [--repeats 3] [--precision bfloat16] [--cases decoder] >> packed.jsonl

MiniLM's shape on documents of 32 to 384 tokens, batch 8; a decoder of SmolLM2-135M's width (six of its 30 layers, a
small vocabulary) on conversations of 16 to 256 tokens, batch 4. Tokens are random. The arms take turns; the figures are
CPU seconds of this process, which has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import minilm

from fedspan.client import cohort, length_parts
from fedspan.client.setup import find_packed
from fedspan.client.training import Assignment, TrainingSettings
from fedspan.config import EngineConfig, LocalConfig
from fedspan.data import Encoded
from fedspan.data.encoded import Texts
from fedspan.data.rows import Kind
from fedspan.methods.messages import Broadcast
from fedspan.methods.readout import fresh_adapter
from fedspan.models import FederatedModel, build

_ROWS, _VOCABULARY, _PAD = 64, 4096, 0
_ARMS = ("whole", "parts", "packed")


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of some lengths, and the base that is trained on them."""

    kind: Kind
    batch_size: int
    lengths: Callable[[np.random.Generator], np.ndarray]
    steps: int = 3


def _answers(rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.exp(rng.normal(4.6, 0.6, _ROWS)).astype(int), 16, 256)


CASES = {
    "encoder": Case("classification", 8, lambda rng: rng.integers(32, 385, _ROWS), 2),
    "decoder": Case("instruction", 4, _answers),
}


def _write_decoder(path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        pad_token_id=_PAD,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(str(path))
    return path


def _data(case: Case) -> Encoded:
    rng = np.random.default_rng(0)
    lengths = torch.as_tensor(case.lengths(rng))
    tokens = rng.integers(4, _VOCABULARY, int(lengths.sum() + lengths.max())).astype(np.int32)
    prompts = lengths // 3 if case.kind == "instruction" else None
    texts = Texts(torch.from_numpy(tokens), None, lengths.cumsum(0) - lengths, lengths, prompts, _PAD)
    labels = None if case.kind == "instruction" else torch.arange(_ROWS) % 2
    rows = torch.arange(_ROWS)
    return Encoded(case.kind, rows, ["0"] * _ROWS, [""] * _ROWS, texts, None, labels)


def _model(base: Path, case: Case) -> FederatedModel:
    return build(
        str(base),
        case.kind,
        trains="adapter",
        num_labels=2 if case.kind == "classification" else 0,
        target_modules=("all-linear",),
        max_rank=minilm.RANK,
        rslora=False,
        dropout=0.0,
        dtype="float32",
        device=torch.device("cpu"),
        seed=0,
        base_dropout=False,
    )


def _work(model: FederatedModel, data: Encoded, case: Case, arm: str, precision: str, round_num: int) -> None:
    engine = EngineConfig.model_validate({"name": "sequential", "precision": precision})
    settings = TrainingSettings(local=LocalConfig(steps=case.steps, batch_size=case.batch_size), engine=engine)
    adapter = fresh_adapter(model.template(minilm.RANK, 16.0, False, 0), minilm.RANK)
    client = Assignment("client", Broadcast(adapter, model.dense()), np.arange(_ROWS), case.steps, 1.0)
    packed, bound = model.packed, length_parts.WIDEST
    # Without packed rows batches are taken in parts, and below the bound whole.
    model.packed = packed if arm == "packed" else None
    length_parts.WIDEST = 2**62 if arm == "whole" else 0
    try:
        cohort.work(model, data, [client], settings, round_num)
    finally:
        model.packed, length_parts.WIDEST = packed, bound


def main() -> None:
    """Time the arms of every case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bases = {
            "classification": minilm.write_base(Path(folder) / "encoder", vocabulary=_VOCABULARY),
            "instruction": _write_decoder(Path(folder) / "decoder"),
        }
        for name in given.cases:
            case = CASES[name]
            model, data = _model(bases[case.kind], case), _data(case)
            find_packed(model, data, EngineConfig(), case.batch_size)
            for repeat in range(given.repeats + 1):
                for arm in _ARMS:
                    began, used = time.perf_counter(), time.process_time()
                    _work(model, data, case, arm, given.precision, repeat)
                    figures = {"cpu": time.process_time() - used, "wall": time.perf_counter() - began}
                    if not repeat:
                        continue  # the first of each warms up
                    line = {"case": name, "arm": arm, "precision": given.precision, "load": os.getloadavg()[0]}
                    print(json.dumps(line | {k: v / case.steps for k, v in figures.items()}), flush=True)


if __name__ == "__main__":
    main()
