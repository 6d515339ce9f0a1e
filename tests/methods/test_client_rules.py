"""Rules that change local training: FedAdamW, and FedProx, SCAFFOLD and several cores on adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from federations import Array, array, assert_same, build, received, served, traffic
from torch import Tensor

from fedspan.client.training import Assignment, TrainingSettings, rate, train
from fedspan.config import DataConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods import fed_sb, fedadamw, fedftg, ravan
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Broadcast, Recipe, Request, Update
from fedspan.models import FederatedModel

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Bench:
    """One client with one full batch, so that a gradient is a function of the weights alone."""

    model: FederatedModel
    data: Encoded

    def learn(self, sent: Broadcast, steps: int, local: LocalConfig) -> Update:
        work = Assignment("client-0", sent, np.arange(len(self.data)), steps, 1.0)
        local = local.model_copy(update={"batch_size": len(self.data), "clip_norm": None})
        return train(self.model, work, self.data, TrainingSettings(local=local), 0).update

    def gradient(self, dense: Mapping[str, Array]) -> dict[str, Array]:
        """By one step of plain SGD."""
        weights = {name: torch.from_numpy(value).float() for name, value in dense.items()}
        after = self.learn(Broadcast({}, weights), 1, LocalConfig(optimizer="sgd", learning_rate=1.0, warmup=0.0)).dense
        return {name: array(weights[name]) - array(after[name]) for name in weights}


@pytest.fixture(scope="module")
def tasks() -> Encoded:
    rows = tiny.questions(24)
    pairs = [(r["instruction"], r["input"]) for r in rows]
    return encode(Rows("instruction", pairs, [r["output"] for r in rows], [""] * 24), tiny.tokenizer(), DataConfig())


@pytest.fixture(scope="module")
def weights(bases: dict[str, Path], tasks: Encoded) -> Bench:
    return Bench(tiny.load(bases["llama"], "instruction", trains="targets"), tasks)


def adamw(
    bench: Bench, dense: Mapping[str, Tensor], v: dict[str, Array], seeded: bool, movement: dict[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Three steps by the book in float64, gradients from the model: the weights, and v̂."""
    local = LocalConfig(learning_rate=0.02, warmup=0.6, weight_decay=0.1)
    rates = [rate(local, t, 3) for t in range(3)]
    x, m = {n: array(t) for n, t in dense.items()}, {n: np.zeros(t.shape) for n, t in dense.items()}
    for t, eta in enumerate(rates, 1):
        g = bench.gradient(x)
        for name in x:
            m[name] = BETA1 * m[name] + (1 - BETA1) * g[name]
            v[name] = BETA2 * v[name] + (1 - BETA2) * g[name] ** 2
            mass = 1.0 if seeded else 1 - BETA2**t
            step = m[name] / (1 - BETA1**t) / (np.sqrt(v[name] / mass) + EPS)
            x[name] = x[name] * (1 - eta * 0.1) - eta * step + movement.get(name, 0.0) * eta / sum(rates)
    return x, {name: value / (1.0 if seeded else 1 - BETA2**3) for name, value in v.items()}


def test_fedadamw_clients_take_the_steps_of_the_paper(weights: Bench) -> None:
    """Two rounds of a real transformer: AdamW from nothing, then from the row means of v and with the last step's
    direction spread over the round."""
    method, local = fedadamw(alpha=0.5), LocalConfig(learning_rate=0.02, warmup=0.6, weight_decay=0.1)
    dense = {name: value.clone() for name, value in weights.model.dense().items()}
    state = method.init(weights.model.template(1, 1.0, False, 0), dense)
    v = {name: np.zeros(value.shape) for name, value in dense.items()}
    movement: dict[str, Array] = {}
    for round_num in range(2):
        before = {name: value.clone() for name, value in state.dense.items()}
        sent = method.broadcast(state, Request(None))
        x, second = adamw(weights, before, v, seeded=round_num > 0, movement=movement)
        update = weights.learn(sent, 3, local)
        for name in x:
            moved = np.linalg.norm(x[name] - array(before[name]))
            assert np.linalg.norm(array(update.dense[name]) - x[name]) < 2e-3 * moved
            np.testing.assert_allclose(array(update.moments[name]), second[name], rtol=2e-3, atol=1e-10)
        state, _ = aggregate(method, state, [method.encode(update, sent, None)[0]])
        movement = {name: 0.5 * (array(state.dense[name]) - array(before[name])) for name in x}
        for name, moment in second.items():
            rows = np.maximum(moment.mean(axis=1), 0.1 * moment.mean())[:, None] if moment.ndim > 1 else moment.mean()
            v[name] = np.broadcast_to(rows, moment.shape).copy()
    assert all(value.any() for value in movement.values())


