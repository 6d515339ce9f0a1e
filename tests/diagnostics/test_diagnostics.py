"""Every figure of the diagnostics against a dense float64 oracle, and the papers' statements as known answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.federations import (
    ADAPTER,
    CASES,
    Case,
    Dense,
    Federation,
    array,
    build,
    distance,
    federations,
    received,
    served,
    weighted_sum,
)
from peaks import LargestTensor
from scipy.linalg import subspace_angles

from fedspan.algebra.lowrank import LowRank
from fedspan.diagnostics import gauge, spectra
from fedspan.diagnostics.measure import FIGURES, MAX_PAIRS, measure
from fedspan.federation.rounds import Observation
from fedspan.methods import METHODS
from fedspan.methods.base import ServerState
from fedspan.methods.folds import SUM, Exchange, Partial
from fedspan.methods.messages import Request
from fedspan.methods.readout import fresh_a
from fedspan.support.seeding import generator

laws = settings(deadline=None, max_examples=6, derandomize=True)
BY_ID = {case.id: case for case in CASES}


def observed(fed: Federation) -> Observation:
    """The round as the round loop would show it."""
    sent = []
    for update in fed.updates:
        rank = next((update.factors(name).rank for name in update.modules), None)
        sent.append(fed.method.start(fed.method.broadcast(fed.state, Request(rank)), None))
    return Observation(fed.method, fed.state, served(fed)[0], fed.updates, sent, {})


def figures(fed: Federation, **options: Any) -> dict[str, Any]:
    return measure(observed(fed), **options)["diagnostics"]


def second(case: Case | str, **options: Any) -> Federation:
    """A federation in its second round, so that there is something before it."""
    case = BY_ID[case] if isinstance(case, str) else case
    first = build(case, **options)
    fed = build(case, **{**options, "seed": options.get("seed", 0) + 1}, start=served(first)[0])
    return replace(fed, template=fed.state.template)


def plus(x: Dense, y: Dense, sign: float = 1.0) -> Dense:
    return {name: x[name] + sign * y[name] for name in x}


def patches(fed: Federation) -> Dense:
    """The mean of the frozen patches that the clients start with."""
    found = {name: np.zeros(shape) for name, shape in fed.template.modules.items()}
    total = sum(update.num_examples for update in fed.updates)
    for update, sent in zip(fed.updates, observed(fed).broadcasts, strict=True):
        for name, p in sent.patch.items():
            dense = array(p.b) @ array(p.a) if isinstance(p, LowRank) else array(p)
            found[name] = found[name] + update.num_examples / total * dense
    return found


def numerical_space(x: np.ndarray, rank: int | None = None) -> np.ndarray:
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    keep = int((s > 1e-10 * max(float(s[0]), 1e-300)).sum()) if s[0] > 0 else 0
    return u[:, : keep if rank is None else min(keep, rank)]


def outside(x: np.ndarray, rows: np.ndarray) -> float:
    """Energy of X outside the row space of `rows`."""
    v = numerical_space(rows.T)
    return float(np.linalg.norm(x - x @ v @ v.T) ** 2)


def energies(x: Dense) -> dict[str, float]:
    return {name: float(np.linalg.norm(value) ** 2) for name, value in x.items()}


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    total = sum(weights[name] for name in values)
    return sum(values[name] * weights[name] for name in values) / total if total > 0 else None


def angles(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    found = [np.degrees(subspace_angles(u, v)) for u, v in pairs if u.shape[1] and v.shape[1]]
    return np.concatenate(found) if found else np.zeros(0)


def close(actual: float | None, expected: float | None, tolerance: float = 1e-8) -> None:
    assert (actual is None) == (expected is None), (actual, expected)
    if expected is not None:
        assert actual == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_the_names_of_the_figures_are_all_there() -> None:
    found = figures(second("glora"))
    assert set(FIGURES) | {"worst"} == set(found)
    assert len(FIGURES) == len(set(FIGURES))


@pytest.mark.parametrize("case", ADAPTER, ids=lambda case: case.id)
def test_distances_are_those_of_the_dense_matrices(case: Case) -> None:
    """From the ideal, from the old state plus innovations, after every readout, and of FedIT's rule."""

    @laws
    @given(first=federations(case), seed=st.integers(0, 99))
    def law(first: Federation, seed: int) -> None:
        ranks = [next(iter(u.modules.values())).rank for u in first.updates]
        counts = [u.num_examples for u in first.updates]
        shapes = list(first.template.modules.values())
        fed = build(case, seed, shapes, ranks, counts, start=served(first)[0])
        fed = replace(fed, template=fed.state.template)
        found, after = figures(fed), served(fed)[0]
        own = {name: weighted_sum(fed, lambda u, n=name: client_delta(u, n)) for name in fed.template.modules}
        ideal = plus(own, patches(fed))
        close(found["distance_from_ideal"], distance(received(fed, after), ideal))
        for rank in set(ranks):
            close(found["readout_loss"][str(rank)], distance(received(fed, after, rank), ideal))
            floor = sum(np.sum(np.linalg.svd(x, compute_uv=False)[rank:] ** 2) for x in ideal.values())
            close(found["truncation_loss"][str(rank)], float((floor / sum(energies(ideal).values())) ** 0.5), 1e-7)
        sent = dict.fromkeys(fed.template.modules, 0.0)
        share = np.array(counts, dtype=float) / sum(counts)
        for p, broadcast in zip(share, observed(fed).broadcasts, strict=True):
            for name, f in broadcast.adapter.items():
                sent[name] = sent[name] + p * f.scaling * array(f.b) @ array(f.a)
        kept = plus(plus(received(fed, fed.state), own), sent, -1.0)
        close(found["distance_from_innovation"], distance(received(fed, after), kept))
        if len(set(ranks)) == 1:
            means = {
                name: weighted_sum(fed, lambda u, n=name: u.factors(n).scaling * array(u.factors(n).b))
                @ weighted_sum(fed, lambda u, n=name: array(u.factors(n).a))
                for name in fed.template.modules
            }
            close(found["cross_terms"], distance(means, own))
        else:
            assert found["cross_terms"] is None

    law()


