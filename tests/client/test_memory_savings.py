"""Batches in parts and checkpointed blocks: less memory at a time, the same training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from local_training import LOCAL, start_of, tasks, tensors, texts
from torch import Tensor

from fedspan.client import cohort
from fedspan.client.training import Assignment, LocalResult, TrainingSettings, train
from fedspan.config import DataConfig, EngineConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods.messages import Broadcast, Recipe
from fedspan.models import FederatedModel
from fedspan.support.errors import FedspanError

__all__ = ["tasks", "texts"]  # the fixtures

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Dropout draws other masks for a batch of another size."""
KINDS = {"llama": "instruction", "bert": "classification", "vit": "image"}


@pytest.fixture(scope="module")
def data(texts: Encoded, tasks: Encoded) -> dict[str, Encoded]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 12, 3), dtype=np.uint8)
    images = Rows("image", list(pixels), [i % 3 for i in range(12)], [""] * 12)
    return {
        "classification": texts,
        "instruction": tasks,
        "image": encode(images, tiny.image_processor(), DataConfig()),
    }


def settings(engine: dict[str, Any] | None = None, **local: Any) -> TrainingSettings:
    # SGD moves by the gradient itself: AdamW would make a whole step of a rounding error near zero.
    own = LOCAL.model_copy(update={"optimizer": "sgd", "learning_rate": 0.3, **local})
    return TrainingSettings(local=own, engine=EngineConfig(name="sequential", **(engine or {})))


def trained(model: FederatedModel, data: Encoded, chosen: TrainingSettings, sent: Broadcast) -> LocalResult:
    return train(model, Assignment("client-0", sent, np.arange(len(data)), 3, 1.0), data, chosen, 0)


def close(one: LocalResult, other: LocalResult, sent: Broadcast) -> None:
    before = start_of(sent)
    x, y = tensors(one), tensors(other)
    moved = torch.stack([(y[name] - before[name]).norm() for name in y]).norm()
    error = torch.stack([(x[name] - y[name]).norm() for name in y]).norm()
    assert moved > 0
    assert error < 1e-4 * moved
    assert abs(one.train_loss - other.train_loss) < 1e-5 * abs(other.train_loss)


@contextmanager
def rows_seen(model: FederatedModel) -> Iterator[list[int]]:
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(next(iter(inputs.values())))), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("parts", [2, 3, 100])
def test_a_batch_in_parts_is_the_batch(
    bases: dict[str, Path], data: dict[str, Encoded], name: str, parts: int, tmp_path: Path
) -> None:
    """Answers have unequal lengths and 4 rows do not divide by 3: each part counts by what it holds."""
    kind = KINDS[name]
    model = tiny.load(tiny.save(name, tmp_path / name, **STILL) if name == "bert" else bases[name], kind)
    sent = tiny.broadcast(model)
    whole = trained(model, data[kind], settings(), sent)
    with rows_seen(model) as seen:
        cut = trained(model, data[kind], settings(accumulate=parts), sent)
    assert max(seen) == -(-4 // min(parts, 4))
    assert sum(seen) == 3 * 4
    close(cut, whole, sent)


def test_parts_count_by_their_answers(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    """A mean of the parts' means is another training: the test above could tell."""
    model = tiny.load(bases["llama"], "instruction")
    sent = tiny.broadcast(model)
    whole, one = (trained(model, data["instruction"], settings(accumulate=n), sent) for n in (1, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedspan.client.batching.Part.count", 1)
        other = trained(model, data["instruction"], settings(accumulate=4), sent)
    close(one, whole, sent)
    with pytest.raises(AssertionError):
        close(other, whole, sent)


@pytest.mark.parametrize("recipe", [Recipe(tail_penalty=(0.1, 1)), Recipe(train_a=False), Recipe(proximal=0.1)])
def test_a_batch_in_parts_under_other_recipes(bases: dict[str, Path], tasks: Encoded, recipe: Recipe) -> None:
    """A penalty counts once for each step, however many parts it has."""
    model = tiny.load(bases["llama"], "instruction")
    sent = replace(tiny.broadcast(model), recipe=recipe)
    whole, cut = (trained(model, tasks, settings(accumulate=n), sent) for n in (1, 2))
    close(cut, whole, sent)


def test_whole_weights_in_parts(bases: dict[str, Path], tasks: Encoded) -> None:
    model = tiny.load(bases["llama"], "instruction", trains="targets")
    sent = tiny.broadcast(model)
    whole, cut = (trained(model, tasks, settings(accumulate=n), sent) for n in (1, 2))
    close(cut, whole, sent)


class Saved:
    """Counts the bytes that autograd keeps for a backward pass."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit_and_keeps_less(
    bases: dict[str, Path], data: dict[str, Encoded], name: str, dropout: float
) -> None:
    kind = KINDS[name]
    model = tiny.load(bases[name], kind, dropout=dropout)
    plain, held, sent = Saved(), Saved(), tiny.broadcast(model)
    with torch.autograd.graph.saved_tensors_hooks(plain, lambda x: x):
        wanted = trained(model, data[kind], settings(), sent)
    with torch.autograd.graph.saved_tensors_hooks(held, lambda x: x):
        found = trained(model, data[kind], settings({"checkpointing": True}), sent)
    tiny.same(tensors(found), tensors(wanted))
    assert found.train_loss == wanted.train_loss
    assert held.bytes < 0.6 * plain.bytes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.model.modules())


def test_neither_is_done_in_a_cohort(bases: dict[str, Path], tasks: Encoded) -> None:
    model = tiny.load(bases["llama"], "instruction")
    auto = TrainingSettings(local=LocalConfig(accumulate=2), engine=EngineConfig(name="auto"))
    assert "accumulate" in (cohort.applies(model, tasks, Recipe(), auto) or "")
    auto = TrainingSettings(engine=EngineConfig(name="auto", checkpointing=True))
    assert "checkpointing" in (cohort.applies(model, tasks, Recipe(), auto) or "")


def test_checkpointing_that_cannot_be_is_refused(bases: dict[str, Path]) -> None:
    from fedspan.config import Config
    from fedspan.federation import requirements

    asked = Config.model_validate({"engine": {"checkpointing": True}, "privacy": {"dp": "example"}})
    with pytest.raises(FedspanError, match=r"checkpointing with privacy\.dp = 'example'"):
        requirements.chosen(asked)
