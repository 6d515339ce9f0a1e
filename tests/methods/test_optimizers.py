"""FedProx, SCAFFOLD and the server optimizers: what each promises, on problems with a known optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from federations import Array, Federation, array, build, gauge, regauged, served
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedspan.client.training import Assignment, TrainingSettings, train
from fedspan.config import DataConfig, LocalConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.methods import fedavg, fedftg, fedit, ffa_lora, flora, glora
from fedspan.methods.base import Direct, Method, ServerState, advance, aggregate
from fedspan.methods.fedprox import fedprox
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, ClientState, Diagnostics, Request, Template, Update
from fedspan.methods.scaffold import scaffold
from fedspan.methods.server_optimizers import Kind, fedadagrad, fedadam, fedavgm, fedyogi, with_server_optimizer

laws = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
KINDS: tuple[Kind, ...] = ("fedavgm", "fedadagrad", "fedadam", "fedyogi")


@dataclass(frozen=True)
class Quadratics:
    """Client k minimises ½ (w − a_k)ᵀ H_k (w − a_k): different curvatures, different optima."""

    h: Array  # (K, d, d)
    a: Array  # (K, d)
    counts: Sequence[float]

    @classmethod
    def draw(cls, seed: int, counts: Sequence[float], size: int = 4) -> Quadratics:
        rng = np.random.default_rng(seed)
        roots = rng.standard_normal((len(counts), size, size))
        h = roots @ roots.transpose(0, 2, 1) / size + 0.5 * np.eye(size)
        return cls(h, 3 * rng.standard_normal((len(counts), size)), counts)

    @property
    def optimum(self) -> Array:
        """The minimum of Σ p_k f_k."""
        p = np.array(self.counts) / sum(self.counts)
        return np.linalg.solve(np.einsum("k,kij->ij", p, self.h), np.einsum("k,kij,kj->i", p, self.h, self.a))

    def train(self, k: int, sent: Broadcast, rates: Sequence[float]) -> Update:
        """SGD with one step for each rate, the correction added to every gradient, FedProx's pull too."""
        h, a = torch.from_numpy(self.h[k]), torch.from_numpy(self.a[k])
        start = sent.dense["w"]
        w = start.clone()
        for rate in rates:
            gradient = h @ (w - a) + sent.recipe.proximal * (w - start) + sent.correction.get("w", torch.zeros(()))
            w = w - rate * gradient
        return Update(f"c{k}", self.counts[k], {}, {"w": w}, rate_sum=sum(rates))

    def run(
        self,
        method: Method,
        cohorts: Sequence[Sequence[int]],
        rates: Sequence[float] = (0.1,) * 8,
        num_clients: int | None = None,
        watch: Callable[[ServerState, Mapping[int, ClientState]], None] = lambda state, kept: None,
    ) -> tuple[ServerState, dict[int, ClientState]]:
        """The rounds, with those clients in each, as a round loop runs them."""
        total = len(self.counts) if num_clients is None else num_clients
        size = self.a.shape[1]
        state = method.init(Template({}, 1, num_clients=total), {"w": torch.zeros(size, dtype=torch.float64)})
        kept: dict[int, ClientState] = {}
        for cohort in cohorts:
            updates = []
            for k in cohort:
                sent = method.start(method.broadcast(state, Request(None)), kept.get(k))
                update, mine = method.encode(self.train(k, sent, rates), sent, kept.get(k))
                if mine is not None:
                    kept[k] = mine
                updates.append(update)
            state = aggregate(method, state, updates)[0]
            watch(state, kept)
        return state, kept


def w_of(state: ServerState) -> Array:
    return array(state.dense["w"])


def test_fedprox_without_mu_is_fedavg() -> None:
    """To the bit, on the weights of the targets and on all of them."""
    problem = Quadratics.draw(0, (3, 1, 5))
    for prox, plain in ((fedprox(0.0, "all"), fedavg()), (fedprox(0.0), fedftg(galore_rank=None))):
        assert prox.info.trains == plain.info.trains
        first, second = (problem.run(method, [(0, 1, 2)] * 4)[0] for method in (prox, plain))
        assert torch.equal(first.dense["w"], second.dense["w"])