def test_fedadamw_is_fedavg_with_adamw_when_it_carries_nothing(weights: Bench) -> None:
    """In the first round: the weights of the plain method up to the rounding of another AdamW."""
    dense = {name: value.clone() for name, value in weights.model.dense().items()}
    template, local = weights.model.template(1, 1.0, False, 0), LocalConfig(learning_rate=0.01)
    ends = []
    for method in (fedadamw(), fedftg(galore_rank=None)):
        sent = method.broadcast(method.init(template, dense), Request(None))
        ends.append(weights.learn(sent, 4, local).dense)
    for name, start in dense.items():
        moved = float((ends[1][name] - start).norm())
        assert float((ends[0][name] - ends[1][name]).norm()) < 1e-3 * moved


@pytest.mark.parametrize("blocks", ["row", "tensor"])
def test_fedadamw_shares_block_means_and_the_mean_step(blocks: str) -> None:
    """Σ p_k mean(v_k) within blocks, floored at a tenth of the tensor's mean; α (W̄ − W) as the movement."""
    fed = build(fedadamw(0.25, blocks), 0, counts=(3, 1))  # type: ignore[arg-type]
    state = served(fed)[0]
    sent = fed.method.broadcast(state, Request(None))
    assert (sent.recipe.carries_moments, sent.recipe.drifts) == (True, True)
    for name in fed.template.modules:
        w = [array(u.dense[name]) for u in fed.updates]
        step = 0.75 * w[0] + 0.25 * w[1] - array(fed.state.dense[name])
        np.testing.assert_allclose(array(sent.correction[name]), 0.25 * step, rtol=1e-12, atol=1e-12)
        v = 0.75 * array(fed.updates[0].moments[name]) + 0.25 * array(fed.updates[1].moments[name])
        means = v.mean(axis=1, keepdims=True) if blocks == "row" else v.mean(keepdims=True)
        np.testing.assert_allclose(array(sent.moments[name]), np.maximum(means, 0.1 * v.mean()), rtol=1e-12)
    assert not fed.method.broadcast(fed.state, Request(None)).correction
    assert not fedadamw(0.0).broadcast(state, Request(None)).correction


def test_fedadamw_survives_moments_that_are_zero_or_noised_below_it() -> None:
    """Blocks at 0 or below start at the floor; a tensor without any starts anew, as in the first round."""
    fed = build(fedadamw(), 0, shapes=((4, 6), (3, 3)), counts=(1, 1))
    sent = fed.method.broadcast(fed.state, Request(None))
    answers = []
    for update in fed.updates:
        moments = {**update.moments, "layer1": torch.zeros(3, 3, dtype=torch.float64)}
        moments["layer0"] = moments["layer0"].clone()
        moments["layer0"][1], moments["layer0"][2] = 0.0, -1.0
        del moments["head"]
        answers.append(fed.method.encode(replace(update, moments=moments), sent, None)[0])
    after = fed.method.broadcast(aggregate(fed.method, fed.state, answers)[0], Request(None))
    assert after.moments.keys() == {"layer0"}
    v = after.moments["layer0"]
    assert float(v.min()) > 0
    assert float(v[1]) == float(v[2]) == float(v.min())


def test_fedadamw_refuses_options_and_optimizers_that_it_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"method\.alpha = -1\.0: expected at least 0"):
        fedadamw(alpha=-1.0)
    with pytest.raises(ValueError, match=r"method\.blocks = 'head': expected 'row' or 'tensor'"):
        fedadamw(blocks="head")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tasks: Encoded) -> Bench:
    return Bench(tiny.load(bases["llama"], "instruction"), tasks)


def gradient_of_a(bench: Bench, sent: Broadcast, a: Mapping[str, Array]) -> dict[str, Array]:
    """By one step of plain SGD on A alone."""
    adapter = {name: replace(f, a=torch.from_numpy(a[name]).float()) for name, f in sent.adapter.items()}
    start = Broadcast(adapter, sent.dense, Recipe(train_b=False))
    after = bench.learn(start, 1, LocalConfig(optimizer="sgd", learning_rate=1.0, warmup=0.0))
    return {name: array(f.a) - array(after.factors(name).a) for name, f in adapter.items()}


def blocks(rank: int, heads: int) -> list[slice]:
    ends = np.cumsum([0, *(len(run) for run in np.array_split(np.arange(rank), heads))])
    return [slice(*pair) for pair in pairwise(ends)]