def client_delta(update: Any, name: str) -> np.ndarray:
    f = update.factors(name)
    return f.scaling * array(f.b) @ array(f.a)


@pytest.mark.parametrize("case", ADAPTER, ids=lambda case: case.id)
def test_spaces_and_ranks_are_those_of_the_dense_matrices(case: Case) -> None:
    """Angles, drift, escapes, effective and stable rank, with their weights over the modules."""
    for seed, ranks in ((3, (2, 2, 2)), (4, (1, 2, 4) if case.info.hetero_rank else (3, 3, 3))):
        fed = second(
            case, seed=seed, shapes=((24, 20), (18, 28)), ranks=ranks, counts=(3, 1, 2), server_rank=max(ranks)
        )
        found, after = figures(fed), received(fed, served(fed)[0])
        before = received(fed, fed.state)
        modules, rank = list(fed.template.modules), fed.template.rank
        own = {name: [client_delta(u, name) for u in fed.updates] for name in modules}
        mean = {name: weighted_sum(fed, lambda u, n=name: client_delta(u, n)) for name in modules}
        spaces = {name: [numerical_space(x) for x in own[name]] for name in modules}
        apart = {name: angles(list(pairwise(u))) for name, u in spaces.items()}
        weights, whole = energies(mean), energies(after)
        close(found["angle_clients_mean"], weighted_mean({n: float(a.mean()) for n, a in apart.items()}, weights), 1e-6)
        close(found["angle_clients_max"], max(float(a.max()) for a in apart.values()), 1e-6)
        to = {n: float(angles([(u, numerical_space(mean[n], rank)) for u in spaces[n]]).mean()) for n in modules}
        close(found["angle_consensus"], weighted_mean(to, weights), 1e-6)
        turned = {n: angles([(numerical_space(before[n], rank), numerical_space(after[n], rank))]) for n in modules}
        close(found["drift_mean"], weighted_mean({n: float(a.mean()) for n, a in turned.items()}, whole), 1e-6)
        close(found["drift_max"], max(float(a.max()) for a in turned.values()), 1e-6)
        total = sum(whole.values())
        close(found["row_space_escape"], sum(outside(after[n], before[n]) for n in modules) / total)
        first = {n: fresh_a(fed.template, n, rank).double().numpy() for n in modules}
        close(found["first_a_escape"], sum(outside(after[n], first[n]) for n in modules) / total)
        effective, stable = {}, {}
        for name in modules:
            s = np.linalg.svd(after[name], compute_uv=False) ** 2
            q = s[s > 0] / s.sum()
            effective[name], stable[name] = float(np.exp(-(q * np.log(q)).sum())), float(s.sum() / s[0])
        close(found["effective_rank"], weighted_mean(effective, whole))
        close(found["stable_rank"], weighted_mean(stable, whole))
        worst = min(effective, key=lambda n: effective[n])
        assert found["worst"]["effective_rank"]["module"] == worst
        close(found["worst"]["effective_rank"]["value"], effective[worst])