@given(seed=seeds)
@laws
def test_fedprox_pulls_every_client_to_where_it_started(seed: int) -> None:
    """With so many steps that each client arrives: W_k = (H_k + μ I)⁻¹ (H_k a_k + μ W₀), averaged."""
    problem = Quadratics.draw(seed, (3, 1, 5))
    mu = 2.0
    state = problem.run(fedprox(mu, "all"), [(0, 1, 2)] * 2, rates=(0.05,) * 500)[0]
    w = np.zeros(4)
    for _ in range(2):
        arrived = [
            np.linalg.solve(h + mu * np.eye(4), h @ a + mu * w) for h, a in zip(problem.h, problem.a, strict=True)
        ]
        w = np.average(arrived, axis=0, weights=problem.counts)
    np.testing.assert_allclose(w_of(state), w, atol=1e-9)


@pytest.mark.parametrize("server_rate", [0.5, 1.0])
@pytest.mark.parametrize(("seed", "counts"), [(0, (1, 1)), (1, (5, 1, 3)), (2, (1, 9, 2, 2))])
def test_scaffold_reaches_the_optimum_that_fedavg_misses(
    seed: int, counts: tuple[int, ...], server_rate: float
) -> None:
    """Clients of different curvature and optima, eight local steps a round: FedAvg's fixed point lies elsewhere."""
    problem = Quadratics.draw(seed, counts)
    cohorts = [range(len(counts))] * 300
    reached = problem.run(scaffold(server_rate=server_rate), cohorts)[0]
    assert np.linalg.norm(w_of(reached) - problem.optimum) < 1e-9
    earlier, stalled = (problem.run(fedavg(), cohorts[:n])[0] for n in (200, 300))
    np.testing.assert_allclose(w_of(stalled), w_of(earlier), atol=1e-9)
    assert np.linalg.norm(w_of(stalled) - problem.optimum) > 0.01


def test_scaffold_reaches_it_under_partial_participation() -> None:
    """Two of six clients a round, drawn at random: no noise remains, where FedAvg keeps wandering."""
    problem, rng = Quadratics.draw(1, (1,) * 6), np.random.default_rng(0)
    cohorts = [sorted(rng.choice(6, 2, replace=False)) for _ in range(1200)]
    assert np.linalg.norm(w_of(problem.run(scaffold(), cohorts)[0]) - problem.optimum) < 1e-6
    assert np.linalg.norm(w_of(problem.run(fedavg(), cohorts)[0]) - problem.optimum) > 0.05


@given(seed=seeds, data=st.data())
@laws
def test_the_servers_control_is_the_mean_of_the_clients(seed: int, data: st.DataObject) -> None:
    """After every round: c = Σ_k c_k / N with equal weights, for any cohort; Σ p_k c_k when all take part, with any."""
    cohorts = data.draw(st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6))
    equal, unequal = Quadratics.draw(seed, (2,) * 4), Quadratics.draw(seed, (1, 5, 2, 8))

    def is_mean(problem: Quadratics) -> Callable[[ServerState, Mapping[int, ClientState]], None]:
        def check(state: ServerState, kept: Mapping[int, ClientState]) -> None:
            own = [array(kept[k]["w"]) if k in kept else np.zeros(4) for k in range(4)]
            expected = np.average(own, axis=0, weights=problem.counts)
            np.testing.assert_allclose(array(state.extra["w"]), expected, atol=1e-12 * np.abs(own).max())

        return check

    equal.run(scaffold(), [sorted(cohort) for cohort in cohorts], watch=is_mean(equal))
    unequal.run(scaffold(), [range(4)] * 3, watch=is_mean(unequal))


