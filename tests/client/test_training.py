"""Laws of a client's local work: it depends on its key alone, and moves only what the recipe says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_training import LOCAL, differ, start_of, tasks, tensors, texts, work
from torch import Tensor

from fedspan import config as settings
from fedspan.client.batching import batches
from fedspan.client.training import Assignment, TrainingSettings, num_steps, train
from fedspan.config import EngineConfig, LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, GaloreOptions, Recipe
from fedspan.models import FederatedModel
from fedspan.support.seeding import generator

__all__ = ["tasks", "texts"]  # the fixtures


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_key_gives_the_same_bits_whatever_ran_before(
    bases: dict[str, Path], tasks: Encoded, dropout: float
) -> None:
    model = tiny.load(bases["llama"], "instruction", dropout=dropout)
    sent = tiny.broadcast(model)
    first = work(model, sent, tasks)
    torch.manual_seed(99)
    work(model, tiny.broadcast(model, tiny.random_adapter(model, 7)), tasks, client="client-9", steps=2)
    torch.randn(10)
    again = work(model, sent, tasks)
    tiny.same(tensors(first), tensors(again))
    assert first.train_loss == again.train_loss
    fresh = tiny.load(bases["llama"], "instruction", dropout=dropout)
    tiny.same(tensors(work(fresh, sent, tasks)), tensors(first))


def test_another_client_round_or_seed_sees_other_batches_and_other_dropout(
    bases: dict[str, Path], tasks: Encoded
) -> None:
    model = tiny.load(bases["llama"], "instruction")
    sent = tiny.broadcast(model)
    one = tensors(work(model, sent, tasks))
    for other in ({"client": "client-1"}, {"key": (0, 1)}, {"key": (1, 0)}):
        assert differ(one, tensors(work(model, sent, tasks, **other)))
    # With one example the batches are the same: dropout alone tells the clients apart.
    model = tiny.load(bases["llama"], "instruction", dropout=0.3)
    one, other = (tensors(work(model, sent, tasks.subset([0]), client=client)) for client in ("client-0", "client-1"))
    assert differ(one, other)


def test_training_leaves_the_global_generator_alone(bases: dict[str, Path], tasks: Encoded) -> None:
    model = tiny.load(bases["llama"], "instruction", dropout=0.3)
    state = torch.get_rng_state()
    work(model, tiny.broadcast(model), tasks)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.model.training


@pytest.mark.parametrize(("train_a", "train_b"), [(True, True), (False, True), (True, False)])
def test_only_what_the_recipe_trains_moves(
    bases: dict[str, Path], texts: Encoded, train_a: bool, train_b: bool
) -> None:
    model = tiny.load(bases["bert"], "classification")
    base = {name: p.detach().clone() for name, p in model.model.named_parameters() if "base_layer" in name}
    base |= {n: p.detach().clone() for n, p in model.model.named_parameters() if "embeddings" in n or "LayerNorm" in n}
    sent = tiny.broadcast(model, recipe=Recipe(train_a=train_a, train_b=train_b))
    moved = differ(start_of(sent), tensors(work(model, sent, texts, steps=2)))
    frozen = ("/a",) * (not train_a) + ("/b",) * (not train_b)
    expected = {name for name in start_of(sent) if not name.endswith(frozen)}
    assert moved == expected
    assert "bert.pooler.dense.weight" in moved
    tiny.same({name: p.detach() for name, p in model.model.named_parameters() if name in base}, base)


def test_a_factor_frozen_for_one_client_is_free_for_the_next(bases: dict[str, Path], texts: Encoded) -> None:
    model = tiny.load(bases["bert"], "classification")
    half, whole = (tiny.broadcast(model, recipe=Recipe(train_a=train_a)) for train_a in (False, True))
    work(model, half, texts)
    assert any(name.endswith("/a") for name in differ(start_of(whole), tensors(work(model, whole, texts))))


def test_an_update_is_no_view_of_the_model(bases: dict[str, Path], texts: Encoded) -> None:
    model = tiny.load(bases["bert"], "classification")
    sent = tiny.broadcast(model)
    before = {name: t.clone() for name, t in start_of(sent).items()}
    first = tensors(work(model, sent, texts))
    kept = {name: t.clone() for name, t in first.items()}
    work(model, sent, texts, client="client-1")
    tiny.same(first, kept)
    tiny.same(start_of(sent), before)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_galore_moves_each_target_in_a_space_of_its_rank(bases: dict[str, Path], texts: Encoded, base: str) -> None:
    """GaLore is really active: with one projector a round, every projected ΔW has at most that rank."""
    model = tiny.load(bases[base], "classification", trains="targets")
    start, rank, config = model.dense(), 3, LOCAL.model_copy(update={"clip_norm": None})
    galore = GaloreOptions(rank=rank, update_gap=50, scale=1.0)
    moved = work(model, Broadcast({}, start, Recipe(galore=galore)), texts, config, steps=6).update.dense
    free = work(model, Broadcast({}, start), texts, config, steps=6).update.dense
    assert model.projected
    for name in sorted(model.projected):
        values = torch.linalg.svdvals((moved[name] - start[name]).double())
        assert values[rank] < 1e-4 * values[0], name
        values = torch.linalg.svdvals((free[name] - start[name]).double())
        assert values[rank] > 1e-2 * values[0], name


def test_galore_leaves_heads_to_plain_adamw(bases: dict[str, Path], texts: Encoded) -> None:
    """With one step, where the other weights' paths cannot reach them, heads move exactly as without GaLore."""
    model = tiny.load(bases["bert"], "classification", trains="targets")
    start, config = model.dense(), LOCAL.model_copy(update={"clip_norm": None, "weight_decay": 0.1})
    plain, scaled = (
        work(model, Broadcast({}, start, recipe), texts, config, steps=1).update.dense
        for recipe in (Recipe(), Recipe(galore=GaloreOptions(rank=2, scale=0.25)))
    )
    heads = set(start) - model.projected
    assert heads == {f"{h}.{part}" for h in model.heads for part in ("weight", "bias")}
    for name in heads:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(scaled[name], start[name])
    assert all(not torch.allclose(scaled[name], plain[name], atol=1e-4) for name in model.projected)


