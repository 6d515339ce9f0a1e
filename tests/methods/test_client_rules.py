"""Rules that change local training: FedAdamW, and FedProx, SCAFFOLD and several cores on adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from federations import Array, array, build, served
from torch import Tensor

from fedspan.client.training import Assignment, TrainingSettings, rate, train
from fedspan.config import DataConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods import fedadamw, fedftg
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Broadcast, Request, Update
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
    """Three steps by the book in float64, gradients from the model: weights, second moments corrected for their start."""
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