@pytest.mark.parametrize("rates", [(0.1,) * 5, (0.02, 0.04, 0.06, 0.08, 0.1)], ids=["constant", "warmup"])
def test_a_clients_control_is_the_mean_of_its_own_gradients(rates: tuple[float, ...]) -> None:
    """Σ η_t g_t / Σ η_t, the correction taken out again, in the first round and the third."""
    problem = Quadratics.draw(2, (1, 1))
    for rounds in (1, 3):
        before, kept = problem.run(scaffold(), [(0, 1)] * (rounds - 1), rates)
        method = scaffold()
        sent = method.start(method.broadcast(before, Request(None)), kept.get(0))
        correction = array(sent.correction["w"]) if rounds > 1 else np.zeros(4)
        assert bool(np.abs(correction).max() > 0.01) is (rounds > 1)
        w, total = w_of(before), np.zeros(4)
        for rate in rates:
            gradient = problem.h[0] @ (w - problem.a[0])
            total, w = total + rate * gradient, w - rate * (gradient + correction)
        own = method.encode(problem.train(0, sent, rates), sent, kept.get(0))[1]
        assert own is not None
        np.testing.assert_allclose(array(own["w"]), total / sum(rates), atol=1e-12)


@pytest.mark.parametrize("server_rate", [0.25, 1.0])
def test_the_server_steps_by_its_rate_along_the_mean(server_rate: float) -> None:
    """W ← W + ρ Σ p_k (W_k − W); with ρ = 1 FedAvg's first round to the bit, and tagged exact then alone."""
    problem = Quadratics.draw(4, (1, 5, 2))
    first = problem.run(scaffold(server_rate=server_rate), [(0, 1, 2)])[0]
    plain = problem.run(fedavg(), [(0, 1, 2)])[0]
    torch.testing.assert_close(first.dense["w"], server_rate * plain.dense["w"], rtol=1e-14, atol=0)
    assert scaffold(server_rate=server_rate).info.exact is (server_rate == 1.0)
    assert torch.equal(first.dense["w"], plain.dense["w"]) is (server_rate == 1.0)


def test_scaffold_without_a_count_takes_all_to_take_part() -> None:
    problem = Quadratics.draw(3, (1, 1, 1))
    unknown, known = (problem.run(scaffold(), [(0, 1, 2)] * 3, num_clients=n)[0] for n in (0, 3))
    assert torch.equal(unknown.extra["w"], known.extra["w"])


def test_a_client_whose_first_round_failed_brings_its_control() -> None:
    """The server may know of no c when a client already has a c_k: its correction is then −c_k."""
    kept = {"w": torch.tensor([1.0, 2.0])}
    sent = scaffold().start(Broadcast({}, {"w": torch.zeros(2)}), kept)
    assert torch.equal(sent.correction["w"], -kept["w"])


def test_scaffold_is_for_sgd_unless_asked_otherwise() -> None:
    assert scaffold().info.optimizer == "sgd"
    assert scaffold(optimizer="adamw").info.optimizer == "any"
    method, update = scaffold(), Update("c0", 1, {}, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"c0 trained with learning rates of sum 0\.0: expected above 0"):
        method.encode(update, Broadcast({}, {"w": torch.zeros(2)}), None)


@pytest.fixture(scope="module")
def tasks() -> Encoded:
    rows = tiny.questions(24)
    pairs = [(r["instruction"], r["input"]) for r in rows]
    return encode(Rows("instruction", pairs, [r["output"] for r in rows], [""] * 24), tiny.tokenizer(), DataConfig())


def test_real_clients_train_as_asked(bases: dict[str, Path], tasks: Encoded) -> None:
    """A transformer on SGD: FedProx's larger μ moves less and μ = 0 as FedAvg; SCAFFOLD's c_k is the plain gradient."""
    model = tiny.load(bases["llama"], "instruction", trains="targets")
    local = LocalConfig(optimizer="sgd", learning_rate=0.05, batch_size=8, clip_norm=None)

    def learn(sent: Broadcast, steps: int) -> Update:
        work = Assignment("client-0", sent, np.arange(len(tasks)), steps, 1.0)
        return train(model, work, tasks, TrainingSettings(local=local), 0).update

    dense = {name: value.clone() for name, value in model.dense().items()}
    template = model.template(1, 1.0, False, 0)

    def moved(method: Method) -> tuple[dict[str, Tensor], float]:
        sent = method.broadcast(method.init(template, dense), Request(None))
        after = dict(learn(sent, 12).dense)
        return after, float(sum((after[name] - dense[name]).square().sum() for name in dense) ** 0.5)

    (free, plain), (averaged, _), (_, held) = moved(fedprox(0.0)), moved(fedftg(galore_rank=None)), moved(fedprox(5.0))
    tiny.same(free, averaged)
    assert held < 0.7 * plain

    method = scaffold(trains="targets")
    state = method.init(template, dense)
    sent = method.start(method.broadcast(state, Request(None)), None)
    answer, own = method.encode(learn(sent, 1), sent, None)
    assert own is not None
    other = replace(aggregate(method, state, [answer])[0], dense=dense)
    other = replace(other, extra={name: value + 0.1 for name, value in other.extra.items()})
    corrected = method.start(method.broadcast(other, Request(None)), own)
    torch.testing.assert_close(corrected.correction[next(iter(dense))], torch.full_like(dense[next(iter(dense))], 0.1))
    again = method.encode(learn(corrected, 1), corrected, own)[1]
    assert again is not None
    for name, value in own.items():
        # (W − W_k)/η keeps as many digits of the gradient as W leaves it.
        torch.testing.assert_close(again[name], value, atol=2e-5, rtol=1e-4)


