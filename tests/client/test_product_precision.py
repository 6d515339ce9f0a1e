"""Laws of the precision of training's products: bfloat16 stays near float32, and all that is no product is float32."""

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

from fedspan.algebra.lowrank import LowRank
from fedspan.client import cohort, precision
from fedspan.client.training import Assignment, LocalResult, TrainingSettings
from fedspan.config import EngineConfig
from fedspan.data import Encoded
from fedspan.methods.messages import Broadcast, Recipe, Vector
from fedspan.methods.patches import Patch, patch_dense
from fedspan.models import FederatedModel
from fedspan.models.coarse_products import frozen_linears, products_in
from fedspan.runs import checkpoint
from fedspan.runs.execution import resume, run
from fedspan.runs.many import run_many
from fedspan.support.errors import FedspanError
from fedspan.support.seeding import generator

__all__ = ["tasks", "texts"]  # the fixtures

LOSS = 2**-8
"""Relative difference of the losses: a product's inputs are rounded by up to 2⁻⁹ each, and the errors average out."""
UPDATE = 0.05
"""Relative difference of what SGD moves by, over all tensors."""
KINDS = {"llama": "instruction", "gpt2": "instruction", "bert": "classification"}


def settings(engine: str, precision: str) -> TrainingSettings:
    own = LOCAL.model_copy(update={"optimizer": "sgd", "learning_rate": 0.1})
    return TrainingSettings(local=own, engine=EngineConfig(name=engine, precision=precision))


def trained(model: FederatedModel, data: Encoded, sent: Broadcast, engine: str, precision: str) -> list[LocalResult]:
    rows = np.arange(len(data))
    group = [Assignment(f"client-{k}", sent, rows[k::2], 3, 1.0) for k in range(2)]
    chosen = settings(engine, precision)
    return (
        [r for a in group for r in cohort.work(model, data, [a], chosen, 0)]
        if engine == "sequential"
        else (cohort.work(model, data, group, chosen, 0))
    )


def difference(x: LocalResult, y: LocalResult, sent: Broadcast) -> float:
    before, one, other = start_of(sent), tensors(x), tensors(y)
    moved = torch.stack([(other[name] - before[name]).norm() for name in other]).norm()
    return float(torch.stack([(one[name] - other[name]).norm() for name in other]).norm() / moved)


@pytest.fixture(scope="module")
def texts_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "texts.jsonl", tiny.words())


@pytest.fixture(scope="module")
def models(bases: dict[str, Path]) -> dict[str, FederatedModel]:
    return {name: tiny.load(bases[name], kind) for name, kind in KINDS.items()}


@pytest.mark.parametrize("engine", ["sequential", "cohort"])
@pytest.mark.parametrize("name", KINDS)
def test_products_in_bfloat16_train_nearly_the_same(
    models: dict[str, FederatedModel], texts: Encoded, tasks: Encoded, name: str, engine: str
) -> None:
    """The law: losses within LOSS, updates within UPDATE of float32's, and not the same; and float32 comes back."""
    model, data = models[name], texts if KINDS[name] == "classification" else tasks
    sent = tiny.broadcast(model)
    exact = trained(model, data, sent, engine, "float32")
    coarse = trained(model, data, sent, engine, "bfloat16")
    for one, other in zip(coarse, exact, strict=True):
        assert abs(one.train_loss - other.train_loss) <= LOSS * other.train_loss
        assert 1e-6 < difference(one, other, sent) <= UPDATE
        assert all(t.dtype == torch.float32 for t in tensors(one).values())
    again = trained(model, data, sent, engine, "float32")
    for one, other in zip(again, exact, strict=True):
        tiny.same(tensors(one), tensors(other))


def test_the_engines_agree_in_bfloat16(models: dict[str, FederatedModel], tasks: Encoded) -> None:
    """To the rounding of bfloat16, since an input at the edge between two of its numbers may fall to either side."""
    model = models["llama"]
    sent = tiny.broadcast(model)
    alone, together = (trained(model, tasks, sent, engine, "bfloat16") for engine in ("sequential", "cohort"))
    for one, other in zip(together, alone, strict=True):
        assert difference(one, other, sent) <= UPDATE


def test_frozen_layers_multiply_in_bfloat16_and_nothing_else_does(models: dict[str, FederatedModel]) -> None:
    """The output layer, heads and adapters are not among them; activations between the layers are float32."""
    model = models["bert"]
    names = frozen_linears(model)
    assert not any(name.startswith(("classifier", "bert.pooler")) or ".lora_" in name for name in names)
    assert len(names) == 2 * 6
    before = {name: layer.weight.data_ptr() for name, layer in names.items()}
    with products_in(model, torch.bfloat16):
        x = torch.randn(3, tiny.SIZE)
        layer = next(iter(names.values()))
        wanted = (x.bfloat16() @ layer.weight.bfloat16().T).float() + layer.bias
        assert torch.equal(layer(x), wanted)
    assert {name: layer.weight.data_ptr() for name, layer in names.items()} == before
    assert not any("forward" in vars(layer) for layer in names.values())
    assert not [n for n in frozen_linears(models["llama"]) if n.startswith("lm_head")]


