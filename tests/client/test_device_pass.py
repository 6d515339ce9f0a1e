"""Laws of the fixed-shape passes of a GPU, on a CPU: nothing is recorded there, everything else is the same code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_cohort import CLOSE, KIND, agree, alone, clients, config, data, of_several_runs, smooth, tensors

from fedspan.algebra.lowrank import LowRank
from fedspan.client import cohort, step_plan
from fedspan.client.device_pass import device_pass
from fedspan.client.passes import member
from fedspan.client.step_plan import StepPlan, rounded_up
from fedspan.client.training import Terms, work_on
from fedspan.config import LocalConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Recipe
from fedspan.models import FederatedModel
from fedspan.support.seeding import generator

__all__ = ["data", "smooth"]


@pytest.fixture(params=["whole", "parts"])
def on_device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The cohort as on a GPU, with all rows of a step at once, and in parts by their lengths."""
    monkeypatch.setattr(cohort, "_on_cpu", cohort._on_device)
    if request.param == "parts":
        monkeypatch.setattr(step_plan, "WORTH_A_PART", 1)


def still(name: str, bases: dict[str, Path], folder: Path) -> FederatedModel:
    """A base of this name that drops nothing: the masks of a GPU are not those of a CPU."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny.load(tiny.save(name, folder / name, **none) if name == "bert" else bases[name], KIND[name])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", KIND)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_together_is_alone_for_every_kind_of_task(
    bases: dict[str, Path], data: dict[str, Encoded], name: str, optimizer: str, tmp_path: Path
) -> None:
    """Mixed ranks and scalings, rows and clients that only fill the shape, steps that end early."""
    kind, model = KIND[name], still(name, bases, tmp_path)
    group = clients(model, 2, 8, 3, 1, 2, 4, steps=(3, 5, 1, 4, 2, 1), sizes=(9, 40, 3, 1, 5, 6))
    chosen = config(warmup=0.5, optimizer=optimizer, weight_decay=0.1)
    found = cohort.work(model, data[kind], group, chosen, 2)
    agree(found, alone(model, data[kind], group, chosen), group, CLOSE)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_clients_of_several_runs_share_a_pass(bases: dict[str, Path], data: dict[str, Encoded], name: str) -> None:
    kind = KIND[name]
    model = tiny.load(bases[name], kind)
    group = of_several_runs(clients(model, 2, 8, 3, 1, steps=(3, 5, 1, 4), sizes=(9, 40, 3, 1)))
    wanted = [work_on(model, a, data[kind], config(), 99) for a in group]
    agree(cohort.work(model, data[kind], group, config(), 2), wanted, group, CLOSE)
    even = [
        replace(a, steps=3, terms=Terms(k, LocalConfig(learning_rate=0.1 * (k + 1)), 0)) for k, a in enumerate(group)
    ]
    wanted = [work_on(model, a, data[kind], config(), 99) for a in even]
    agree(cohort.work(model, data[kind], even, config(), 2), wanted, even, CLOSE)


@pytest.mark.usefixtures("on_device")
def test_a_group_finds_the_memory_of_one_before_as_if_it_were_new(
    bases: dict[str, Path], data: dict[str, Encoded]
) -> None:
    """Other adapters, rows and losses; the same results to the bit as in a model that has trained nobody."""
    model, fresh = (tiny.load(bases["llama"], "instruction") for _ in range(2))
    first = clients(model, 4, 4, 4, sizes=(9, 8, 7))
    second = [replace(a, client_id=f"other-{a.client_id}", rows=a.rows[::-1].copy()) for a in clients(model, 3, 4, 1)]
    cohort.work(model, data["instruction"], first, config(), 2)
    assert len(model.passes) == 1
    (held,) = model.passes.values()
    found = cohort.work(model, data["instruction"], second, config(), 3)
    assert list(model.passes.values()) == [held]
    wanted = cohort.work(fresh, data["instruction"], second, config(), 3)
    for x, y in zip(found, wanted, strict=True):
        tiny.same(tensors(x), tensors(y))
        assert x.train_loss == y.train_loss


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["llama", "bert", "vit", "gpt2"])
def test_dropout_is_the_clients_own_in_every_company(data: dict[str, Encoded], name: str, tmp_path: Path) -> None:
    """A client that trains beside others, padded to their lengths, drops what it drops alone."""
    kind = KIND[name]
    own: dict[str, Any] = {
        "llama": {"attention_dropout": 0.2},
        "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.2},
    }.get(name, {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2})
    model = tiny.load(tiny.save(name, tmp_path / name, **own), kind, dropout=0.3)
    group = clients(model, 4, 2, 4, steps=(3, 2, 3), sizes=(9, 12, 2))
    found = cohort.work(model, data[kind], group, config(), 2)
    one_by_one = [result for a in group for result in cohort.work(model, data[kind], [a], config(), 2)]
    agree(found, one_by_one, group, CLOSE)
    with pytest.raises(AssertionError):
        agree(found, cohort.work(model, data[kind], group, config(), 3), group, 20 * CLOSE)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("recipe", [Recipe(train_a=False), Recipe(train_b=False), Recipe(tail_penalty=(0.5, 2))])
def test_what_the_recipe_says_holds_for_every_client(
    bases: dict[str, Path], data: dict[str, Encoded], recipe: Recipe
) -> None:
    """And for those of the next group, whose penalties are others."""
    model = tiny.load(bases["llama"], "instruction")
    for tails in ([2, 6, 3], [1, 2, 3]):
        group = [
            replace(a, broadcast=replace(a.broadcast, recipe=_with_tail(recipe, k)))
            for a, k in zip(clients(model, 3, 8, 4), tails, strict=True)
        ]
        found = cohort.work(model, data["instruction"], group, config(), 2)
        agree(found, alone(model, data["instruction"], group, config()), group, CLOSE)
    assert len(model.passes) == 1


def _with_tail(recipe: Recipe, tail: int) -> Recipe:
    return replace(recipe, tail_penalty=(0.5, tail)) if recipe.tail_penalty else recipe


@pytest.mark.usefixtures("on_device")
def test_a_patch_on_the_base_serves_its_own_group_alone(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    model = tiny.load(bases["vit"], "image")
    rng = generator("patch")
    patch = {
        n: LowRank(torch.randn(m, 2, generator=rng) * 0.1, torch.randn(2, k, generator=rng))
        for n, (m, k) in model.modules().items()
    }
    bare = clients(model, 2, 4)
    patched = [replace(a, broadcast=replace(a.broadcast, patch=patch)) for a in bare]
    for group in (bare, patched, bare, patched):
        found = cohort.work(model, data["image"], group, config(), 2)
        agree(found, alone(model, data["image"], group, config()), group, CLOSE)
    # What was recorded over the untouched base is not replayed under a patch, and the other way round.
    (held,) = model.passes.values()
    members = [member(a, config(), 0) for a in patched]
    assert device_pass(model, members, config(), False) is not held
    assert list(model.passes.values()) == [held]


@pytest.mark.usefixtures("on_device")
def test_a_failure_leaves_neither_layers_nor_half_a_pass(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    model = tiny.load(bases["llama"], "instruction")
    layers = {name: id(layer) for name, layer in model.model.named_modules()}
    bad = clients(model, 2, 4)
    cohort.work(model, data["instruction"], bad, config(), 2)
    bad[1] = replace(bad[1], rows=np.array([400]))
    with pytest.raises(IndexError):
        cohort.work(model, data["instruction"], bad, config(), 2)
    assert {name: id(layer) for name, layer in model.model.named_modules()} == layers
    assert not model.model.training
    assert not model.passes


def test_few_sizes_occur() -> None:
    """Nothing is rounded down, by more than a quarter, or to more than a few sizes."""
    sizes = [rounded_up(n) for n in range(1, 1025)]
    assert all(n <= size <= max(8, 1.25 * n + 7) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 28
    assert all(rounded_up(size) == size for size in sizes)


def test_no_more_kinds_of_passes_are_held_than_a_few(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    model = tiny.load(bases["vit"], "image")
    for count in (1, 2, 3, 4, 5, 2):
        group = clients(model, *[2] * count, steps=[1] * count)
        members = [member(a, config(), 0) for a in group]
        device_pass(model, members, config(), False).run(data["image"], members)
        assert len(model.passes) <= 4
    assert [held.stack.trained.values.shape[0] for held in model.passes.values()] == [3, 4, 5, 2]


def test_long_rows_go_by_themselves_where_that_saves_padding(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    """Every real row once, with its number in the client's batch; fewer tokens, and one part where a part costs."""
    model, texts = tiny.load(bases["bert"], "classification"), data["classification"]
    order = torch.argsort(texts.lengths)
    rows = torch.cat([order[:14], order[-2:]]).numpy()
    group = [replace(a, rows=own) for a, own in zip(clients(model, 2, 2), (rows, rows[:5]), strict=True)]
    local = config(batch_size=16).local
    members = [member(a, replace(config(), local=local), 0) for a in group]
    plan = StepPlan.of(texts, members, hidden=2**20)
    for step in range(3):
        batches = plan.batches(step)
        assert len(batches) > 1
        seen: list[list[tuple[int, ...]]] = [[], []]
        for batch in batches:
            ids = batch["input_ids"].unflatten(0, (2, -1))
            weights, numbers = batch["weights"], batch["numbers"].view(2, -1)
            for k in range(2):
                for i in torch.nonzero(weights[k]).flatten().tolist():
                    own = texts.batch([int(members[k].rows[members[k].schedule[step][numbers[k, i]]])])["input_ids"][0]
                    assert torch.equal(ids[k, i, : len(own)], own)
                    seen[k].append(tuple(own.tolist()))
        assert [len(own) for own in seen] == [len(m.schedule[step]) for m in members]
        assert sum(batch["input_ids"].numel() for batch in batches) < 2 * 16 * rounded_up(
            int(texts.lengths[rows].max())
        )
        total = sum(batch["weights"].sum(dim=1) for batch in batches)
        torch.testing.assert_close(total, torch.ones(2))
    assert len(StepPlan.of(texts, members, hidden=1).batches(0)) == 1