def oracle(kind: str, deltas: list[Array], rate: float, beta: float, beta2: float, tau: float) -> list[Array]:
    """The published recursions in numpy: where each round leaves x, from x = 0, given Δ of every round."""
    x, m, v = np.zeros_like(deltas[0]), np.zeros_like(deltas[0]), np.full_like(deltas[0], tau**2)
    path = []
    for delta in deltas:
        if kind == "fedavgm":
            m = beta * m + delta
            x = x + rate * m
        else:
            m = beta * m + (1 - beta) * delta
            if kind == "fedadagrad":
                v = v + delta**2
            elif kind == "fedadam":
                v = beta2 * v + (1 - beta2) * delta**2
            else:
                v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
            x = x + rate * m / (np.sqrt(v) + tau)
        path.append(x)
    return path


def drifting(method: Method, deltas: Sequence[Array]) -> list[Array]:
    """Two clients whose mean step is Δ_t in every round t, whatever they are sent."""
    state = method.init(Template({}, 1), {"w": torch.zeros(deltas[0].shape, dtype=torch.float64)})
    path = []
    for delta in deltas:
        w = method.broadcast(state, Request(None)).dense["w"]
        updates = [
            Update(f"c{k}", count, {}, {"w": w + torch.from_numpy(delta) + away})
            for k, (count, away) in enumerate(((3, 1.0), (1, -3.0)))
        ]
        state = aggregate(method, state, updates)[0]
        path.append(w_of(state))
    return path


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, scale=st.sampled_from([1e-4, 1e-2, 1.0]))
@laws
def test_a_server_optimizer_is_the_published_recursion(kind: Kind, seed: int, scale: float) -> None:
    """Five rounds of random steps, weighted by the counts, at every size of Δ beside τ."""
    rng = np.random.default_rng(seed)
    deltas = [scale * rng.standard_normal(6) for _ in range(5)]
    method = with_server_optimizer(fedavg(), kind, 0.3, 0.8, 0.95, 0.01)
    for found, expected in zip(drifting(method, deltas), oracle(kind, deltas, 0.3, 0.8, 0.95, 0.01), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13)


def test_the_default_rate_suits_the_kind() -> None:
    """1 for the heavy ball, a hundredth for the adaptive ones, in the wrapper as in the methods of that name."""
    delta = [np.array([0.5, -2.0])]
    makers = (fedavgm, lambda: fedadagrad(momentum=0.9), fedadam, fedyogi)
    for kind, make, rate in zip(KINDS, makers, (1.0, 0.01, 0.01, 0.01), strict=True):
        wrapped, named = drifting(with_server_optimizer(fedavg(), kind), delta)[0], drifting(make(), delta)[0]
        np.testing.assert_array_equal(wrapped, named)
        np.testing.assert_allclose(named, oracle(kind, delta, rate, 0.9, 0.99, 1e-3)[0], rtol=1e-12)


def test_fedadagrad_has_no_momentum_and_slows_down_as_one_over_root_t() -> None:
    """A steady Δ: step t is η Δ/(√(τ² + t Δ²) + τ), as the method of that name has it without further options."""
    path = drifting(fedadagrad(0.3, tau=1e-2), [np.array([0.5, -2.0])] * 100)
    steps = np.diff([np.zeros(2), *path], axis=0)
    t = np.arange(1, 101)[:, None]
    delta = np.array([0.5, -2.0])
    np.testing.assert_allclose(steps, 0.3 * delta / (np.sqrt(1e-4 + t * delta**2) + 1e-2), rtol=1e-10)
    np.testing.assert_allclose(np.abs(steps[-1]), 0.03, rtol=0.02)


