"""Laws of the cohort: clients trained together learn what each learns alone, whatever differs between them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedspan.algebra.lowrank import LowRank
from fedspan.client import cohort, grouping
from fedspan.client.shared_payloads import PayloadCache, SharedPayloads
from fedspan.client.training import Assignment, LocalResult, Terms, TrainingSettings, train, work_on
from fedspan.config import DataConfig, EngineConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods.messages import Broadcast, GaloreOptions, Recipe
from fedspan.models import FederatedModel
from fedspan.models.losses import client_losses
from fedspan.models.streams import BatchLayout, ClientDropout, drops
from fedspan.support.seeding import generator
from fedspan.wire import packing

KIND = {"llama": "instruction", "gpt2": "instruction", "bert": "classification", "vit": "image"}

CLOSE = 5e-4
"""Relative to how far a client moves in a few large steps; rounding is amplified on the way."""


@pytest.fixture(scope="module")
def data() -> dict[str, Encoded]:
    """One small data set of every kind, with rows of very different lengths."""
    tasks, words = tiny.questions(40), tiny.words(40)
    pairs = [(r["instruction"] * (1 + i % 3), r["input"]) for i, r in enumerate(tasks)]
    texts = Rows("instruction", pairs, [r["output"] for r in tasks], [""] * 40)
    labels = ["xyz".index(r["label"]) for r in words]
    classes = Rows("classification", [(r["text"],) for r in words], labels, [""] * 40)
    pixels = torch.rand((40, 16, 16, 3), generator=generator("pixels")).mul(255).byte().numpy()
    images = Rows("image", pixels, [i % 3 for i in range(40)], [""] * 40)
    tokenizer = tiny.tokenizer()
    return {
        "instruction": encode(texts, tokenizer, DataConfig()),
        "classification": encode(classes, tokenizer, DataConfig()),
        "image": encode(images, tiny.image_processor(), DataConfig()),
    }


@pytest.fixture(scope="module")
def bert(bases: dict[str, Path]) -> FederatedModel:
    """A model that is looked at and not trained."""
    return tiny.load(bases["bert"], "classification")


def clients(model: FederatedModel, *ranks: int, steps: Sequence[int] = (), sizes: Sequence[int] = ()) -> list[Any]:
    """One assignment per rank, each with its own scaling, rows, head and number of steps."""
    found = []
    for k, rank in enumerate(ranks):
        adapter = tiny.random_adapter(model, rank, k, scaling=1.0 / rank)
        dense = {name: t + 0.01 * k for name, t in model.dense().items()}
        size = sizes[k] if len(sizes) else 9
        rows = torch.randperm(40, generator=generator("rows", k))[:size].numpy()
        sent = Broadcast(adapter, dense, Recipe())
        found.append(Assignment(f"client-{k}", sent, rows, int(steps[k]) if len(steps) else 3, float(size)))
    return found


@pytest.fixture(scope="module", autouse=True)
def smooth() -> Iterator[None]:
    """AdamW with a large ε in both engines.

    With the usual one it makes a whole step of a rounding error wherever a gradient is nearly zero, and after a few
    steps nothing sharp can be said. Momentum, bias corrections, decay and schedules are still AdamW's.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1.0))
        yield


def config(engine: str = "cohort", **local: Any) -> TrainingSettings:
    options = {"learning_rate": 0.3, "batch_size": 4, **local}
    return TrainingSettings(seed=5, local=LocalConfig(**options), engine=EngineConfig(name=engine))


def tensors(result: LocalResult) -> dict[str, Tensor]:
    return {**tiny.flat({n: result.update.factors(n) for n in result.update.modules}), **result.update.dense}