@pytest.mark.parametrize("case", ADAPTER, ids=lambda case: case.id)
def test_gauge_sensitivity_is_the_dense_change_under_the_same_gauges(case: Case) -> None:
    """Zero where the method claims invariance, the oracle's change where it does not, None where a factor is frozen."""
    ranks = (2, 3, 4) if case.info.hetero_rank else (3, 3, 3)
    fed = second(case, seed=5, ranks=ranks, counts=(1, 2, 3), server_rank=max(ranks))
    found, seen = figures(fed)["gauge_sensitivity"], observed(fed)
    if any(not (s.recipe.train_a and s.recipe.train_b) for s in seen.broadcasts):
        assert found is None
        return
    key = (fed.template.seed, fed.state.round_num)
    updates = [gauge.refactored(u, *key) for u in fed.updates]
    other = received(fed, served(fed, updates)[0])
    expected = distance(other, received(fed, served(fed)[0]))
    close(found, expected, 1e-9)
    assert found <= 1e-10 if case.info.gauge_invariant else found > 1e-2


def test_a_gauge_changes_the_factors_and_nothing_else() -> None:
    """B G and G⁻¹ A have the product of B and A; G has the condition that it says, and depends on its key alone."""
    fed = build(BY_ID["fedit"], ranks=(4, 4), dtype=torch.float32)
    for update in fed.updates:
        other = gauge.refactored(update, 1, 2)
        for name in update.modules:
            np.testing.assert_allclose(client_delta(other, name), client_delta(update, name), rtol=0, atol=2e-4)
            assert not torch.allclose(other.factors(name).b, update.factors(name).b, atol=0.1)
            assert other.factors(name).b.dtype == torch.float32
        assert other.dense is update.dense
    for rank in (2, 5):
        assert np.linalg.cond(gauge.random_gauge(rank, "k").numpy()) == pytest.approx(gauge.CONDITION)
    assert torch.equal(gauge.random_gauge(3, "k"), gauge.random_gauge(3, "k"))
    assert not torch.equal(gauge.random_gauge(3, "k"), gauge.random_gauge(3, "l"))
    assert abs(float(gauge.random_gauge(1, "k").abs())) != pytest.approx(1.0)


def test_glora_whose_rank_spans_the_union_is_at_the_ideal() -> None:
    """Proposition 1 of 2605.06733: distance 0; with one direction less it is not."""
    options = {"shapes": [(30, 20)], "ranks": (2, 3, 4), "counts": (1, 2, 3)}
    assert figures(build(BY_ID["glora"], **options, server_rank=9))["distance_from_ideal"] <= 1e-12
    assert figures(build(BY_ID["glora"], **options, server_rank=8))["distance_from_ideal"] > 1e-3


def test_ffa_lora_never_leaves_the_rows_of_its_first_a() -> None:
    """2410.23111: row(ΔW) ⊆ row(A₀) for ever, while FedIT and FLoRA leave them."""
    for name, confined in (("ffa_lora", True), ("fedit", False), ("flora", False)):
        state = None
        for seed in range(4):
            fed = build(BY_ID[name], seed, ((50, 60),), (3, 3), (1, 2), server_rank=3, start=state)
            found, state = figures(fed), served(fed)[0]
            assert (found["first_a_escape"] < 1e-25) == confined
            if seed:
                assert (found["row_space_escape"] < 1e-25) == confined
            else:
                assert found["row_space_escape"] is None
            assert (found["distance_from_ideal"] < 1e-12) == (name != "fedit")


