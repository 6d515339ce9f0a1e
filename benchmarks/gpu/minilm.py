"""A base of MiniLM's shape with random weights, sentences of SST-2's lengths, and a plain PEFT loop over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedspan.client.batching import batches
from fedspan.client.training import Assignment, TrainingSettings
from fedspan.config import from_mapping
from fedspan.data import Encoded, encode
from fedspan.data.rows import Rows
from fedspan.methods.messages import Broadcast, Factors
from fedspan.methods.readout import fresh_adapter
from fedspan.models import FederatedModel, build, load_processor
from fedspan.support.seeding import generator

VOCABULARY, LAYERS, HIDDEN, HEADS, INNER = 30522, 6, 384, 12, 1536
RANK, BATCH, STEPS, RATE = 8, 16, 10, 1e-3
ROWS_EACH = 200


def write_base(path: Path, dropout: float = 0.1, vocabulary: int = VOCABULARY) -> Path:
    """Write the base (22.7 M parameters, as sentence-transformers/all-MiniLM-L6-v2) with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {f"w{i}": i for i in range(4, vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(str(path))
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(str(path))
    return path


def sentences(base: Path, num_rows: int) -> Encoded:
    """Return sentences with about the lengths of SST-2's training set: 3 to 64 tokens, 13 on average."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(2.25, 0.65, num_rows)).astype(int), 1, 62)
    words = rng.integers(4, VOCABULARY, (num_rows, 64))
    texts = [" ".join(f"w{w}" for w in own[:n]) for own, n in zip(words, lengths, strict=True)]
    rows = Rows("classification", [(text,) for text in texts], [int(own[0]) % 2 for own in words], [""] * num_rows)
    return encode(rows, load_processor(str(base), "classification"), from_mapping({}).data)


def load(base: Path, device: torch.device) -> FederatedModel:
    """Return the base with adapters of rank 8 on all linear layers."""
    return build(
        str(base),
        "classification",
        trains="adapter",
        num_labels=2,
        target_modules=("all-linear",),
        max_rank=RANK,
        rslora=False,
        dropout=0.0,
        dtype="float32",
        device=device,
        seed=0,
    )


def settings(engine: str, **options: Any) -> TrainingSettings:
    """Return the settings of local work."""
    local = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "clip_norm": 1.0}
    return TrainingSettings.of(
        from_mapping({"local": local, "engine": {"name": engine, "precision": "auto", **options}})
    )


def clients(model: FederatedModel, num_clients: int) -> list[Assignment]:
    """Return clients that start from the same adapter, each with its own rows."""
    adapter = fresh_adapter(model.template(RANK, 16.0, False, 0), RANK)
    sent = Broadcast(adapter, model.dense())
    rows = [np.arange(k * ROWS_EACH, (k + 1) * ROWS_EACH) for k in range(num_clients)]
    return [Assignment(f"client-{k:03d}", sent, own, STEPS, 1.0) for k, own in enumerate(rows)]


class PlainLoop:
    """The training loop of PEFT's own examples: one model, a fresh adapter and AdamW for each client."""

    def __init__(self, base: Path, device: torch.device, targets: Sequence[str]) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=2).to(device)
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=list(targets), modules_to_save=["classifier"])
        self.model: Any = get_peft_model(model, config)
        self.device = device

    def train(self, adapter: Mapping[str, Factors], chosen: Sequence[dict[str, Tensor]]) -> float:
        """Train one client and return its mean loss."""
        with torch.no_grad():
            for name, f in adapter.items():
                layer = self.model.base_model.model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(f.a)
                layer.lora_B["default"].weight.copy_(f.b)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for batch in chosen:
            loss = self.model(**{name: value.to(self.device) for name, value in batch.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        return float(total) / len(chosen)


def batches_of(data: Encoded, a: Assignment) -> list[dict[str, Tensor]]:
    """Return the batches that the engines draw for a client, on the CPU."""
    examples = data.subset(a.rows)
    drawn = batches(len(examples), BATCH, STEPS, generator(0, 0, a.client_id, "batches"))
    return [examples.batch(rows) for rows in drawn]