def agree(x: Sequence[LocalResult], y: Sequence[LocalResult], start: Sequence[Assignment], tolerance: float) -> None:
    """The same clients, steps, losses and changes; the change is compared, not the value, which hardly moves."""
    assert [r.update.client_id for r in x] == [r.update.client_id for r in y] == [a.client_id for a in start]
    for one, other, a in zip(x, y, start, strict=True):
        assert (one.steps, one.update.num_examples) == (other.steps, other.update.num_examples) == (a.steps, a.weight)
        assert abs(one.train_loss - other.train_loss) < tolerance * other.train_loss
        before = {**tiny.flat(a.broadcast.adapter), **a.broadcast.dense}
        got, wanted = tensors(one), tensors(other)
        assert got.keys() == wanted.keys() == before.keys()
        errors = {name: float((got[name] - wanted[name]).norm()) for name in got}
        moves = {name: float((wanted[name] - before[name]).norm()) for name in got}
        assert np.linalg.norm(list(errors.values())) < tolerance * np.linalg.norm(list(moves.values())), a.client_id
        for name, error in errors.items():
            assert error <= 20 * tolerance * max(moves[name], 1e-2 * max(moves.values())), (
                a.client_id,
                name,
                error,
                moves[name],
            )


def alone(
    model: FederatedModel, data: Encoded, group: Sequence[Assignment], settings: TrainingSettings
) -> list[LocalResult]:
    return [train(model, a, data, settings, 2) for a in group]


@pytest.mark.parametrize("name", KIND)
def test_together_is_alone_for_every_kind_of_task(bases: dict[str, Path], data: dict[str, Encoded], name: str) -> None:
    """Mixed ranks and scalings, unequal data (some with fewer rows than a batch), unequal steps, own heads."""
    kind = KIND[name]
    model = tiny.load(bases[name], kind)
    group = clients(model, 2, 8, 3, 1, steps=(3, 5, 1, 4), sizes=(9, 40, 3, 1))
    wanted = alone(model, data[kind], group, config(warmup=0.5))
    found = cohort.work(model, data[kind], group, config(warmup=0.5), 2)
    agree(found, wanted, group, CLOSE)


def of_several_runs(group: Sequence[Assignment]) -> list[Assignment]:
    """The same work, each client's under a seed, a round, rates and a batch size of its own."""
    owns = [
        {"learning_rate": 0.3, "batch_size": 4},
        {"learning_rate": 0.1, "batch_size": 2},
        {"learning_rate": 0.3, "batch_size": 3, "warmup": 0.5},
    ]
    return [replace(a, terms=Terms(k, LocalConfig(**owns[k % 3]), round_num=k)) for k, a in enumerate(group)]


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_clients_of_several_runs_share_a_pass(bases: dict[str, Path], data: dict[str, Encoded], name: str) -> None:
    """Each as its own run would train it alone, also after a journey to another process."""
    kind = KIND[name]
    model = tiny.load(bases[name], kind)
    group = of_several_runs(clients(model, 2, 8, 3, 1, steps=(3, 5, 1, 4), sizes=(9, 40, 3, 1)))
    four = replace(config(), engine=EngineConfig(name="cohort", cohort_size=4))
    (planned,) = grouping.plan(model, data[kind], group, four)
    assert sorted(planned) == [0, 1, 2, 3]
    wanted = [work_on(model, a, data[kind], config(), 99) for a in group]
    agree(cohort.work(model, data[kind], group, config(), 2), wanted, group, CLOSE)
    sender, packed = SharedPayloads(), packing.TensorList()
    sender.expect([a.broadcast for a in group])
    headers = [json.loads(json.dumps(sender.assignment(packed, set(), a))) for a in group]
    cache = PayloadCache()
    arrived = [cache.assignment(header, packed.tensors) for header in headers]
    assert [a.terms for a in arrived] == [a.terms for a in group]
    agree(cohort.work(model, data[kind], arrived, config(), 2), wanted, group, CLOSE)


def test_runs_that_train_otherwise_share_no_pass(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    """Optimizer, decay and clipping are those of a whole pass."""
    model = tiny.load(bases["llama"], "instruction")
    first, second = clients(model, 2, 2, steps=(3, 3), sizes=(9, 9))
    for other in ({"optimizer": "sgd"}, {"weight_decay": 0.1}, {"clip_norm": None}):
        group = [
            replace(first, terms=Terms(0, LocalConfig(), 0)),
            replace(second, terms=Terms(0, LocalConfig(**other), 0)),
        ]
        assert sorted(grouping.plan(model, data["instruction"], group, config("cohort"))) == [[0], [1]]


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "gpt2"])
def test_together_is_alone_with_dropout_on(
    bases: dict[str, Path], data: dict[str, Encoded], name: str, tmp_path: Path
) -> None:
    """In the adapters, in the base's hidden states, and in its attention weights: every client's own stream."""
    kind = KIND[name]
    own: dict[str, Any] = {
        "llama": {"attention_dropout": 0.2},
        "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.2},
    }.get(name, {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2})
    model = tiny.load(tiny.save(name, tmp_path / name, **own), kind, dropout=0.3)
    assert drops(model.model)
    group = clients(model, 4, 2, 4, steps=(3, 2, 3), sizes=(9, 12, 2))
    wanted = alone(model, data[kind], group, config())
    found = cohort.work(model, data[kind], group, config(), 2)
    agree(found, wanted, group, CLOSE)
    still = alone(tiny.load(bases[name], kind), data[kind], group, config())
    with pytest.raises(AssertionError):
        agree(found, still, group, CLOSE)


