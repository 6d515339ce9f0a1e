"""Laws of what a server may ask of a client's work beyond training a LoRA adapter freely with AdamW."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from local_training import LOCAL, differ, start_of, tasks, tensors, texts, work
from torch import Tensor

from fedspan.client.batching import batches
from fedspan.client.cohort import work as work_together
from fedspan.client.grouping import plan
from fedspan.client.shared_payloads import PayloadCache, SharedPayloads, get_result, put_result
from fedspan.client.training import Assignment, LocalResult, TrainingSettings, work_on
from fedspan.config import EngineConfig, LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Factors, GaloreOptions, Recipe, Subspace, Update, Vector
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.support.seeding import generator
from fedspan.wire import packing

__all__ = ["tasks", "texts"]  # the fixtures
SGD = LocalConfig(optimizer="sgd", learning_rate=1e-2, batch_size=4, clip_norm=None)


def asked(model: FederatedModel, data: Encoded, recipe: Recipe, config: LocalConfig = LOCAL) -> LocalResult:
    given = Assignment("client-0", tiny.broadcast(model, recipe=recipe), np.arange(len(data)), 3, 2.0)
    return work_on(model, given, data, TrainingSettings(local=config), 0)


@pytest.mark.parametrize(("name", "probe"), [("llama", 1), ("llama", 3), ("gpt2", 2)])
def test_a_gradient_is_the_loss_s_by_the_base_weight_and_trains_nothing(
    bases: dict[str, Path], tasks: Encoded, name: str, probe: int
) -> None:
    model = tiny.load(bases[name], "instruction", dropout=0.3)
    result = asked(model, tasks, Recipe(gradient=True, probe_batches=probe))
    assert (result.update.num_examples, dict(result.update.dense)) == (2.0, {})
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    # A small adapter of full rank around the broadcast's: the loss's derivative along a random direction.
    sent = tiny.broadcast(model)
    rng = generator("direction")
    direction = {n: torch.randn(shape, generator=rng) for n, shape in model.modules().items()}
    key = (0, 0, "client-0", "gradient")
    schedule = list(batches(len(tasks), 4, probe, generator(*key, "batches")))

    def loss(size: float) -> float:
        model.load(replace(sent, patch={n: size * d for n, d in direction.items()}))
        model.model.eval()
        with torch.no_grad():
            return sum(float(client_losses(model, tasks.batch(i)).sum()) for i in schedule) / probe

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    found = 0.0
    for n, d in direction.items():
        payload = result.update.modules[n]
        assert isinstance(payload, Vector)
        assert payload.values["gradient"].shape == model.modules()[n]
        found += float((payload.values["gradient"] * d).sum())
    assert found == pytest.approx(slope, rel=0.02)
    model.load(sent)
    tiny.same_adapter(model.adapter(), sent.adapter)


def test_a_gradient_of_trained_weights_goes_by_their_own_names(bases: dict[str, Path], texts: Encoded) -> None:
    model = tiny.load(bases["bert"], "classification", trains="targets")
    result = asked(model, texts, Recipe(gradient=True))
    assert set(result.update.modules) == model.projected
    assert set(model.template(4, 8.0, False, 0).modules) == model.projected
    assert any(float(p.values["gradient"].norm()) > 0 for p in result.update.modules.values())


def orthonormal(rows: int, columns: int, *key: object) -> Tensor:
    q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator("basis", *key)))[0]
    return q


def test_what_is_confined_moves_in_its_subspace_alone(bases: dict[str, Path], tasks: Encoded) -> None:
    model = tiny.load(bases["llama"], "instruction", trains="targets")
    spaces = {}
    for i, (name, shape) in enumerate(sorted(model.template(4, 8.0, False, 0).modules.items())):
        side = ("left", "right")[i % 2]
        spaces[name] = Subspace(orthonormal(shape[i % 2], 3, name), side)
    sent = tiny.broadcast(model, subspaces=spaces, recipe=Recipe(confined=True))
    result = work(model, sent, tasks)
    for name, space in spaces.items():
        step = result.update.dense[name] - sent.dense[name]
        assert float(step.norm()) > 0
        torch.testing.assert_close(space.expand(space.coordinates(step)), step, rtol=0, atol=1e-6)
    numbers = sum(3 * sent.dense[n].shape[1 - (s.side == "right")] for n, s in spaces.items())
    free = sum(t.numel() for n, t in sent.dense.items() if n not in spaces)
    assert result.optimizer_bytes == 2 * 4 * (numbers + free)


def test_adam_in_a_subspace_is_adam_on_its_coordinates(bases: dict[str, Path], tasks: Encoded) -> None:
    """With a permutation as basis the coordinates are the rows themselves, and AdamW works row by row."""
    model = tiny.load(bases["llama"], "instruction", trains="targets")
    modules = model.template(4, 8.0, False, 0).modules
    spaces = {
        name: Subspace(torch.eye(m)[torch.randperm(m, generator=generator(name))]) for name, (m, _) in modules.items()
    }
    plain = tiny.broadcast(model)
    free = work(model, plain, tasks)
    confined = work(model, replace(plain, subspaces=spaces, recipe=Recipe(confined=True)), tasks)
    for name, value in tensors(free).items():
        torch.testing.assert_close(tensors(confined)[name], value, rtol=0, atol=1e-5)


def test_a_factor_may_be_confined_too(bases: dict[str, Path], tasks: Encoded) -> None:
    model = tiny.load(bases["llama"], "instruction")
    adapter = tiny.random_adapter(model, 4)
    spaces = {f"{n}/a": Subspace(orthonormal(k, 2, n), "right") for n, (_, k) in model.modules().items()}
    recipe = Recipe(train_b=False, confined=True)
    sent = tiny.broadcast(model, adapter, subspaces=spaces, recipe=recipe)
    result = work(model, sent, tasks)
    for name, f in adapter.items():
        after, space = result.update.factors(name), spaces[f"{name}/a"]
        assert torch.equal(after.b, f.b)
        step = after.a - f.a
        assert float(step.norm()) > 0
        torch.testing.assert_close(space.expand(space.coordinates(step)), step, rtol=0, atol=1e-6)


def test_a_proximal_term_pulls_back_to_what_was_sent(bases: dict[str, Path], tasks: Encoded) -> None:
    """Under SGD a step is −lr·(g + μ(x − x₀)): known exactly for two steps on the same batch."""
    model = tiny.load(bases["llama"], "instruction")
    one_batch = tasks.subset(range(4))
    free = [tensors(work(model, tiny.broadcast(model), one_batch, SGD, steps=k)) for k in (1, 2)]
    sent = tiny.broadcast(model, recipe=Recipe(proximal=5.0))
    held = [tensors(work(model, sent, one_batch, SGD, steps=k)) for k in (1, 2)]
    assert not differ(free[0], held[0])  # at the start there is nothing to pull
    for name, x0 in start_of(sent).items():
        pulled = free[1][name] - SGD.learning_rate * 5.0 * (free[0][name] - x0)
        torch.testing.assert_close(held[1][name], pulled, rtol=1e-6, atol=1e-6)
    none = work(model, tiny.broadcast(model, recipe=Recipe(proximal=0.0)), one_batch, SGD, steps=2)
    assert not differ(tensors(none), free[1])


def test_a_correction_joins_the_clipped_gradients(bases: dict[str, Path], tasks: Encoded) -> None:
    model = tiny.load(bases["llama"], "instruction", trains="targets")
    config = SGD.model_copy(update={"clip_norm": 0.01, "warmup": 1 / 3})
    plain = tiny.broadcast(model)
    name = sorted(model.projected)[0]
    push = torch.ones_like(plain.dense[name])
    free = work(model, plain, tasks, config, steps=1)
    pushed = work(model, replace(plain, correction={name: push}), tasks, config, steps=1)
    moved = tensors(pushed)[name] - tensors(free)[name]
    torch.testing.assert_close(moved, -config.learning_rate * push, rtol=1e-4, atol=1e-7)
    assert differ(tensors(free), tensors(pushed)) == {name}
    warm = work(model, plain, tasks, config.model_copy(update={"warmup": 2 / 3}), steps=3)
    assert warm.update.rate_sum == pytest.approx(config.learning_rate * (0.5 + 1 + 1))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clients_trained_together_step_as_each_alone(bases: dict[str, Path], tasks: Encoded, optimizer: str) -> None:
    config = TrainingSettings(local=LocalConfig(optimizer=optimizer, learning_rate=1e-2, batch_size=4))
    model = tiny.load(bases["llama"], "instruction")
    given = [
        Assignment(f"c{k}", tiny.broadcast(model, tiny.random_adapter(model, 2 + k)), np.arange(k, 20), 2 + k, 1.0)
        for k in range(3)
    ]
    alone = [work_on(model, a, tasks, config, 0) for a in given]
    together = replace(config, engine=EngineConfig(name="cohort", cohort_size=3))
    groups = plan(model, tasks, given, together)
    assert [len(g) for g in groups] == [3]
    results = work_together(model, tasks, [given[i] for i in groups[0]], together, 0)
    for i, result in zip(groups[0], results, strict=True):
        for name, value in tensors(alone[i]).items():
            torch.testing.assert_close(tensors(result)[name], value, rtol=1e-3, atol=1e-5)
        assert result.optimizer_bytes == alone[i].optimizer_bytes
        assert result.update.rate_sum == pytest.approx(alone[i].update.rate_sum)


def test_a_cohort_lets_everyone_answer_for_a_gradient_alone(bases: dict[str, Path], tasks: Encoded) -> None:
    config = TrainingSettings(engine=EngineConfig(name="cohort"))
    model = tiny.load(bases["llama"], "instruction")
    sent = tiny.broadcast(model, recipe=Recipe(gradient=True))
    given = [Assignment(f"c{k}", sent, np.arange(20), 2, 1.0) for k in range(3)]
    groups = plan(model, tasks, given, config)
    assert sorted(groups) == [[0], [1], [2]]
    (result,) = work_together(model, tasks, [given[1]], config, 0)
    assert isinstance(next(iter(result.update.modules.values())), Vector)


def crossed(message: Any, tensors: list[Tensor]) -> tuple[Any, list[Tensor]]:
    head, buffer = packing.pack(message, tensors)
    return packing.unpack(json.loads(head), buffer)


def test_all_that_is_asked_and_answered_crosses_between_processes() -> None:
    x = {k: torch.randn(3, 2, generator=generator(k)) for k in "abcdef"}
    recipe = Recipe(
        False, True, GaloreOptions(4, 3, 0.5, "power", "right", "project"), (0.5, 2), 0.1, True, True, probe_batches=7
    )
    sent = Broadcast(
        {"m": Factors(x["a"], x["b"].T, 2.0)},
        {"head": x["c"]},
        recipe,
        {"m": x["d"]},
        seeded=frozenset({"subspaces"}),
        correction={"head": x["e"]},
        subspaces={"m/a": Subspace(x["f"], "right")},
        moments={"m/b": x["a"]},
    )
    given = Assignment("c", sent, np.arange(3), 4, 1.5)
    shared, packed = SharedPayloads(), packing.TensorList()
    shared.expect([sent])
    got = PayloadCache().assignment(*crossed(shared.assignment(packed, set(), given), packed.tensors)).broadcast
    assert got.recipe == recipe
    assert got.seeded == sent.seeded
    for one, other in ((got.correction, sent.correction), (got.moments, sent.moments), (got.dense, sent.dense)):
        tiny.same(one, other)
    assert got.subspaces["m/a"].side == "right"
    assert torch.equal(got.subspaces["m/a"].basis, x["f"])

    update = Update("c", 2.0, {"m": Vector({"g": x["b"]}), "n": sent.adapter["m"]}, {"h": x["c"]}, {"m": x["d"]}, 0.25)
    packed = packing.TensorList()
    back = get_result(*crossed(put_result(packed, LocalResult(update, 0.5, 3, 99)), packed.tensors))
    assert (back.steps, back.optimizer_bytes, back.update.rate_sum) == (3, 99, 0.25)
    assert torch.equal(back.update.modules["m"].values["g"], x["b"])
    assert torch.equal(back.update.factors("n").b, x["a"])
    tiny.same(back.update.moments, update.moments)
