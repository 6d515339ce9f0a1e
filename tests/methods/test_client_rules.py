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

from fedspan.client import cohort
from fedspan.client.learning_rates import rate
from fedspan.client.training import Assignment, TrainingSettings, train
from fedspan.config import DataConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods import METHODS, fed_sb, fedadamw, fedftg, fedprox, ffa_lora, ravan, scaffold
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Broadcast, ClientState, Factors, Recipe, Request, Template, Update
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


@dataclass(frozen=True)
class Fits:
    """Client k minimises ½ ‖(s B A₀ − T_k) C_k‖_F² over B: different targets, seen through different spreads."""

    targets: Array  # (K, m, n)
    spreads: Array  # (K, n, n)

    @classmethod
    def draw(cls, seed: int) -> Fits:
        rng = np.random.default_rng(seed)
        roots = rng.standard_normal((3, 6, 6))
        return cls(rng.standard_normal((3, 5, 6)), roots @ roots.transpose(0, 2, 1) / 6 + 0.3 * np.eye(6))

    def best(self, sa: Array) -> Array:
        """The B that minimises the sum: Σ (B sA − T_k) S_k (sA)ᵀ = 0 with S_k = C_k C_kᵀ."""
        s = self.spreads @ self.spreads.transpose(0, 2, 1)
        left = sum(t @ x @ sa.T for t, x in zip(self.targets, s, strict=True))
        return left @ np.linalg.inv(sum(sa @ x @ sa.T for x in s))

    def gradient(self, k: int, f: Factors, b: Tensor) -> Tensor:
        spread = torch.from_numpy(self.spreads[k])
        lost = (f.scaling * b @ f.a.double() - torch.from_numpy(self.targets[k])) @ spread
        return f.scaling * lost @ spread.mT @ f.a.double().mT

    def run(self, method: Method, rounds: int, steps: int = 6, rate: float = 0.05) -> ServerState:
        state = method.init(Template({"x": (5, 6)}, 2, alpha=2.0, seed=4, num_clients=3), {})
        kept: dict[int, ClientState | None] = {}
        for _ in range(rounds):
            answers = []
            for k in range(3):
                sent = method.start(method.broadcast(state, Request(2)), kept.get(k))
                f = sent.adapter["x"]
                b = f.b.double().clone()
                for _ in range(steps):
                    pull = sent.recipe.proximal * (b - f.b.double())
                    b -= rate * (self.gradient(k, f, b) + pull + sent.correction.get("x/b", torch.zeros(())))
                update = Update(f"c{k}", 1.0, {"x": replace(f, b=b)}, {}, rate_sum=steps * rate)
                answer, kept[k] = method.encode(update, sent, kept.get(k))
                answers.append(answer)
            state, _ = aggregate(method, state, answers)
        return state


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_scaffold_on_an_adapter_reaches_the_optimum_that_ffa_lora_misses(seed: int) -> None:
    """Six local steps a round on clients of different curvature: only with control variates is B̄ the best B."""
    problem = Fits.draw(seed)
    found = []
    for method in (scaffold(trains="adapter"), scaffold(trains="adapter", server_rate=0.5), ffa_lora()):
        held = problem.run(method, 900).modules["x"]
        best = problem.best(array(held["a"]))
        found.append(np.linalg.norm(array(held["sb"]) - best) / np.linalg.norm(best))
    assert found[0] < 1e-6
    assert found[1] < 1e-6
    assert found[2] > 1e-3


def test_scaffold_on_an_adapter_sends_b_and_its_control_and_keeps_its_own() -> None:
    """2 r m numbers each way; c is the mean of the clients' c_k, and c_k the mean gradient of B and of the head."""
    method = scaffold(trains="adapter")
    fed = build(method, 0, ranks=(3, 3), counts=(1, 1), server_rank=3)
    answers, kept = [], []
    for update in fed.updates:
        sent = method.start(method.broadcast(fed.state, Request(3)), None)
        answer, own = method.encode(update, sent, None)
        assert own is not None
        assert own.keys() == {"layer0/b", "layer1/b", "head"}
        expected = (array(sent.adapter["layer0"].b) - array(update.factors("layer0").b)) / 0.5
        np.testing.assert_allclose(array(own["layer0/b"]), expected, rtol=1e-12)
        assert answer.vector("layer0").keys() == {"sb", "control"}
        answers.append(answer)
        kept.append(own)
    state, _ = aggregate(method, fed.state, answers)
    for name in kept[0]:
        mean = (array(kept[0][name]) + array(kept[1][name])) / 2
        np.testing.assert_allclose(array(state.extra[name]), mean, atol=1e-12)
    corrected = method.start(method.broadcast(state, Request(3)), kept[0]).correction
    torch.testing.assert_close(corrected["layer0/b"], state.extra["layer0/b"] - kept[0]["layer0/b"])
    with pytest.raises(ValueError, match="rank 2: expected rank 3 for every client"):
        method.broadcast(state, Request(2))