@pytest.mark.parametrize("heads", [1, 3])
def test_ravan_trains_the_cores_and_their_scales(adapters: Bench, heads: int) -> None:
    """A real transformer on SGD from a core that is not zero: H_i ← H_i − η t_i G_i, t_i ← t_i − η ⟨G_i, H_i⟩, with G_i
    the block of the gradient between the bases; the new core is t_i H_i and the bases stay."""
    method = ravan(heads)
    state = method.init(adapters.model.template(8, 16.0, False, 1), {})
    rng = torch.Generator().manual_seed(3)
    for held in state.modules.values():
        for place in blocks(8, heads):
            held["core"][place, place] = torch.randn(held["core"][place, place].shape, generator=rng)
    sent = method.broadcast(state, Request(8))
    local = LocalConfig(optimizer="sgd", learning_rate=0.2, warmup=0.0)
    update = adapters.learn(sent, 3, local)
    v = {name: array(held["v"]) for name, held in state.modules.items()}
    h = {name: array(held["core"]) / sent.adapter[name].scaling for name, held in state.modules.items()}
    t = {name: np.ones(heads) for name in h}
    for _ in range(3):
        spread = {n: np.repeat(t[n], [p.stop - p.start for p in blocks(8, heads)])[:, None] * h[n] for n in h}
        grads = gradient_of_a(adapters, sent, {name: spread[name] @ v[name].T for name in h})
        for name, grad in grads.items():
            g = grad @ v[name]
            new = h[name].copy()
            for i, place in enumerate(blocks(8, heads)):
                new[place, place] -= 0.2 * t[name][i] * g[place, place]
                t[name][i] -= 0.2 * np.sum(g[place, place] * h[name][place, place])
            h[name] = new
    (answer, _) = method.encode(update, sent, None)
    after, _ = aggregate(method, state, [answer])
    for name, held in after.modules.items():
        scaling = sent.adapter[name].scaling
        expected = np.zeros((8, 8))
        for i, place in enumerate(blocks(8, heads)):
            expected[place, place] = scaling * t[name][i] * h[name][place, place]
        moved = np.linalg.norm(expected - array(state.modules[name]["core"]))
        assert np.linalg.norm(array(held["core"]) - expected) < 2e-3 * moved
        assert torch.equal(update.factors(name).b, sent.adapter[name].b)
        assert np.abs(t[name] - 1).max() > 1e-4


def test_ravan_cores_stay_in_their_blocks_and_average_exactly() -> None:
    """Three rounds: nothing between the heads, and K is the weighted mean of the clients' cores."""
    state = None
    for seed in range(3):
        fed = build(ravan(3), seed, ((12, 14),), ranks=(8, 8), counts=(3, 1), start=state)
        state = served(fed)[0]
        assert_same(received(fed, state), fed.ideal, 1e-11)
        core = array(state.modules["layer0"]["core"])
        mask = np.zeros((8, 8), dtype=bool)
        for place in blocks(8, 3):
            mask[place, place] = True
        assert not core[~mask].any()
        assert core[mask].all()
        b, v = (array(state.modules["layer0"][part]) for part in "bv")
        inside = np.linalg.pinv(b) @ fed.ideal["layer0"] @ np.linalg.pinv(v).T
        np.testing.assert_allclose(core, inside, atol=1e-11 * np.linalg.norm(inside))


def test_ravan_reaches_a_higher_rank_for_the_same_numbers_than_one_core() -> None:
    """64 numbers a module: four heads of four rows reach rank 16, Fed-SB's one core rank 8; and no base travels."""
    options = {"shapes": ((30, 40),), "counts": (3, 1)}
    many = build(ravan(4), 0, ranks=(16, 16), **options)  # type: ignore[arg-type]
    one = build(fed_sb(), 0, ranks=(8, 8), **options)  # type: ignore[arg-type]
    ranks = [np.linalg.matrix_rank(received(fed, served(fed)[0])["layer0"], tol=1e-8) for fed in (many, one)]
    assert ranks == [16, 8]
    assert traffic(ravan(4), 16, ranks=(16, 16), **options) == (64, 64)
    sent = many.method.broadcast(served(many)[0], Request(16))
    assert sent.seeded == {"a", "b", "subspaces"}


def test_ravan_stands_ranks_above_a_layers_size_and_refuses_no_heads() -> None:
    """Spare directions are empty, and more heads than directions are as many as there are."""
    for shape, heads in (((2, 9), 3), ((9, 2), 2), ((3, 3), 9)):
        fed = build(ravan(heads), 1, (shape,), ranks=(4, 4), counts=(1, 2))
        assert_same(received(fed, served(fed)[0]), fed.ideal, 1e-11)
    with pytest.raises(ValueError, match=r"method\.heads = 0: expected at least 1"):
        ravan(heads=0)