@pytest.mark.parametrize(
    "change", [{"rank": 5}, {"update_gap": 1}, {"scale": 0.5}, {"svd": "exact"}, {"on_refresh": "reset"}]
)
def test_every_option_of_galore_reaches_the_optimizer(
    bases: dict[str, Path], texts: Encoded, change: dict[str, Any]
) -> None:
    model = tiny.load(bases["bert"], "classification", trains="targets", target_modules=("query",))
    start, options = model.dense(), {"rank": 3, "update_gap": 2}
    one, other = (
        work(model, Broadcast({}, start, Recipe(galore=GaloreOptions(**o))), texts, steps=5).update.dense
        for o in (options, {**options, **change})
    )
    assert differ(dict(one), dict(other)) >= model.projected


def test_galore_draws_from_the_key(bases: dict[str, Path], texts: Encoded) -> None:
    model = tiny.load(bases["bert"], "classification", trains="targets")
    sent = Broadcast({}, model.dense(), Recipe(galore=GaloreOptions(rank=3)))
    state = torch.get_rng_state()
    tiny.same(tensors(work(model, sent, texts)), tensors(work(model, sent, texts)))
    assert torch.equal(torch.get_rng_state(), state)


def first_step(model: FederatedModel, sent: Broadcast, data: Encoded, **changes: Any) -> dict[str, Tensor]:
    after = tensors(work(model, sent, data, LOCAL.model_copy(update=changes), steps=1))
    return {name: after[name] - t for name, t in start_of(sent).items()}


