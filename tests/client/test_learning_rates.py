"""Learning rates over a federation's rounds, and those of groups of parameters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from local_training import differ, start_of, tensors, texts, work

import fedspan
from fedspan.client import cohort
from fedspan.client.learning_rates import check_groups, rate, round_factor
from fedspan.client.training import Assignment, TrainingSettings, train
from fedspan.config import LocalConfig, PrivacyConfig, from_mapping
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Recipe
from fedspan.models import FederatedModel
from fedspan.support.errors import FedspanError

__all__ = ["texts"]

SGD = LocalConfig(optimizer="sgd", learning_rate=1e-1, batch_size=8, clip_norm=None)


@pytest.fixture(scope="module")
def model(bases: dict[str, Path]) -> FederatedModel:
    return tiny.load(bases["bert"], "classification")


def test_factors_over_the_rounds() -> None:
    constant, warm = LocalConfig(), LocalConfig(warmup_rounds=4)
    assert {round_factor(constant, r) for r in range(30)} == {1.0}
    assert [round_factor(warm, r) for r in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    linear = LocalConfig(schedule="linear", schedule_rounds=6, warmup_rounds=2)
    assert [round_factor(linear, r) for r in range(8)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.25, 0.25]
    cosine = LocalConfig(schedule="cosine", schedule_rounds=4)
    expected = [0.5 * (1 + math.cos(math.pi * r / 4)) for r in range(4)]
    assert [round_factor(cosine, r) for r in range(4)] == pytest.approx(expected)
    # Every round of every schedule trains: no factor is zero.
    for rounds in (1, 2, 300):
        assert round_factor(LocalConfig(schedule="linear", schedule_rounds=rounds), rounds - 1) > 0
        assert round_factor(LocalConfig(schedule="cosine", schedule_rounds=rounds), rounds - 1) > 0


def test_a_rate_is_the_product_of_both_courses() -> None:
    local = LocalConfig(learning_rate=0.8, warmup=0.5, schedule="linear", schedule_rounds=4)
    assert [rate(local, step, 4, 2) for step in range(4)] == pytest.approx([0.2, 0.4, 0.4, 0.4])
    assert rate(LocalConfig(learning_rate=0.3), 0, 1, 7) == 0.3  # to the bit


def test_the_rounds_of_a_schedule_are_written_down() -> None:
    """An extended run must go on with the schedule that it began with."""
    assert from_mapping({"local": {"schedule": "linear"}, "federation": {"rounds": 7}}).local.schedule_rounds == 7
    assert from_mapping({"local": {"lr_scheduler_type": "cosine"}}).local.schedule_rounds == 12
    assert from_mapping({"local": {"schedule": "linear", "schedule_rounds": 3}}).local.schedule_rounds == 3
    assert from_mapping({"federation": {"rounds": 7}}).local.schedule_rounds is None
    with pytest.raises(FedspanError, match=r"local.warmup_rounds = 7: expected fewer than the 7 rounds"):
        from_mapping({"local": {"schedule": "linear", "warmup_rounds": 7}, "federation": {"rounds": 7}})


def started(model: FederatedModel) -> Broadcast:
    return Broadcast(tiny.random_adapter(model, 4, 0, scaling=0.5), model.dense(), Recipe())


def moved(model: FederatedModel, sent: Broadcast, data: Encoded, local: LocalConfig) -> dict[str, torch.Tensor]:
    after, before = tensors(work(model, sent, data, local, steps=1)), start_of(sent)
    return {name: after[name] - before[name] for name in after}


def test_groups_take_steps_of_their_own_rates(model: FederatedModel, texts: Encoded) -> None:
    """A step of SGD is its rate times the gradient: LoRA+ multiplies those of B alone; the heads have their own."""
    sent = started(model)
    plain = moved(model, sent, texts, SGD)
    own = moved(model, sent, texts, SGD.model_copy(update={"lora_plus_ratio": 4.0, "head_learning_rate": 5e-2}))
    factors = {name: 0.5 if name in model.dense() else 4.0 if name.endswith("b") else 1.0 for name in plain}
    assert set(factors.values()) == {0.5, 4.0, 1.0}
    for name, factor in factors.items():
        assert plain[name].abs().max() > 0, name
        torch.testing.assert_close(own[name], factor * plain[name], rtol=1e-3, atol=5e-6)


def test_one_group_gives_the_bits_that_it_always_gave(model: FederatedModel, texts: Encoded) -> None:
    sent = started(model)
    plain = tensors(work(model, sent, texts, LocalConfig(learning_rate=1e-2), steps=3))
    grouped = LocalConfig(learning_rate=1e-2, head_learning_rate=1e-2, lora_plus_ratio=1.0)
    assert not differ(plain, tensors(work(model, sent, texts, grouped, steps=3)))


def test_a_cohort_follows_the_schedule_as_each_client_alone(model: FederatedModel, texts: Encoded) -> None:
    local = SGD.model_copy(update={"schedule": "cosine", "schedule_rounds": 5, "warmup_rounds": 1})
    settings = TrainingSettings(local=local).with_engine("cohort")
    rows = torch.arange(12).numpy()
    group = [Assignment(f"client-{k}", started(model), rows[k : k + 8], 2, 1.0) for k in range(2)]
    together = cohort.work(model, texts, group, settings, 3)
    for a, found in zip(group, together, strict=True):
        alone = train(model, a, texts, replace(settings, engine=settings.engine), 3)
        assert found.update.rate_sum == alone.update.rate_sum
        for name, value in tensors(alone).items():
            torch.testing.assert_close(tensors(found)[name], value, rtol=1e-4, atol=1e-5)


def test_groups_are_refused_where_there_are_none() -> None:
    plus, none = LocalConfig(lora_plus_ratio=16.0), PrivacyConfig()
    check_groups(plus, Recipe(), "adapter", none)
    check_groups(LocalConfig(head_learning_rate=1e-3), Recipe(), "targets", none)
    for recipe, trains, privacy, message in (
        (Recipe(), "targets", none, "trains no factor B"),
        (Recipe(confined=True), "adapter", none, "trains no factor B"),
        (Recipe(train_b=False), "adapter", none, "trains no factor B"),
        (Recipe(corrected=True), "adapter", none, "corrections assume one learning rate"),
        (Recipe(), "adapter", PrivacyConfig(dp="example"), "one vector"),
    ):
        with pytest.raises(FedspanError, match=message):
            check_groups(plus, recipe, trains, privacy)


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    bases: dict[str, Path], texts_file: Path, tmp_path: Path
) -> None:
    local = {"schedule": "cosine", "warmup_rounds": 1, "head_learning_rate": 2e-2, "lora_plus_ratio": 4.0}
    evaluation = {"base": False, "per_rank": False}
    config = tiny.config(
        bases["bert"], texts_file, "flora", local=local, federation={"rounds": 3}, evaluation=evaluation
    )

    def stop(event: Any) -> None:
        if event.kind == "round":
            raise KeyboardInterrupt

    straight = fedspan.run(config, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        fedspan.run(config, tmp_path / "stopped", stop)
    resumed = fedspan.resume(tmp_path / "stopped")
    weights = [(run.out / "adapter" / "adapter_model.safetensors").read_bytes() for run in (straight, resumed)]
    assert weights[0] == weights[1]
    constant = tiny.config(bases["bert"], texts_file, "flora", federation={"rounds": 3}, evaluation=evaluation)
    other = fedspan.run(constant, tmp_path / "constant")
    assert (other.out / "adapter" / "adapter_model.safetensors").read_bytes() != weights[0]


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", tiny.words(40))