@pytest.mark.parametrize(("rate", "found"), [(0.3, True), (0.0, False)])
def test_dropout_that_only_a_part_of_the_configuration_names_is_found(rate: float, found: bool) -> None:
    """Attention of a model for texts and images is dropped by functions, at the rate of its part for texts."""
    from transformers import Gemma3Config

    base = torch.nn.Linear(1, 1)
    base.config = Gemma3Config(text_config={"attention_dropout": rate})
    assert drops(base) is found


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_dropout_in_the_adapters_alone(bases: dict[str, Path], data: dict[str, Encoded], name: str) -> None:
    """Nothing in the base drops: the adapters' dropout must be seen before their layers are replaced."""
    model = tiny.load(bases[name], KIND[name], dropout=0.4)
    group = clients(model, 4, 2)
    wanted = alone(model, data[KIND[name]], group, config())
    torch.manual_seed(1)
    agree(cohort.work(model, data[KIND[name]], group, config(), 2), wanted, group, CLOSE)


@given(
    ranks=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 6),
    clip=st.sampled_from([None, 1e-3, 1.0]),
    decay=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=15, deadline=None)
def test_together_is_alone_whatever_the_clients_differ_in(
    bases: dict[str, Path],
    data: dict[str, Encoded],
    ranks: list[int],
    seed: int,
    batch: int,
    clip: float | None,
    decay: float,
) -> None:
    rng = np.random.default_rng(seed)
    model = tiny.load(bases["bert"], "classification")
    group = clients(model, *ranks, steps=rng.integers(1, 5, len(ranks)), sizes=rng.integers(1, 20, len(ranks)))
    chosen = config(batch_size=batch, clip_norm=clip, weight_decay=decay)
    wanted = alone(model, data["classification"], group, chosen)
    agree(cohort.work(model, data["classification"], group, chosen, 2), wanted, group, CLOSE)


