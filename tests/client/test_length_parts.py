"""Wide batches of texts on a CPU are trained in parts of similar lengths: the same training, less padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_training import LOCAL, start_of, tasks, tensors, texts

from fedspan.client import cohort, length_parts
from fedspan.client.length_parts import parts, worth_a_part
from fedspan.client.training import Assignment, LocalResult, TrainingSettings, gradient, train
from fedspan.config import EngineConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel

__all__ = ["tasks", "texts"]  # the fixtures

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokens_of(cut: list[list[int]], lengths: list[int]) -> int:
    return sum(len(part) * max(lengths[i] for i in part) for part in cut)


@pytest.mark.parametrize("still", [True, False])
def test_every_engine_trains_alike(bases: dict[str, Path], texts: Encoded, always: None, still: bool) -> None:
    """With dropout too: above the bound a client that is trained alone draws the masks that it has in a cohort."""
    model = tiny.load(bases["bert"], "classification", base_dropout=not still)
    work = [Assignment(f"client-{k}", tiny.broadcast(model), np.arange(8 * k, 8 * k + 8), 2, 1.0) for k in range(2)]
    local = LOCAL.model_copy(update={"optimizer": "sgd", "learning_rate": 0.1})
    together, alone = (
        cohort.work(model, texts, work, TrainingSettings(local=local, engine=EngineConfig(name=name)), 0)
        if name == "cohort"
        else [
            cohort.work(model, texts, [one], TrainingSettings(local=local, engine=EngineConfig(name=name)), 0)[0]
            for one in work
        ]
        for name in ("cohort", "sequential")
    )
    for one, other in zip(together, alone, strict=True):
        close(one, other, work[0].broadcast)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.floats(0.5, 200))
def test_the_parts_cost_the_least(lengths: list[int], worth: float) -> None:
    """Against every way to cut the rows in the order of their lengths."""
    cut = parts(lengths, worth)
    assert sorted(i for part in cut for i in part) == list(range(len(lengths)))
    ordered = sorted(lengths, reverse=True)
    places = range(1, len(lengths))
    costs = []
    for bounds in (chosen for count in range(len(lengths)) for chosen in combinations(places, count)):
        ends = [0, *bounds, len(lengths)]
        pieces = list(pairwise(ends))
        costs.append(sum((b - a) * ordered[a] for a, b in pieces) + worth * len(pieces))
    assert tokens_of(cut, lengths) + worth * len(cut) == pytest.approx(min(costs))


def test_many_rows_are_cut_at_once() -> None:
    """The time grows with the different lengths, not with the rows."""
    lengths = [1 + i % 50 for i in range(100_000)]
    assert len(parts(lengths, 1.0)) == 50


@contextmanager
def shapes_seen(model: FederatedModel) -> Iterator[list[torch.Size]]:
    seen: list[torch.Size] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are wide enough, and a part is worth two tokens."""
    monkeypatch.setattr(length_parts, "WIDEST", 0)
    monkeypatch.setattr(length_parts, "WORTH_A_PART", 2 * tiny.SIZE**2)


def trained(model: FederatedModel, data: Encoded, sent: Broadcast, **engine: bool) -> LocalResult:
    local = LOCAL.model_copy(update={"optimizer": "sgd", "learning_rate": 0.3, "batch_size": 6})
    chosen = TrainingSettings(local=local, engine=EngineConfig(name="sequential", **engine))
    return train(model, Assignment("client-0", sent, np.arange(len(data)), 3, 1.0), data, chosen, 0)


def close(one: LocalResult, other: LocalResult, sent: Broadcast) -> None:
    before, x, y = start_of(sent), tensors(one), tensors(other)
    moved = torch.stack([(y[name] - before[name]).norm() for name in y]).norm()
    error = torch.stack([(x[name] - y[name]).norm() for name in y]).norm()
    assert error < 1e-4 * moved
    assert abs(one.train_loss - other.train_loss) < 1e-5 * abs(other.train_loss)


@pytest.mark.parametrize(
    ("name", "kind", "trains"),
    [
        ("bert", "classification", "adapter"),
        ("llama", "instruction", "adapter"),
        ("llama", "instruction", "targets"),
    ],
)
def test_training_in_parts_is_training_whole(
    bases: dict[str, Path],
    texts: Encoded,
    tasks: Encoded,
    name: str,
    kind: str,
    trains: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Also where weights train, and where answers count by their tokens."""
    path = tiny.save("bert", tmp_path / "bert", **STILL) if name == "bert" else bases[name]
    model = tiny.load(path, kind, trains=trains)
    data, sent = {"classification": texts, "instruction": tasks}[kind], tiny.broadcast(model)
    with shapes_seen(model) as before:
        whole = trained(model, data, sent)
    request.getfixturevalue("always")
    with shapes_seen(model) as after:
        cut = trained(model, data, sent)
    assert len(before) == 3 < len(after)
    assert sum(rows for rows, _ in after) == sum(rows for rows, _ in before)
    assert sum(rows * length for rows, length in after) < sum(rows * length for rows, length in before)
    close(cut, whole, sent)


def test_a_gradient_in_parts_is_the_gradient(bases: dict[str, Path], tasks: Encoded, always: None) -> None:
    """That which a recipe asks of the target modules' weights."""
    model = tiny.load(bases["llama"], "instruction", trains="targets")
    work = Assignment("client-0", tiny.broadcast(model), np.arange(len(tasks)), 1, 1.0)
    chosen = TrainingSettings(local=LOCAL.model_copy(update={"batch_size": 6}))
    cut = gradient(model, work, tasks, chosen, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_parts, "WIDEST", 2**40)
        whole = gradient(model, work, tasks, chosen, 0)
    for name, payload in whole.update.modules.items():
        x, y = (one.tensors()["gradient"] for one in (cut.update.modules[name], payload))
        assert (x - y).norm() < 1e-4 * y.norm(), name


def test_some_batches_stay_whole(bases: dict[str, Path], texts: Encoded, always: None) -> None:
    """Of models that mix rows or positions or drop at random, compiled ones, and on other devices."""
    assert worth_a_part(tiny.load(bases["bert"], "classification"), texts, 4) is None  # it has dropout
    model = tiny.load(bases["bert"], "classification", base_dropout=False)
    assert worth_a_part(model, texts, 4) == 2
    for name, value in {"padding_matters": True, "experts": ("some",), "device": torch.device("meta")}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, name, value)
            assert worth_a_part(model, texts, 4) is None, name
    model.model.add_module("mixes", torch.nn.BatchNorm1d(3))
    assert worth_a_part(model, texts, 4) is None


def test_what_shares_a_pass_stays_whole(
    bases: dict[str, Path], texts: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bound as that of the engine that is chosen."""
    model = tiny.load(bases["bert"], "classification", base_dropout=False)
    size = 4 * int(texts.lengths.max()) * tiny.SIZE
    for widest, wide in ((size, False), (size - 1, True)):
        monkeypatch.setattr(length_parts, "WIDEST", widest)
        assert (worth_a_part(model, texts, 4) is not None) == wide
