"""Laws of the lowest layers where nothing is trained: computed once for each row, and training is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from local_training import start_of, tasks, tensors, texts

from fedspan.client import cohort
from fedspan.client.setup import find_prefix
from fedspan.client.training import Assignment, LocalResult, TrainingSettings
from fedspan.config import DataConfig, EngineConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods.messages import Broadcast
from fedspan.models import FederatedModel
from fedspan.models.selection import Selection
from fedspan.runs.execution import run

__all__ = ["tasks", "texts"]  # the fixtures

KINDS = {"bert": "classification", "llama": "instruction", "gpt2": "instruction", "vit": "image"}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DEPTH = {"gpt2": "n_layer"}
UPPER = Selection(layers=(2,))
Load = Callable[..., FederatedModel]


@pytest.fixture(scope="module")
def data(texts: Encoded, tasks: Encoded) -> dict[str, Encoded]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    images = Rows("image", list(pixels), [i % 3 for i in range(24)], [""] * 24)
    return {
        "classification": texts,
        "instruction": tasks,
        "image": encode(images, tiny.image_processor(), DataConfig()),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases of three layers without dropout."""
    folder = tmp_path_factory.mktemp("deep")
    found = {}
    for name in KINDS:
        still = STILL if name in ("bert", "vit") else {}
        found[name] = tiny.save(name, folder / name, **{DEPTH.get(name, "num_hidden_layers"): 3}, **still)
    return found