def test_clipping_is_by_the_client(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    """A client with a huge gradient does not shrink the others' steps."""
    model = tiny.load(bases["vit"], "image")
    calm, wild = clients(model, 4, 4)
    loud = {name: replace(f, b=f.b * 5) for name, f in wild.broadcast.adapter.items()}
    wild = replace(wild, broadcast=replace(wild.broadcast, adapter=loud))
    chosen = config(clip_norm=0.05)
    both = cohort.work(model, data["image"], [calm, wild], chosen, 2)
    agree(both, alone(model, data["image"], [calm, wild], chosen), [calm, wild], CLOSE)


@pytest.mark.parametrize("recipe", [Recipe(train_a=False), Recipe(train_b=False), Recipe(tail_penalty=(0.5, 2))])
def test_what_the_recipe_says_holds_for_every_client(
    bases: dict[str, Path], data: dict[str, Encoded], recipe: Recipe
) -> None:
    model = tiny.load(bases["llama"], "instruction")
    group = clients(model, 3, 8, 4)
    tails = [2, 6, 3]
    group = [
        replace(
            a,
            broadcast=replace(
                a.broadcast, recipe=replace(recipe, tail_penalty=(0.5, k)) if recipe.tail_penalty else recipe
            ),
        )
        for a, k in zip(group, tails, strict=True)
    ]
    found = cohort.work(model, data["instruction"], group, config(), 2)
    agree(found, alone(model, data["instruction"], group, config()), group, CLOSE)
    for part, trained in (("a", recipe.train_a), ("b", recipe.train_b)):
        for a, result in zip(group, found, strict=True):
            before, after = tiny.flat(a.broadcast.adapter), tensors(result)
            same = [torch.equal(before[n], after[n]) for n in before if n.endswith(f"/{part}")]
            assert all(same) != trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patch_on_the_base_serves_all(bases: dict[str, Path], data: dict[str, Encoded], dtype: str) -> None:
    model = tiny.load(bases["bert"], "classification", dtype=dtype)
    rng = generator("patch")
    patch = {
        n: LowRank(torch.randn(m, 2, generator=rng) * 0.1, torch.randn(2, k, generator=rng))
        for n, (m, k) in model.modules().items()
    }
    group = [replace(a, broadcast=replace(a.broadcast, patch=patch)) for a in clients(model, 2, 4)]
    found = cohort.work(model, data["classification"], group, config(steps=2), 2)
    agree(
        found, alone(model, data["classification"], group, config(steps=2)), group, CLOSE if dtype == "float32" else 0.2
    )
    bare = [replace(a, broadcast=replace(a.broadcast, patch={})) for a in group]
    with pytest.raises(AssertionError):
        agree(cohort.work(model, data["classification"], bare, config(steps=2), 2), found, bare, 0.2)


def test_nothing_is_left_behind(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    """After a cohort the model is what it was: the same layers, and a client alone learns the same bits as before."""
    model = tiny.load(bases["llama"], "instruction")
    layers = {name: id(layer) for name, layer in model.model.named_modules()}
    group = clients(model, 2, 8)
    before = alone(model, data["instruction"], group, config())
    first = cohort.work(model, data["instruction"], group, config(), 2)
    again = cohort.work(model, data["instruction"], group, config(), 2)
    assert {name: id(layer) for name, layer in model.model.named_modules()} == layers
    for x, y in zip((*before, *first), (*alone(model, data["instruction"], group, config()), *again), strict=True):
        tiny.same(tensors(x), tensors(y))


def test_a_failure_puts_the_layers_back(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    model = tiny.load(bases["llama"], "instruction")
    layers = {name: id(layer) for name, layer in model.model.named_modules()}
    bad = clients(model, 2, 4)
    bad[1] = replace(bad[1], rows=np.array([400]))
    with pytest.raises(IndexError):
        cohort.work(model, data["instruction"], bad, config(), 2)
    assert {name: id(layer) for name, layer in model.model.named_modules()} == layers
    assert not model.model.training


@pytest.mark.parametrize("name", KIND)
def test_the_loss_is_the_models_own(bases: dict[str, Path], data: dict[str, Encoded], name: str) -> None:
    """Client by client it is what transformers computes, masks and all, for that client's rows."""
    kind = KIND[name]
    model = tiny.load(bases[name], kind)
    model.load(tiny.broadcast(model))
    parts = [[0, 7, 11], [3, 5], [1]]
    rows = [row for part in parts for row in (*part, *part[:1] * (3 - len(part)))]
    real = torch.tensor([True] * 3 + [True, True, False] + [True, False, False])
    found = client_losses(model, data[kind].batch(rows), 3, real)
    own = torch.stack([model.model(**data[kind].batch(part)).loss for part in parts])
    torch.testing.assert_close(found, own)
    one = client_losses(model, data[kind].batch(parts[0]))
    torch.testing.assert_close(one, own[:1])


def test_regression_is_squared_error(bases: dict[str, Path]) -> None:
    words = tiny.words(12)
    rows = Rows("classification", [(r["text"],) for r in words], [i / 7 for i in range(12)], [""] * 12)
    data = encode(rows, tiny.tokenizer(), DataConfig())
    model = tiny.load(bases["bert"], "classification", num_labels=1, regression=True)
    model.load(tiny.broadcast(model))
    own = torch.stack([model.model(**data.batch(part)).loss for part in ([0, 1], [2, 3])])
    torch.testing.assert_close(client_losses(model, data.batch([0, 1, 2, 3]), 2), own)
    group = [replace(a, rows=a.rows % 12) for a in clients(model, 2, 4)]
    agree(cohort.work(model, data, group, config(), 2), alone(model, data, group, config()), group, CLOSE)


@given(count=st.integers(1, 70), seed=st.integers(0, 10**6), name=st.sampled_from(["auto", "cohort", "sequential"]))
@settings(max_examples=25, deadline=None)
def test_a_plan_holds_every_client_once(
    bert: FederatedModel, data: dict[str, Encoded], count: int, seed: int, name: str
) -> None:
    """And within the memory, the costliest group first, alike clients together."""
    rng, model = np.random.default_rng(seed), bert
    ranks, steps = rng.choice([2, 4, 8], count), rng.integers(1, 30, count)
    group = clients(model, *ranks, steps=steps, sizes=rng.integers(1, 20, count))
    groups = grouping.plan(model, data["classification"], group, config(name))
    assert sorted(i for part in groups for i in part) == list(range(count))
    if name == "sequential":
        assert all(len(part) == 1 for part in groups)
        return
    assert all(len(part) <= 16 for part in groups)
    assert count == 1 or len(groups) < count
    small = replace(config(name), engine=EngineConfig(name=name, memory=1e-4))
    assert all(len(part) == 1 for part in grouping.plan(model, data["classification"], group, small))


def test_wide_work_is_done_one_by_one(
    bases: dict[str, Path], data: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not keep the others from sharing a pass."""
    model = tiny.load(bases["llama"], "instruction")
    group = clients(model, 2, 2, 2, 2, sizes=(1, 9, 1, 1))
    chosen = data["instruction"]
    tokens = [min(4, len(a.rows)) * int(chosen.lengths[torch.as_tensor(a.rows)].max()) for a in group]
    assert tokens[1] > 2 * max(tokens[0], tokens[2], tokens[3])
    assert sorted(map(len, grouping.plan(model, chosen, group, config("auto")))) == [2, 2]
    monkeypatch.setattr(grouping, "WIDEST", (tokens[1] - 1) * tiny.SIZE)
    groups = grouping.plan(model, chosen, group, config("auto"))
    assert [1] in groups
    assert sorted(map(len, groups)) == [1, 1, 2]
    monkeypatch.setattr(grouping, "WIDEST", 1)
    assert len(grouping.plan(model, chosen, group, config("auto"))) == 4
    assert len(grouping.plan(model, chosen, group, config("cohort"))) == 2


def test_an_image_is_as_much_work_as_its_patches(
    bases: dict[str, Path], data: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.load(bases["vit"], "image")
    group = clients(model, 2, 2)  # batches of 4 images of 4 patches
    for widest, groups in ((16 * tiny.SIZE, 1), (16 * tiny.SIZE - 1, 2)):
        monkeypatch.setattr(grouping, "WIDEST", widest)
        assert len(grouping.plan(model, data["image"], group, config("auto"))) == groups


def test_where_it_does_not_apply_it_says_why(
    bases: dict[str, Path], data: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.load(bases["bert"], "classification")
    settings = config("auto")
    assert cohort.applies(model, data["classification"], Recipe(), settings) is None
    assert "GaLore" in str(cohort.applies(model, data["classification"], Recipe(galore=GaloreOptions(2)), settings))
    whole = tiny.load(bases["bert"], "classification", trains="all")
    assert "base weights" in str(cohort.applies(whole, data["classification"], Recipe(), settings))
    layer = model.model.bert.encoder.layer[0].attention.self
    monkeypatch.setattr(layer, "forward", _mixing(layer.forward))
    assert "rows" in str(cohort.applies(model, data["classification"], Recipe(), settings))


def _mixing(forward: Any) -> Any:
    """An attention that looks at the first row alone, as a shared table of positions is looked at."""

    def mixed(hidden: Tensor, *args: Any, **options: Any) -> Any:
        out, *rest = forward(hidden[:1], attention_mask=None)
        return (out.expand_as(hidden), *rest)

    return mixed


def test_streams_are_each_clients_own() -> None:
    """The mask of a client does not depend on who else is in the batch or how far it is padded."""
    x = torch.ones(6, 5, 3)
    layout = BatchLayout([2, 1, 2], [5, 2, 3], 2, 5)
    with ClientDropout([torch.Generator().manual_seed(k) for k in range(3)], layout):
        together = torch.nn.functional.dropout(x, 0.4)
    for k, (rows, length) in enumerate(zip(layout.rows, (5, 2, 3), strict=True)):
        torch.manual_seed(k)
        alone = torch.nn.functional.dropout(torch.ones(rows, length, 3), 0.4)
        assert torch.equal(together[2 * k : 2 * k + rows, :length], alone)