def test_flexlora_loses_what_truncation_must_lose() -> None:
    """2410.23111: (Σ_{j>r} σ_j²)^½ of T, the server's own figure at its rank, and more at smaller ranks."""
    fed = build(BY_ID["flexlora"], 2, ((16, 12),), (2, 4, 6), (1, 1, 1), server_rank=6)
    found, own = figures(fed), served(fed)[1]["truncation_error"]
    assert found["truncation_loss"]["6"] == pytest.approx(own, rel=1e-9)
    assert found["distance_from_ideal"] == pytest.approx(own, rel=1e-9)
    assert found["readout_loss"] == pytest.approx(found["truncation_loss"], rel=1e-9)
    assert found["readout_loss"]["2"] > found["readout_loss"]["4"] > found["readout_loss"]["6"] > 0


def test_the_cross_terms_are_what_fedit_loses_whoever_is_the_server() -> None:
    for name in ("fedit", "glora", "flora"):
        found = figures(build(BY_ID[name], 6, ranks=(3, 3, 3), counts=(1, 2, 3), server_rank=3))
        fedit = figures(build(BY_ID["fedit"], 6, ranks=(3, 3, 3), counts=(1, 2, 3), server_rank=3))
        assert found["cross_terms"] == pytest.approx(fedit["distance_from_ideal"], rel=1e-9)