def test_a_patch_below_bfloat16_is_not_lost(models: dict[str, FederatedModel]) -> None:
    """A patch of a thousandth of the weight adds x ΔWᵀ, in whichever form it was loaded before.

    Rounded together with the weight, most of it would vanish. Evaluated afterwards, it is in the weights again.
    """
    model = models["llama"]
    sent = tiny.broadcast(model)
    patch: dict[str, Patch] = {
        name: LowRank(f.b * (2e-3 / f.a.shape[1] ** 0.5), f.a)
        for name, f in tiny.random_adapter(model, 2, "patch").items()
    }
    name = next(iter(patch))
    layer, delta = model.layers[name].get_base_layer(), patch_dense(patch[name])
    x = torch.randn(5, layer.in_features, generator=generator("x"))
    model.load(replace(sent, patch=patch))
    inside = layer.weight.clone()
    with products_in(model, torch.bfloat16):
        model.load(sent)
        plain = layer(x)
        model.load(replace(sent, patch=patch))
        torch.testing.assert_close(layer(x) - plain, x @ delta.T, rtol=1e-3, atol=1e-6)
    model.load(replace(sent, patch=patch))
    assert torch.equal(layer.weight, inside)
    assert not layer._forward_hooks
    model.load(sent)


def test_a_gradient_of_the_base_stays_in_float32(models: dict[str, FederatedModel], tasks: Encoded) -> None:
    model = models["llama"]
    sent = replace(tiny.broadcast(model), recipe=Recipe(gradient=True, probe_batches=1))
    a = Assignment("client-0", sent, np.arange(6), 1, 1.0)
    one, other = (cohort.work(model, tasks, [a], settings("sequential", p), 0)[0] for p in ("bfloat16", "float32"))
    for name, payload in other.update.modules.items():
        assert isinstance(payload, Vector)
        got = one.update.modules[name]
        assert isinstance(got, Vector)
        tiny.same(dict(got.tensors()), dict(payload.tensors()))


@contextmanager
def measured(ratio: float) -> Iterator[list[int]]:
    """The processor multiplies bfloat16 in this share of float32's time."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        def ratio_of(model: Any, rows: int) -> float:
            asked.append(rows)
            return ratio

        patch.setattr(precision, "bfloat16_to_float32", ratio_of)
        yield asked


class _Stop(Exception):
    pass


def _stop(event: Any) -> None:
    if event.kind == "round":
        raise _Stop


def test_auto_takes_what_is_faster_and_a_resumed_run_keeps_it(
    bases: dict[str, Path], texts_path: Path, tmp_path: Path
) -> None:
    """Begun where bfloat16 is fast and resumed where it is slow: the same bits as without the interruption."""
    config = tiny.config(bases["bert"], texts_path, engine={"precision": "auto"})
    lines: list[Any] = []
    with measured(0.4) as asked:
        whole = run(config, tmp_path / "whole", lambda e: lines.append(e.data) if e.kind == "start" else None)
        assert asked
        with pytest.raises(_Stop):
            run(config, tmp_path / "run", _stop)
    with measured(9.0) as asked:
        result = resume(tmp_path / "run")
        assert not asked
    assert result.summary["precision"] == whole.summary["precision"] == "bfloat16"
    assert lines[0]["precision"] == "bfloat16: 2.5 times as fast as float32 here"
    saved = [checkpoint.read(r.out / "checkpoint" / "federation.safetensors") for r in (result, whole)]
    assert saved[0].notes["precision"][0] == "bfloat16"
    losses = [[record["train_loss"] for record in r.history] for r in (result, whole)]
    assert losses[0] == losses[1]
    with measured(9.0):
        slow = run(config, tmp_path / "slow")
    assert slow.summary["precision"] == "float32"
    assert [record["train_loss"] for record in slow.history] != losses[1]


def test_processes_work_in_the_precision_that_was_chosen(
    bases: dict[str, Path], texts_path: Path, tmp_path: Path
) -> None:
    """Two processes, one process: the same bits in bfloat16."""
    found = []
    for workers in (1, 2):
        config = tiny.config(bases["bert"], texts_path, engine={"precision": "auto", "workers": workers})
        with measured(0.4):
            found.append(run(config, tmp_path / str(workers)))
    assert found[0].history[-1]["train_loss"] == found[1].history[-1]["train_loss"]


def test_runs_that_share_passes_keep_each_its_own_precision(
    bases: dict[str, Path], texts_path: Path, tmp_path: Path
) -> None:
    """One was begun where bfloat16 is fast, another is begun where it is slow: both share a base from then on."""
    common: dict[str, Any] = {"local": {"optimizer": "sgd", "learning_rate": 0.1}, "engine": {"precision": "auto"}}
    first, second = (tiny.config(bases["bert"], texts_path, seed=seed, **common) for seed in (3, 4))
    with measured(0.4):
        alone = run(first, tmp_path / "alone")
        with pytest.raises(_Stop):
            run(first, tmp_path / "first", _stop)
    with measured(9.0):
        found = run_many([first, second], [tmp_path / "first", tmp_path / "second"])
        other = run(second, tmp_path / "other")
    assert [result.summary["precision"] for result in found] == ["bfloat16", "float32"]
    for result, wanted, tolerance in zip(found, (alone, other), (LOSS, 1e-4), strict=True):
        for record, expected in zip(result.history, wanted.history, strict=True):
            assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=tolerance)


def test_bfloat16_is_refused_where_base_weights_are_trained(
    bases: dict[str, Path], texts_path: Path, tmp_path: Path
) -> None:
    config = tiny.config(bases["bert"], texts_path, "fedavg", engine={"precision": "bfloat16"})
    with pytest.raises(FedspanError, match=r"'bfloat16': the method trains base weights.*expected float32 or auto"):
        run(config, tmp_path / "run")
    auto = tiny.config(bases["bert"], texts_path, "fedavg", engine={"precision": "auto"}, federation={"rounds": 1})
    with measured(0.1):
        assert run(auto, tmp_path / "auto").summary["precision"] == "float32"


def test_the_ratio_is_measured_once(models: dict[str, FederatedModel]) -> None:
    precision._MEASURED.clear()
    first = precision.bfloat16_to_float32(models["llama"], 64)
    assert 0 < first < 1000
    assert precision.bfloat16_to_float32(models["llama"], 64) == first
    assert len(precision._MEASURED) == 1
