"""Rows of different clients share a pass, and examples are clipped by themselves, only where values show it right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from families import FAMILIES
from torch import Tensor

from fedspan.client import cohort
from fedspan.client.training import Assignment, TrainingSettings, train
from fedspan.config import DataConfig, EngineConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.merging.one_shot import merge
from fedspan.methods.messages import Recipe
from fedspan.models import FederatedModel, rowwise
from fedspan.models.federated_model import BatchNorm
from fedspan.models.selection import Selection
from fedspan.models.starting_adapter import start_from
from fedspan.privacy.example_dp import check_layers
from fedspan.support.errors import FedspanError

SETTINGS = TrainingSettings(local=LocalConfig(batch_size=4, optimizer="sgd"), engine=EngineConfig(name="cohort"))


@pytest.fixture(scope="module")
def texts() -> Encoded:
    """Rows of eight tokens."""
    rows = [("abcd" + r["text"][-3:],) for r in tiny.words(8)]
    return encode(Rows("classification", rows, [0, 1, 2, 0, 1, 2, 0, 1], [""] * 8), tiny.tokenizer(), DataConfig())


@pytest.fixture(scope="module")
def sequence_first(tmp_path_factory: pytest.TempPathFactory) -> FederatedModel:
    """XLNet without dropout, whose draws would give it away by their shapes."""
    return of_family("xlnet without dropout", tmp_path_factory)


def of_family(name: str, tmp_path_factory: pytest.TempPathFactory, **changes: Any) -> FederatedModel:
    family = next(family for family in FAMILIES if family.name == name)
    path = family.save(tmp_path_factory.mktemp("base") / "base")
    return tiny.load(path, family.kind, max_rank=4, **changes)


def test_as_many_rows_as_tokens_do_not_pass_for_rows_first(sequence_first: FederatedModel, texts: Encoded) -> None:
    """Two clients of four rows of eight tokens: every shape is right and every update would be wrong."""
    reason = cohort.applies(sequence_first, texts, Recipe(), SETTINGS)
    assert reason is not None
    assert "mixes the rows" in reason
    group = [
        Assignment(f"c{k}", tiny.broadcast(sequence_first, tiny.random_adapter(sequence_first, 4, k)), rows, 1, 1.0)
        for k, rows in enumerate((np.arange(4), np.arange(4, 8)))
    ]
    alone = [train(sequence_first, work, texts, SETTINGS, 0).update for work in group]
    together = [result.update for result in cohort.work(sequence_first, texts, group, SETTINGS, 0)]
    name = next(iter(group[0].broadcast.adapter))
    start = group[1].broadcast.adapter[name].b
    moved = [update.factors(name).b - start for update in (alone[1], together[1])]
    assert float((moved[0] - moved[1]).norm()) > 0.1 * float(moved[0].norm())  # which is why it is refused


def test_examples_that_are_mixed_are_refused_under_example_privacy(
    sequence_first: FederatedModel, texts: Encoded, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(FedspanError, match=r"privacy\.dp = 'example': the model mixes the rows of a batch") as caught:
        check_layers(sequence_first, texts)
    assert "\n" not in str(caught.value)
    with pytest.raises(FedspanError, match="mixes the rows"):  # through the padding behind the shorter ones
        check_layers(of_family("fnet", tmp_path_factory), texts)


@pytest.mark.parametrize("condition", ["rows == tokens", "rows != tokens", "padded"])
def test_mixing_at_one_length_alone_is_found(
    bases: dict[str, Path], texts: Encoded, monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    model = tiny.load(bases["bert"], "classification", max_rank=4)
    assert rowwise.reason_against(model, texts, 2, 2) is None
    assert rowwise.reason_against(model, texts, 4, 1) is None
    layer = model.model.bert.encoder.layer[0]
    monkeypatch.setattr(layer, "forward", _mixing(layer.forward, condition))
    assert "mixes the rows" in str(rowwise.reason_against(model, texts, 2, 2))
    assert "mixes the rows" in str(rowwise.reason_against(model, texts, 4, 1))


def _mixing(forward: Callable[..., Tensor], condition: str) -> Callable[..., Tensor]:
    """Return the layer with the mean over all rows added, where the condition holds."""

    def mixed(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        output = forward(hidden, *args, **options)
        rows, tokens = hidden.shape[:2]
        mask = args[0] if args else options.get("attention_mask")
        holds = {"rows == tokens": rows == tokens, "rows != tokens": rows != tokens and rows > 2}
        holds["padded"] = rows > 2 and mask is not None and bool((mask != mask.flatten()[0]).any())
        return output + output.mean(dim=0, keepdim=True) if holds[condition] else output

    return mixed


def test_batch_norm_keeps_the_statistics_of_the_base(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is trained, evaluated, saved and resumed is one model, and each row is normalised as it would be alone."""
    model = of_family("mobilevit", tmp_path_factory, trains="all")
    kept = {name: b.clone() for name, b in model.model.named_buffers()}
    assert any("running_mean" in name for name in kept)
    images = Encoded(
        "image", torch.arange(4), [0, 1, 2, 0], [""] * 4, None, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    )
    work = Assignment("c", tiny.broadcast(model, {}), np.arange(4), 2, 1.0)
    update = train(model, work, images, SETTINGS, 0).update
    assert any(not torch.equal(update.dense[name], work.broadcast.dense[name]) for name in update.dense)
    tiny.same(dict(model.model.named_buffers()), kept)
    with model.training():
        layers = {type(layer).__name__: layer.training for layer in model.model.modules()}
        assert layers["Dropout"]
        assert not any(layer.training for layer in model.model.modules() if isinstance(layer, BatchNorm))
    assert any("batch normalisation keeps the base's running statistics" in note for note in model.notes)


def test_statistics_in_an_adapter_are_part_of_its_whole_model_and_of_a_start(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """PEFT saves the statistics of a batch normalisation that is trained whole, here as another trainer moved them."""
    import transformers as t

    selection = Selection(modules_to_save=("normalization",))
    model = of_family("mobilevit", tmp_path_factory, selection=selection)
    for name, buffer in model.model.named_buffers():
        buffer += 1 if "num_batches" in name else 0.5
    model.load(tiny.broadcast(model))
    model.save_adapter(tmp_path / "adapter", model.adapter(), model.dense())
    pixels = torch.randn(4, 3, 32, 32)
    wanted = model.model(pixel_values=pixels).logits
    merge([tmp_path / "adapter"], "flora", full=True, out=tmp_path / "whole")
    whole = t.AutoModelForImageClassification.from_pretrained(str(tmp_path / "whole")).eval()
    torch.testing.assert_close(whole(pixel_values=pixels).logits, wanted, rtol=1e-4, atol=1e-5)
    other = of_family("mobilevit", tmp_path_factory, selection=selection, seed=1)
    start_from(other, str(tmp_path / "adapter"))
    other.load(tiny.broadcast(other, tiny.random_adapter(other, 2, scaling=0.0)))
    torch.testing.assert_close(other.model(pixel_values=pixels).logits, wanted, rtol=1e-4, atol=1e-5)