def test_a_rule_that_forgets_is_seen() -> None:
    """Replacing the state by low-rank clients' adapters loses what they were never sent; innovations do not."""
    lost = {}
    for update in ("replace", "innovation"):
        method = METHODS["glora"](update=update, server_rank=12, basis="energy")
        first = build(method, 0, ((20, 20),), (4, 4), (1, 1), server_rank=4)
        fed = build(method, 1, ((20, 20),), (1, 1), (1, 1), server_rank=4, start=served(first)[0])
        lost[update] = figures(replace(fed, template=fed.state.template))
    assert lost["innovation"]["distance_from_innovation"] < 1e-12 < lost["replace"]["distance_from_innovation"]
    assert lost["replace"]["distance_from_ideal"] < 1e-12 < lost["innovation"]["distance_from_ideal"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_averaged_weights_are_measured_as_differences(dtype: torch.dtype) -> None:
    """Distance 0 for the true mean and 1/2 for half of the step; ranks are of the whole change since the base."""
    fed = build(BY_ID["fedavg"], 3, ((14, 10), (8, 11)), (2, 2), (1, 3), dtype=dtype, server_rank=2)
    base = {name: value + torch.ones_like(value) for name, value in fed.state.dense.items()}
    seen = observed(fed)
    found = measure(seen, base)["diagnostics"]
    assert found["distance_from_ideal"] < (1e-12 if dtype == torch.float64 else 1e-6)
    dense = {n: (seen.before.dense[n] + seen.after.dense[n]) / 2 for n in seen.after.dense}
    half = measure(replace(seen, after=replace(seen.after, dense=dense)), base)["diagnostics"]
    assert half["distance_from_ideal"] == pytest.approx(0.5, rel=1e-5)
    whole = {n: array(seen.after.dense[n]) - array(base[n]) for n in fed.template.modules}
    stable = {n: float(np.linalg.norm(x) ** 2 / np.linalg.norm(x, 2) ** 2) for n, x in whole.items()}
    assert found["stable_rank"] == pytest.approx(weighted_mean(stable, energies(whole)), rel=1e-5)
    spaces = {
        n: [numerical_space(array(u.dense[n]) - array(fed.state.dense[n]), 2) for u in fed.updates] for n in whole
    }
    apart = {n: float(angles([(u[0], u[1])]).mean()) for n, u in spaces.items()}
    close(found["angle_clients_mean"], weighted_mean(apart, energies(fed.ideal)), 1e-3)
    for name in ("gauge_sensitivity", "cross_terms", "row_space_escape", "first_a_escape", "readout_loss"):
        assert found[name] is None
    without = measure(seen)["diagnostics"]
    assert without["effective_rank"] is without["drift_mean"] is None
    assert without["distance_from_ideal"] == found["distance_from_ideal"]


def test_what_does_not_apply_is_none_and_never_zero() -> None:
    one = figures(build(BY_ID["glora"], ranks=(2,), counts=(1,)))
    assert one["angle_clients_mean"] is one["angle_consensus"] is one["angle_clients_max"] is None
    assert one["drift_mean"] is one["row_space_escape"] is None
    nothing = figures(build(BY_ID["flexlora"], ranks=(2, 2), counts=(1, 1), silent=(0, 1)))
    assert {nothing[name] for name in FIGURES if name not in ("readout_loss", "truncation_loss")} == {None}
    assert set(nothing["readout_loss"].values()) == {None}
    mixed = figures(build(BY_ID["glora"], ranks=(2, 3), counts=(1, 1)))
    assert mixed["cross_terms"] is None


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_observed_in_every_round(name: str) -> None:
    """Through the round loop: the record can be written as JSON, and gauge figures are as the method claims."""
    case = BY_ID[name]
    method, run_state = case.make(), tiny.run_state(case.make(), 4)
    people = tiny.clients(4) if case.info.pooled else tiny.clients(2 if case.info.hetero_rank else 4, 4, 4)
    for _ in range(2):
        run_state, record = tiny.run_round(method, run_state, people, tiny.fake_work, observe=measure)
        found = json.loads(json.dumps(record, allow_nan=False))["diagnostics"]
        sensitivity = found["gauge_sensitivity"]
        if sensitivity is not None:
            assert sensitivity < 1e-4 if case.info.gauge_invariant else sensitivity > 1e-2
        if case.info.personalised:
            assert found["distance_from_ideal"] is None


def test_observing_changes_nothing_and_says_the_same_twice() -> None:
    fed = second("glora", ranks=(2, 3), counts=(1, 2), server_rank=3)
    seen = observed(fed)
    before = [t.clone() for u in fed.updates for f in u.modules.values() for t in (f.a, f.b)]
    assert measure(seen) == measure(seen)
    after = [t for u in fed.updates for f in u.modules.values() for t in (f.a, f.b)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ["glora", "flora", "fedex_lora", "fedit"])
def test_no_dense_matrix_is_formed(name: str) -> None:
    size, rank, clients = 512, 4, 3
    fed = second(name, shapes=[(size, size)], ranks=[rank] * clients, counts=[1, 2, 3], dtype=torch.float32)
    seen = observed(fed)
    with LargestTensor() as largest:
        measure(seen)
    assert rank * size <= largest.numel < size * size / 4


def test_a_patch_that_outgrew_its_factors_is_measured_as_the_matrix_it_is() -> None:
    """FLoRA's patch becomes dense after some rounds: distances stay 0, and the rank is that of the matrix."""
    state = None
    for seed in range(3):
        fed = build(BY_ID["flora"], seed, ((8, 9),), (3, 3), (1, 2), server_rank=3, start=state)
        found, state = figures(fed), served(fed)[0]
        s = np.linalg.svd(received(fed, state)["layer0"], compute_uv=False) ** 2
        q = s[s > 0] / s.sum()
        close(found["effective_rank"], float(np.exp(-(q * np.log(q)).sum())))
        assert found["distance_from_ideal"] < 1e-12
    assert state is not None
    assert state.patches is not None
    assert isinstance(state.patches.total["layer0"], torch.Tensor)
    assert found["row_space_escape"] is None


@pytest.mark.parametrize("name", ["flora", "fedavg"])
def test_only_so_many_pairs_are_compared(name: str) -> None:
    """Angles are of the first 33 clients in sorted order, the mean of all."""
    num = MAX_PAIRS + 8
    fed = build(BY_ID[name], 0, ((9, 9),), (1,) * num, (1,) * num, server_rank=1)
    whole = [fed.delta_of(u, "layer0") for u in fed.updates]
    apart = angles(list(pairwise([numerical_space(x, 1) for x in whole[: MAX_PAIRS + 1]])))
    found = figures(fed)
    assert len(apart) == MAX_PAIRS
    assert found["angle_clients_mean"] == pytest.approx(apart.mean(), abs=1e-6)
    assert found["angle_clients_max"] == pytest.approx(apart.max(), abs=1e-6)


def test_effective_and_stable_rank_count_equal_directions() -> None:
    """k equal singular values are k directions, for all three ways to know them."""
    for shape in ((20, 30), (300, 250)):
        for k in (1, 5, 20):
            x = torch.zeros(shape, dtype=torch.float64)
            x[:k, :k] = 3 * torch.eye(k, dtype=torch.float64)
            known = spectra.spectrum(x, "seed")
            assert known.complete
            assert spectra.effective_rank(known) == pytest.approx(k)
            assert spectra.stable_rank(known) == pytest.approx(k)
    assert spectra.effective_rank(spectra.spectrum(torch.zeros(4, 5), "seed")) is None


def test_a_large_matrix_gets_a_lower_bound_that_is_near() -> None:
    """Above 768 only 32 singular values are known: the bound is tight where they hold the energy."""
    for decay, tight in ((0.2, 1e-3), (0.01, None)):
        s = np.exp(-decay * np.arange(780))
        x = torch.zeros(800, 780, dtype=torch.float64)
        x[torch.randperm(800, generator=generator(0))[:780], torch.arange(780)] = torch.from_numpy(s)
        known = spectra.spectrum(x, "seed")
        q = s**2 / (s**2).sum()
        truth = float(np.exp(-(q * np.log(q)).sum()))
        bound = spectra.effective_rank(known)
        assert not known.complete
        assert len(known.squares) == spectra.SKETCH_RANK
        assert bound is not None
        assert 0.5 * truth < bound <= truth * (1 + 1e-6)
        if tight:
            assert bound == pytest.approx(truth, rel=tight)
            assert spectra.stable_rank(known) == pytest.approx(1 / q[0], rel=1e-6)
        assert known.tail(8) == pytest.approx(float((s[8:] ** 2).sum()), rel=1e-2)
        assert known.tail(33) is None


def test_a_sketched_leading_space_is_the_leading_space() -> None:
    s = torch.exp(-0.3 * torch.arange(300, dtype=torch.float64))
    x = torch.linalg.qr(torch.randn(400, 300, generator=generator(1), dtype=torch.float64))[0] * s
    u, v = spectra.leading(x, 8, "k"), torch.linalg.svd(x)[0][:, :8]
    assert u.shape == (400, 8)
    assert float(spectra.degrees([(u, v)]).max()) < 0.1
    assert torch.equal(u, spectra.leading(x, 8, "k"))
    assert spectra.leading(torch.zeros(400, 300), 8, "k").shape == (400, 0)


def test_errors_of_modules_add_as_energies() -> None:
    """The whole is the root of summed squares over modules, so a small module with a large error counts little."""
    fed = build(BY_ID["fedit"], 2, ((10, 10), (10, 10)), (3, 3), (1, 1), server_rank=3)
    seen = observed(fed)
    small = []
    for update in seen.updates:
        f = update.factors("layer1")
        small.append(replace(update, modules={**update.modules, "layer1": replace(f, b=f.b * 1e-3)}))
    fed = replace(fed, updates=tuple(small))
    found = figures(fed)
    first = distance({"layer0": received(fed, served(fed)[0])["layer0"]}, {"layer0": fed.ideal["layer0"]})
    assert found["distance_from_ideal"] == pytest.approx(first, rel=1e-4)
    assert found["worst"]["distance_from_ideal"]["value"] >= found["distance_from_ideal"]


def test_what_is_measured_is_documented() -> None:
    """The page names every figure."""
    page = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f"`{name}`" in page


def test_the_gauge_is_measured_through_every_exchange_of_a_round() -> None:
    """A round that asks twice about what was learnt is repeated as a whole: FedIT, which hears all twice."""
    plain = build(BY_ID["fedit"], 4, ranks=(3, 3), counts=(1, 2), server_rank=3)
    fedit = plain.method

    def finish(state: ServerState, partial: Partial) -> tuple[ServerState, Mapping[str, float]]:
        if state.exchange == 0:
            return replace(state, extra={"seen": partial.mean("layer0")["b"]}), {}
        assert torch.equal(state.extra["seen"], partial.mean("layer0")["b"])
        return fedit.finish(replace(state, extra={}), partial)

    twice = replace(fedit, exchanges=(Exchange(SUM), Exchange(SUM, "again")), finish=finish)
    assert figures(replace(plain, method=twice))["gauge_sensitivity"] == figures(plain)["gauge_sensitivity"] > 1e-2