def test_fedavgm_is_a_heavy_ball_and_no_moving_average() -> None:
    """A steady step Δ is followed at Δ/(1−β) in the end; a moving average would follow it at Δ."""
    path = drifting(fedavgm(1.0, 0.9), [np.ones(3)] * 80)
    np.testing.assert_allclose(path[0], 1.0)
    np.testing.assert_allclose(path[-1] - path[-2], 10.0, rtol=1e-3)


@pytest.mark.parametrize("plain", [fedavg, lambda: fedftg(galore_rank=None), ffa_lora], ids=["all", "targets", "ffa"])
@given(seed=seeds)
@laws
def test_fedavgm_at_rest_is_the_method_itself(plain: Callable[[], Method], seed: int) -> None:
    """η = 1 and β = 0: the same bits for two rounds, modules and heads."""
    wrapped = with_server_optimizer(plain(), "fedavgm", 1.0, 0.0, 0.99, 1e-3)
    states = []
    for method in (plain(), wrapped):
        fed = build(method, seed, ranks=(2, 2), counts=(1, 7))
        fed = replace(build(method, seed + 1, ranks=(2, 2), counts=(5, 2)), state=served(fed)[0])
        states.append(served(fed)[0])
    tiny.same(states[1].dense, states[0].dense)
    for name, held in states[0].modules.items():
        tiny.same(states[1].modules[name], held)


@pytest.mark.parametrize("kind", KINDS)
def test_on_ffa_lora_it_acts_on_the_trained_factor_and_the_heads(kind: Kind) -> None:
    """B of every module and the head follow the recursion; A₀ stays, and the clients' gauge does not exist."""
    method = with_server_optimizer(ffa_lora(), kind, 0.3, 0.8, 0.95, 0.01)
    feds = [build(method, seed, ranks=(3, 3), counts=(1, 7), server_rank=3) for seed in range(3)]
    state = feds[0].state
    first = state.modules["layer0"]["a"]
    paths: dict[str, list[Array]] = {"sb": [], "head": []}
    deltas: dict[str, list[Array]] = {"sb": [], "head": []}
    origin = array(state.dense["head"])
    for fed in feds:
        before = {"sb": array(state.modules["layer0"]["sb"]), "head": array(state.dense["head"])}
        means = {
            "sb": np.average([16 / 3 * array(u.factors("layer0").b) for u in fed.updates], axis=0, weights=(1, 7)),
            "head": np.average([array(u.dense["head"]) for u in fed.updates], axis=0, weights=(1, 7)),
        }
        state = served(replace(fed, state=state))[0]
        for part, mean in means.items():
            deltas[part].append(mean - before[part])
        paths["sb"].append(array(state.modules["layer0"]["sb"]))
        paths["head"].append(array(state.dense["head"]) - origin)
    for part, path in paths.items():
        np.testing.assert_allclose(path, oracle(kind, deltas[part], 0.3, 0.8, 0.95, 0.01), atol=1e-11)
    assert torch.equal(state.modules["layer0"]["a"], first)


def test_the_moments_are_part_of_the_state() -> None:
    """A state carried on by its fields alone goes on as the run itself: nothing is held elsewhere."""
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal(4) for _ in range(4)]
    for make in (fedavgm, fedadagrad, fedadam, fedyogi):
        whole = drifting(make(), deltas)
        state = make().init(Template({}, 1), {"w": torch.zeros(4, dtype=torch.float64)})
        for delta in deltas:
            kept = {name: value.clone() for name, value in state.extra.items()}
            state = ServerState(state.template, {}, dict(state.dense), state.round_num, extra=kept)
            w = state.dense["w"]
            state = aggregate(make(), state, [Update("c", 1, {}, {"w": w + torch.from_numpy(delta)})])[0]
        np.testing.assert_allclose(w_of(state), whole[-1], rtol=1e-12)
        parts = {"server/momentum/w"} | (set() if make is fedavgm else {"server/second/w"})
        assert state.extra.keys() == parts


