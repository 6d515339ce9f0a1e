"""Other libraries' ways of doing the same work, used as documented: transformers' Trainer, PEFT's loop and merge.

The only file of the benchmarks that imports transformers and peft.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fedspan.algebra.lowrank import LowRank
from fedspan.bench.tiny import TARGETS
from fedspan.methods.messages import Factors
from fedspan.models.loading import library_logs_silenced

MERGED = "merged"


class PeftServer:
    """A real PeftModel of one d×d layer that holds every client's adapter."""

    def __init__(self, size: int, factors: Sequence[Factors]) -> None:
        from peft import LoraConfig, get_peft_model

        rank = factors[0].rank
        device = factors[0].b.device
        base = nn.Sequential()
        base.add_module("layer", nn.Linear(size, size, bias=False, device=device))
        config = LoraConfig(r=rank, lora_alpha=round(factors[0].scaling * rank), target_modules=["layer"])
        self._names = [f"client{i}" for i in range(len(factors))]
        first, *others = self._names
        self._model: Any = get_peft_model(base, config, adapter_name=first)
        self._layer: Any = self._model.base_model.model.layer
        parts = [getattr(self._layer, n) for n in (*self._layer.adapter_layer_names, *self._layer.other_param_names)]
        # `add_adapter` visits all adapters at every call, minutes for 1000 of them; this has the same result.
        for name in others:
            self._model.peft_config[name] = config
            for part in parts:
                if first in part:
                    part[name] = deepcopy(part[first])
        for name, f in zip(self._names, factors, strict=True):
            self._layer.lora_A[name].weight.data = f.a
            self._layer.lora_B[name].weight.data = f.b

    def merge(self, kind: str, rank: int) -> LowRank:
        """Call `add_weighted_adapter` with equal weights; `kind` is "svd" (to `rank`) or "cat"."""
        weights = [1.0 / len(self._names)] * len(self._names)
        options = {"svd_rank": rank} if kind == "svd" else {}
        self._model.add_weighted_adapter(self._names, weights, MERGED, combination_type=kind, **options)
        b, a = self._layer.lora_B[MERGED].weight.detach(), self._layer.lora_A[MERGED].weight.detach()
        return LowRank(b * self._layer.scaling[MERGED], a)

    def undo(self) -> None:
        """Delete the merged adapter."""
        self._model.delete_adapter(MERGED)


class PlainLoop:
    """The training loop of PEFT's own examples: one model, one AdamW per client, no framework."""

    def __init__(self, base: str, ranks: Sequence[int], learning_rate: float, device: torch.device) -> None:
        self._learning_rate = learning_rate
        self.model = _peft_model(base, ranks, device)
        self._device = device
        self._active = ""

    def start(self, adapter: Mapping[str, Factors]) -> list[nn.Parameter]:
        """Copy a client's adapter into the model; return the parameters to train."""
        rank = next(iter(adapter.values())).rank
        if self._active != _slot(rank):
            self._active = _slot(rank)
            self.model.set_adapter(self._active)
        with torch.no_grad():
            for name, f in adapter.items():
                layer = self.model.base_model.model.get_submodule(name)
                layer.lora_A[self._active].weight.copy_(f.a)
                layer.lora_B[self._active].weight.copy_(f.b)
                layer.scaling[self._active] = f.scaling
        return [p for p in self.model.parameters() if p.requires_grad]

    def train(self, adapter: Mapping[str, Factors], batches: Sequence[dict[str, Tensor]]) -> float:
        """Train one client and return its mean loss."""
        parameters = self.start(adapter)
        optimizer = torch.optim.AdamW(parameters, lr=self._learning_rate, weight_decay=0.0)
        self.model.train()
        total = torch.zeros((), device=self._device)
        for batch in batches:
            loss = self.model(**{name: value.to(self._device) for name, value in batch.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        return float(total) / len(batches)


class TrainerLoop:
    """transformers.Trainer, one call of `train` per client and round, with everything optional turned off."""

    def __init__(self, base: str, ranks: Sequence[int], learning_rate: float, device: torch.device) -> None:
        self._plain = PlainLoop(base, ranks, learning_rate, device)
        self._learning_rate = learning_rate
        self._device = device

    def train(self, adapter: Mapping[str, Factors], batches: Sequence[dict[str, Tensor]]) -> float:
        """Train one client and return its mean loss."""
        import transformers

        self._plain.start(adapter)
        size = len(batches[0]["input_ids"])
        rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(size)]
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder,
                max_steps=len(batches),
                per_device_train_batch_size=size,
                learning_rate=self._learning_rate,
                weight_decay=0.0,
                max_grad_norm=1.0,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                train_sampling_strategy="sequential",
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
                logging_strategy="no",
                use_cpu=self._device.type == "cpu",
            )
            trainer = transformers.Trainer(model=self._plain.model, args=arguments, train_dataset=rows)
            trainer.remove_callback(transformers.PrinterCallback)
            return float(trainer.train().training_loss)


def _slot(rank: int) -> str:
    return f"rank{rank}"


def _peft_model(base: str, ranks: Sequence[int], device: torch.device) -> Any:
    """Load the base with one adapter per rank on every linear layer."""
    import transformers
    from peft import LoraConfig, get_peft_model

    with library_logs_silenced():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, trust_remote_code=False
        ).to(device)
    configs = {_slot(r): LoraConfig(r=r, lora_alpha=16, target_modules=list(TARGETS)) for r in sorted(set(ranks))}
    (first, config), *others = configs.items()
    wrapped: Any = get_peft_model(model, config, adapter_name=first)
    for name, other in others:
        wrapped.add_adapter(name, other)
    wrapped.set_adapter(first)
    return wrapped