def test_a_real_client_follows_the_correction_of_its_adapter(adapters: Bench) -> None:
    """One step of SGD: B moves by −η (g + c − c_k), and the cohort engine says that it cannot do it."""
    method = scaffold(trains="adapter")
    state = method.init(adapters.model.template(4, 16.0, False, 1, 2), {})
    sent = method.broadcast(state, Request(4))
    local = LocalConfig(optimizer="sgd", learning_rate=0.3, warmup=0.0)
    plain = adapters.learn(sent, 1, local)
    answer, kept = method.encode(plain, sent, None)
    state, _ = aggregate(method, state, [answer])
    again = method.start(
        method.broadcast(replace(state, extra={n: 3 * x for n, x in state.extra.items()}), Request(4)), kept
    )
    # The same start as in the first round, so that the gradient is the same; c − c_k = 3 c/2 − c.
    corrected = adapters.learn(replace(again, adapter=sent.adapter), 1, local)
    for name in sent.adapter:
        moved = array(plain.factors(name).b)
        np.testing.assert_allclose(array(corrected.factors(name).b), 1.5 * moved, rtol=1e-4, atol=1e-7)
        assert moved.any()
    reason = cohort.applies(adapters.model, adapters.data, sent.recipe, TrainingSettings(local=local))
    assert reason == "each client's gradients are corrected by what it keeps"


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd", "fed_sb", "ravan"])
def test_fedprox_without_mu_is_the_adapter_method_itself(name: str) -> None:
    """The same broadcast, and the same state to the bit after a round."""
    method = fedprox(0.0, trains="adapter", adapter=name)  # type: ignore[arg-type]
    fed = build(method, 0, ranks=(4, 4), counts=(1, 3), server_rank=4)
    assert method.info.name == "fedprox"
    plain = replace(fed, method=METHODS[name]())
    first, second = served(fed)[0], served(plain)[0]
    for module, held in second.modules.items():
        tiny.same(first.modules[module], held)
    assert fedprox(0.5, trains="adapter", adapter=name).broadcast(first, Request(4)).recipe.proximal == 0.5  # type: ignore[arg-type]


def test_fedprox_holds_a_real_clients_factor_and_core(adapters: Bench) -> None:
    """Two steps of SGD: x₂ = x₁ − η (g(x₁) + μ (x₁ − x₀)), for FFA-LoRA's B; and a core moves less for a larger μ."""
    local = LocalConfig(optimizer="sgd", learning_rate=0.3, warmup=0.0)
    template = adapters.model.template(4, 16.0, False, 1)
    ends = {}
    for mu in (0.0, 2.0):
        method = fedprox(mu, trains="adapter")
        sent = method.broadcast(method.init(template, {}), Request(4))
        ends[mu] = {name: array(adapters.learn(sent, 2, local).factors(name).b) for name in sent.adapter}
    one = {name: array(adapters.learn(sent, 1, local).factors(name).b) for name in sent.adapter}
    for name, b in one.items():
        np.testing.assert_allclose(ends[2.0][name], ends[0.0][name] - 0.3 * 2.0 * b, rtol=1e-4, atol=1e-7)
        assert b.any()
    moves = []
    for mu in (0.0, 2.0):
        method = fedprox(mu, trains="adapter", adapter="ravan")
        sent = method.broadcast(method.init(template, {}), Request(4))
        moved = adapters.learn(sent, 6, local)
        moves.append(sum(float(moved.factors(name).a.square().sum()) for name in sent.adapter) ** 0.5)
    assert 0 < moves[1] < 0.8 * moves[0]