def test_it_acts_once_a_round_and_keeps_what_the_method_keeps() -> None:
    """A round of two exchanges: the first leaves the model alone; the method's own `extra` is not lost."""

    def init(template: Template, dense: Mapping[str, Tensor]) -> ServerState:
        return ServerState(template, {}, dense)

    def broadcast(state: ServerState, request: Request) -> Broadcast:
        return Broadcast({}, state.dense)

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Diagnostics]:
        if state.exchange == 0:
            return replace(state, exchange=1, extra={**state.extra, "seen": torch.tensor(float(state.round_num))}), {}
        return advance(state, dense=partial.mean_dense()), {"measured": 1.0}

    plain = replace(fedavg(), init=init, broadcast=broadcast, finish=finish, exchanges=(fedavg().exchanges[0],) * 2)
    method = with_server_optimizer(plain, "fedavgm", 1.0, 0.5, 0.99, 1e-3)
    state = method.init(Template({}, 1), {"w": torch.zeros(2)})
    for round_num, moved in ((0, 1.0), (1, 2.5)):
        update = Update("c", 1, {}, {"w": state.dense["w"] + 1})
        between, _ = aggregate(method, state, [update])
        assert torch.equal(between.dense["w"], state.dense["w"])
        state, measured = aggregate(method, between, [update])
        assert (state.round_num, float(state.extra["seen"]), measured) == (round_num + 1, round_num, {"measured": 1.0})
        torch.testing.assert_close(state.dense["w"], torch.full((2,), moved))


@pytest.mark.parametrize("factory", [fedit, glora, flora], ids=["fedit", "glora", "flora"])
def test_on_factor_pairs_it_is_refused(factory: Callable[[], Method]) -> None:
    with pytest.raises(ValueError, match="would depend on their gauge"):
        with_server_optimizer(factory(), "fedadam", 0.01)


def test_what_the_refusal_is_about() -> None:
    """The same rule on FedIT's pairs moves with a gauge that all clients share; FedIT itself does not."""

    def read(state: ServerState) -> dict[str, Tensor]:
        return {f"{name}/{part}": t for name, held in state.modules.items() for part, t in held.items()}

    def write(state: ServerState, x: Mapping[str, Tensor]) -> ServerState:
        modules = {name: {part: x[f"{name}/{part}"] for part in held} for name, held in state.modules.items()}
        return replace(state, modules=modules)

    forced = with_server_optimizer(replace(fedit(), vector=Direct(read, write)), "fedadam", 0.1)
    g = gauge(np.random.default_rng(0), 3, 10.0)

    def product(fed: Federation) -> Array:
        held = served(fed)[0].modules["layer0"]
        return array(held["b"]) @ array(held["a"])

    for method, moves in ((fedit(), False), (forced, True)):
        fed = build(method, 0, ranks=(3, 3), counts=(1, 2))
        # From a pair of zeros, which every gauge leaves as it is.
        zeros = {n: {part: torch.zeros_like(t).double() for part, t in x.items()} for n, x in fed.state.modules.items()}
        fed = replace(fed, state=replace(fed.state, modules=zeros))
        first, second = product(fed), product(regauged(fed, lambda k, rank: g))
        assert bool(np.linalg.norm(second - first) > 0.1 * np.linalg.norm(first)) is moves


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedavgm(learning_rate=0.0), r"learning_rate = 0\.0 .*: expected above 0"),
        (lambda: fedavgm(momentum=1.0), r"momentum = 1\.0 .*: expected at least 0 and below 1"),
        (lambda: fedadam(beta2=-0.1), r"beta2 = -0\.1 .*: expected at least 0 and below 1"),
        (lambda: fedyogi(tau=0.0), r"tau = 0\.0 .*: expected above 0"),
        (lambda: fedadagrad(tau=0.0), r"tau = 0\.0 .*: expected above 0"),
        (lambda: fedprox(-1.0), r"method\.mu = -1\.0: expected at least 0"),
        (lambda: scaffold(server_rate=0.0), r"method\.server_rate = 0\.0: expected above 0"),
    ],
)
def test_options_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