def test_clipping_bounds_the_gradient_of_all_parameters_together(
    bases: dict[str, Path], texts: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.load(bases["bert"], "classification")
    sent = tiny.broadcast(model)
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        squares = [p.grad.square().sum() for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(torch.stack(squares).sum().sqrt()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for clip in (None, 0.01, 1e6):
        work(model, sent, texts, LOCAL.model_copy(update={"clip_norm": clip}), steps=1)
    free, clipped, loose = seen
    assert free > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)
    assert loose == pytest.approx(free)


def test_the_learning_rate_rises_linearly_over_the_warmup(
    bases: dict[str, Path], texts: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.load(bases["bert"], "classification")
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.extend({group["lr"] for group in self.param_groups})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for warmup, expected in ((0.5, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]), (0.0, [1] * 8)):
        rates.clear()
        work(model, tiny.broadcast(model), texts, LOCAL.model_copy(update={"warmup": warmup}), steps=8)
        assert rates == pytest.approx([1e-2 * share for share in expected])


def test_the_first_step_of_adamw_is_the_learning_rate(bases: dict[str, Path], texts: Encoded) -> None:
    """Twice the rate is twice the step, and no entry moves by more than the rate (weight decay aside)."""
    model = tiny.load(bases["bert"], "classification")
    sent = tiny.broadcast(model)
    one, two = (first_step(model, sent, texts, learning_rate=rate) for rate in (1e-3, 2e-3))
    for name, delta in one.items():
        assert float(delta.abs().max()) <= 1.01e-3
        torch.testing.assert_close(two[name], 2 * delta, rtol=1e-3, atol=2e-6)
    assert differ(first_step(model, sent, texts, weight_decay=0.5), first_step(model, sent, texts, weight_decay=0.0))


def test_the_tail_penalty_shrinks_the_tail(bases: dict[str, Path], texts: Encoded) -> None:
    model = tiny.load(bases["bert"], "classification")

    def tail(strength: float) -> float:
        sent = tiny.broadcast(model, recipe=Recipe(tail_penalty=(strength, 3)))
        update = work(model, sent, texts, steps=5).update
        pairs = [update.factors(name) for name in update.modules]
        return float(sum(f.b[:, 3:].norm() * f.a[3:].norm() for f in pairs))

    assert tail(10.0) < 0.95 * tail(0.0)


@pytest.mark.parametrize("base", ["llama", "gpt2", "bert", "vit"])
def test_the_loss_falls_on_a_task_that_can_be_learnt(
    bases: dict[str, Path], texts: Encoded, tasks: Encoded, base: str
) -> None:
    kind = tiny.KIND[base]
    if kind == "image":
        labels = torch.arange(24) % 3
        noise = 0.1 * torch.randn(24, 3, 16, 16, generator=generator("pixels"))
        pixels = labels[:, None, None, None].float() - 1 + noise
        data = Encoded("image", torch.arange(24), labels.tolist(), [""] * 24, None, pixels, labels)
    else:
        data = tasks if kind == "instruction" else texts
    model = tiny.load(bases[base], kind)
    sent = tiny.broadcast(model, tiny.random_adapter(model, 4, scaling=0.0))
    sent = replace(sent, adapter={n: replace(f, b=f.b * 0, scaling=2.0) for n, f in sent.adapter.items()})
    config = LOCAL.model_copy(update={"batch_size": 24})
    first = work(model, sent, data, config, steps=1).train_loss
    thirty = work(model, sent, data, config, steps=30)
    model.load(replace(sent, adapter=thirty.update.modules, dense=thirty.update.dense))
    with torch.no_grad():
        last = float(model.model(**data.batch(range(24))).loss)
    assert last < 0.6 * first
    assert thirty.train_loss < first
    assert thirty.steps == 30


@given(num=st.integers(1, 40), size=st.integers(1, 50), steps=st.integers(0, 30), seed=st.integers(0, 2**32))
def test_batches_go_through_the_data_without_replacement(num: int, size: int, steps: int, seed: int) -> None:
    """Exactly `steps` batches; every pass sees each example once; only the last batch of a pass is short."""
    found = list(batches(num, size, steps, generator(seed)))
    assert len(found) == steps
    assert found == list(batches(num, size, steps, generator(seed)))
    per_pass = -(-num // min(size, num))
    for start in range(0, steps, per_pass):
        part = found[start : start + per_pass]
        flat = [i for batch in part for i in batch]
        assert len(set(flat)) == len(flat)
        assert set(flat) <= set(range(num))
        if len(part) == per_pass:
            assert set(flat) == set(range(num))
        assert all(len(batch) == min(size, num) for batch in part[: per_pass - 1])


def test_passes_are_shuffled_anew() -> None:
    found = list(batches(30, 30, 3, generator(1)))
    assert len({tuple(batch) for batch in found}) == 3


def test_steps_and_epochs() -> None:
    assert num_steps(LocalConfig(), 1000) == num_steps(LocalConfig(), 1) > 0
    assert num_steps(LocalConfig(steps=7), 3) == 7
    assert num_steps(LocalConfig(epochs=3, batch_size=4), 9) == 9
    assert num_steps(LocalConfig(epochs=2, batch_size=16), 3) == 2
    with pytest.raises(ValueError, match="not both"):
        settings.from_mapping({"local": {"steps": 1, "epochs": 1}})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU with a C++ compiler")
def test_compiled_is_the_same_to_rounding(bases: dict[str, Path], tasks: Encoded) -> None:
    """And only training is compiled: what is used afterwards is the model itself."""
    model = tiny.load(bases["llama"], "instruction", target_modules=("v_proj",))
    sent = Assignment("client-0", tiny.broadcast(model), np.arange(8), 2, 1.0)
    local = LocalConfig(learning_rate=1e-3, batch_size=4)
    plain = train(model, sent, tasks, TrainingSettings(local=local), 0)
    forward = model.model.base_model.forward
    compiled = train(model, sent, tasks, TrainingSettings(local=local, engine=EngineConfig(compile=True)), 0)
    assert model.model.base_model.forward == forward
    assert abs(plain.train_loss - compiled.train_loss) < 1e-5
    for name, value in tensors(plain).items():
        torch.testing.assert_close(tensors(compiled)[name], value, rtol=1e-3, atol=1e-4)


def test_autocast_rounds_the_products_alone(bases: dict[str, Path], tasks: Encoded) -> None:
    """The loss is near, not equal; what is trained stays in float32."""
    model = tiny.load(bases["llama"], "instruction")
    sent = Assignment("client-0", tiny.broadcast(model), np.arange(8), 2, 1.0)
    plain, coarse = (
        train(model, sent, tasks, TrainingSettings(local=LOCAL, engine=EngineConfig(autocast=kind)), 0)
        for kind in ("none", "bfloat16")
    )
    assert 0 < abs(plain.train_loss - coarse.train_loss) < 0.05 * plain.train_loss
    assert all(value.dtype == torch.float32 for value in tensors(coarse).values())