def settings(engine: str, **local: Any) -> TrainingSettings:
    # SGD moves by the gradient itself: AdamW would make a whole step of a rounding error near zero.
    own = LocalConfig(**{"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4, **local})
    return TrainingSettings(local=own, engine=EngineConfig(name=engine))


def trained(
    model: FederatedModel, data: Encoded, sent: Broadcast, chosen: TrainingSettings, steps: int = 3
) -> list[LocalResult]:
    rows = np.arange(len(data))
    group = [Assignment(f"client-{k}", sent, rows[k::2], steps, 1.0) for k in range(2)]
    if chosen.engine.name == "cohort":
        return cohort.work(model, data, group, chosen, 0)
    return [r for a in group for r in cohort.work(model, data, [a], chosen, 0)]


def close(x: LocalResult, y: LocalResult, sent: Broadcast) -> None:
    before, one, other = start_of(sent), tensors(x), tensors(y)
    moved = torch.stack([(other[name] - before[name]).norm() for name in other]).norm()
    error = torch.stack([(one[name] - other[name]).norm() for name in other]).norm()
    assert moved > 0
    assert error < 1e-4 * moved
    assert abs(x.train_loss - y.train_loss) < 1e-5 * abs(y.train_loss)


@contextmanager
def calls(model: FederatedModel) -> Iterator[list[int]]:
    """The rows of each call of the lowest layer."""
    seen: list[int] = []
    layer = next(m for m in model.prefix.below[0].modules() if "Norm" in type(m).__name__)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", KINDS)
def test_training_is_the_same_and_every_row_is_computed_once(
    folders: dict[str, Path], data: dict[str, Encoded], name: str
) -> None:
    """To rounding, by either engine, on rows of different lengths."""
    kind = KINDS[name]
    model, plain = (tiny.load(folders[name], kind, selection=UPPER) for _ in range(2))
    find_prefix(model, data[kind], EngineConfig())
    assert len(model.prefix.below) == 2
    sent = tiny.broadcast(model)
    with calls(model) as seen:
        for engine in ("sequential", "cohort"):
            chosen = settings(engine)
            wanted = trained(plain, data[kind], sent, chosen)
            got = trained(model, data[kind], sent, chosen)
            for one, other in zip(got, wanted, strict=True):
                close(one, other, sent)
    distinct = len(model.prefix.held)
    assert set(seen) == {1}
    assert len(seen) == distinct <= len(data[kind])
    assert not any("forward" in vars(layer) for layer in model.prefix.below)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_by_themselves_have_the_same_bits(folders: dict[str, Path], data: dict[str, Encoded], name: str) -> None:
    """In batches of one row nothing is computed in another company: bit for bit the training without."""
    kind = KINDS[name]
    model, plain = (tiny.load(folders[name], kind, selection=UPPER) for _ in range(2))
    find_prefix(model, data[kind], EngineConfig())
    sent, chosen = tiny.broadcast(model), settings("sequential", batch_size=1)
    for one, other in zip(
        trained(model, data[kind], sent, chosen), trained(plain, data[kind], sent, chosen), strict=True
    ):
        tiny.same(tensors(one), tensors(other))


def test_room_changes_no_bit(folders: dict[str, Path], tasks: Encoded) -> None:
    """Rows for which there is no room are computed again, to the same states."""
    results = []
    for room in (2**20, 6000, 0):
        model = tiny.load(folders["llama"], "instruction", selection=UPPER)
        find_prefix(model, tasks, EngineConfig())
        model.prefix.room = room
        results.append(trained(model, tasks, tiny.broadcast(model), settings("sequential"), steps=5))
        assert model.prefix.used <= room
        assert len(model.prefix.held) == 0 or room
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            tiny.same(tensors(x), tensors(y))


def test_there_is_none_with_adapters_everywhere_or_without_room(folders: dict[str, Path], tasks: Encoded) -> None:
    everywhere = tiny.load(folders["llama"], "instruction")
    find_prefix(everywhere, tasks, EngineConfig())
    upper = tiny.load(folders["llama"], "instruction", selection=UPPER)
    find_prefix(upper, tasks, EngineConfig(prefix_cache=0))
    assert everywhere.prefix is None
    assert upper.prefix is None
    assert everywhere.notes == ()


def test_a_base_that_drops_there_is_computed_in_every_step(
    folders: dict[str, Path], texts: Encoded, tmp_path: Path
) -> None:
    """Unless its dropout is turned off; adapters may drop all the same."""
    folder = tiny.save("bert", tmp_path / "bert", num_hidden_layers=3)
    model = tiny.load(folder, "classification", selection=UPPER)
    find_prefix(model, texts, EngineConfig())
    assert model.prefix is None
    assert "drops at random there; model.dropout = false turns that off" in model.notes[-1]
    still = tiny.load(folder, "classification", selection=UPPER, base_dropout=False, dropout=0.1)
    find_prefix(still, texts, EngineConfig())
    assert len(still.prefix.below) == 2
    sent = tiny.broadcast(still)
    one = trained(still, texts, sent, settings("cohort"))
    still.prefix = None
    for x, y in zip(one, trained(still, texts, sent, settings("cohort")), strict=True):
        close(x, y, sent)


def test_trained_weights_below_are_seen(folders: dict[str, Path], tasks: Encoded) -> None:
    chosen = replace(UPPER, modules_to_save=("embed_tokens",))
    model = tiny.load(folders["llama"], "instruction", selection=chosen)
    find_prefix(model, tasks, EngineConfig())
    assert model.prefix is None
    assert "weights below them are trained" in model.notes[-1]


def test_a_run_has_the_same_bits_with_any_number_of_processes(
    folders: dict[str, Path], instructions: Path, tmp_path: Path
) -> None:
    found = []
    for number, engine in enumerate(({"workers": 1}, {"workers": 2}, {"workers": 1, "prefix_cache": 0})):
        local = {"optimizer": "sgd", "learning_rate": 0.1}
        config = tiny.config(folders["llama"], instructions, engine=engine, adapter={"layers": [2]}, local=local)
        found.append(run(config, tmp_path / str(number)))
    losses = [[record["train_loss"] for record in result.history] for result in found]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert "the 2 lowest layers are computed once for each example" in found[0].summary["notes"]
    assert not found[2].summary["notes"]
