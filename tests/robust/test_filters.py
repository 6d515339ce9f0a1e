"""The distances are those of what updates do to the weights, and each filter is what its source says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import attacks
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from peaks import LargestTensor

from fedspan import config as settings
from fedspan.algebra.lowrank import LowRank
from fedspan.federation.requirements import chosen
from fedspan.methods import METHODS
from fedspan.methods.messages import Broadcast, Factors, Update, Vector
from fedspan.robust import Screened, refusal, screen
from fedspan.robust.distances import Cohort, product_squares
from fedspan.robust.dry_run import averages_factors, sends_pairs
from fedspan.robust.filters import FILTERS, bounded_claims, krum_scores, weiszfeld
from fedspan.support.seeding import generator

PAIRS = {"glora", "glora_plus", "flexlora", "raflora", "flora", "fedex_lora", "lora_fair", "lora_fair_ridge"} | {
    "flora_na",
    "fedrot_lora",
    "fedit",
    "fedmomentum",
    "florist",
}
KEEP_A_GAUGE = PAIRS - {"glora", "glora_plus", "flexlora", "flora", "florist", "fedmomentum"}
FEDERATED = [name for name, make in METHODS.items() if not make().info.pooled and not make().info.alone]


def normal(*shape: int, key: object = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator("filters", key, *shape), dtype=torch.float64)


def gauge(rank: int, condition: float, key: object = 0) -> torch.Tensor:
    left, right = (torch.linalg.qr(normal(rank, rank, key=(key, side)))[0] for side in "lr")
    return left * torch.logspace(0, -np.log10(condition), rank, dtype=torch.float64) @ right


def asked(name: str, filter: str = "none", **robust: Any) -> settings.Config:
    return settings.from_mapping({"method": {"name": name}, "robust": {"filter": filter, **robust}})


def screened(stage: attacks.Stage, updates: Sequence[Update], filter: str = "none", **robust: Any) -> Screened:
    keywords = {key: robust.pop(key) for key in ("ask", "bad") if key in robust}
    found = screen(asked(stage.method.info.name, filter, **robust).robust, stage.method)
    assert found is not None
    return found(updates, stage.sent, **keywords)


def cohort(stage: attacks.Stage, updates: Sequence[Update] | None = None) -> Cohort:
    keeps = averages_factors(stage.method)
    return Cohort.of(stage.method, stage.updates if updates is None else updates, stage.sent, "train", keeps)


def regauged(update: Update, *factors: torch.Tensor) -> Update:
    """(B·G, G⁻¹·A), module by module."""
    modules = {}
    for (name, _), g in zip(update.modules.items(), factors, strict=True):
        f = update.factors(name)
        modules[name] = Factors(f.b.double() @ g, torch.linalg.solve(g, f.a.double()), f.scaling)
    return replace(update, modules=modules)


@limits(deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    seed=st.integers(0, 99),
)
def test_distances_of_products_are_those_of_the_matrices(m: int, n: int, ranks: list[int], seed: int) -> None:
    pairs = [LowRank(normal(m, r, key=(seed, k)), normal(r, n, key=(seed, k))) for k, r in enumerate(ranks)]
    pairs.append(LowRank(pairs[0].b * 3, pairs[0].a / 3))
    dense = torch.stack([x.b @ x.a for x in pairs])
    expected = (dense[:, None] - dense).square().sum(dim=(-2, -1))
    torch.testing.assert_close(product_squares(pairs), expected, rtol=1e-12, atol=1e-24 * float(expected.max()) + 1e-26)


def test_a_small_difference_of_large_products_is_not_lost() -> None:
    """What is 1e-10 of the products is measured to 5 digits; from squares that are subtracted it would be noise."""
    b, a, own = normal(50, 4), normal(4, 40), normal(50, 4, key="own") * 1e-10
    near = LowRank(b + own, a)
    found = product_squares([LowRank(b, a), near])[0, 1]
    torch.testing.assert_close(found.sqrt(), torch.linalg.matrix_norm((near.b - b) @ a), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["glora", "flora", "fedex_lora", "fedit"])
def test_distances_do_not_depend_on_the_gauge(name: str) -> None:
    """Condition 1e6, and B·1e8 beside A·1e-8: no distance between products moves; how factors cross does."""
    stage = attacks.stage(METHODS[name](), 5)
    wild = list(stage.updates)
    wild[1] = regauged(wild[1], gauge(4, 1e6, "one"), gauge(4, 1e6, "two"))
    wild[3] = regauged(wild[3], *[torch.eye(4, dtype=torch.float64) * 1e8] * 2)
    plain, other = cohort(stage), cohort(stage, wild)
    torch.testing.assert_close(other.distances(), plain.distances(), rtol=1e-7, atol=1e-9)
    assert float(other.crossings()[3, 0]) > 1e5 * float(plain.crossings()[3, 0])


def test_crossings_are_what_averaging_factors_loses() -> None:
    """T − B̄Ā = ½ Σ p_i p_j (s_i B_i − s_j B_j)(A_i − A_j), and those terms are what is measured."""
    stage = attacks.stage(METHODS["fedit"](), 5)
    pairs = [[u.factors(name).delta() for u in stage.updates] for name in attacks.SHAPES]
    squares, lost = torch.zeros(5, 5, dtype=torch.float64), []
    for held in pairs:
        b, a = torch.stack([x.b.double() for x in held]), torch.stack([x.a.double() for x in held])
        terms = (b[:, None] - b) @ (a[:, None] - a)
        squares += terms.square().sum(dim=(-2, -1))
        lost.append((b @ a).mean(dim=0) - b.mean(dim=0) @ a.mean(dim=0))
        torch.testing.assert_close(terms.mean(dim=(0, 1)) / 2, lost[-1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cohort(stage).crossings(), squares.sqrt(), rtol=1e-9, atol=1e-9)


def test_changes_are_compared_where_clients_were_sent_different_things() -> None:
    """A client of rank 2 lacks what its readout left out; that is no difference in what it learnt."""
    stage = attacks.stage(METHODS["flexlora"](), 6, ranks=(2, 8), rounds=2)
    found, whole = cohort(stage).distances(), []
    for update, sent in zip(stage.updates, stage.sent, strict=True):
        change = [update.factors(n).delta().dense() - f.delta().dense() for n, f in sent.adapter.items()]
        head = update.dense["head"] - sent.dense["head"]
        whole.append(torch.cat([x.double().flatten() for x in (*change, head)]))
    torch.testing.assert_close(found, torch.cdist(torch.stack(whole), torch.stack(whole)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(FEDERATED) - {"fed_sb", "shared_galore", "glora_sums"}))
def test_the_size_of_an_update_is_that_of_its_change(name: str) -> None:
    """A client that learnt nothing has size 0 in every round, whatever the server has become."""
    stage = attacks.stage(METHODS[name](), 5, rounds=2)
    idle = [u for u in cohort(stage).idle if u is not None]
    still = cohort(stage, [replace(u, client_id=str(k)) for k, u in enumerate(idle)])
    assert all(still.size(k) < 1e-12 for k in range(5))
    assert all(cohort(stage).size(k) > 0.1 for k in range(5))


def test_what_a_client_did_not_learn_is_no_change() -> None:
    """SCAFFOLD's corrections are the server's: the change of a control is what was sent of it."""
    stage = attacks.stage(METHODS["scaffold"](), 5, rounds=2)
    assert all(bool(t.any()) for t in stage.sent[0].correction.values())
    idle = cohort(stage).idle[0]
    assert idle is not None
    assert not any(bool(t.any()) for p in idle.modules.values() if isinstance(p, Vector) for t in p.values.values())


def test_the_limit_is_of_the_norm_and_of_training_alone() -> None:
    stage = attacks.stage(METHODS["fedavg"](), 5)
    size = cohort(stage).size(2)
    one = replace(stage, updates=stage.updates[2:3], sent=stage.sent[2:3])
    assert list(screened(one, one.updates, max_norm=0.99 * size).rejected) == ["client-02"]
    assert not screened(one, one.updates, max_norm=1.01 * size).rejected
    # A gradient or a sketch is no change of the weights.
    assert not screened(one, one.updates, max_norm=0.99 * size, ask="gradient").rejected


def test_no_matrix_is_formed() -> None:
    m, n, r = 1500, 1200, 3
    stage = attacks.stage(METHODS["fedit"](), 4, ranks=(r,), rounds=0, shapes={"wide": (m, n)})
    held = cohort(stage)
    with LargestTensor() as peak:
        held.distances(), held.crossings(), held.size(0)
    assert 0 < peak.numel < m * n / 20


def test_no_square_overflows() -> None:
    """Factors of 1e30 and 1e-30 are finite numbers; so is every distance."""
    stage = attacks.stage(METHODS["glora"](), 5, dtype=torch.float32)
    updates = list(stage.updates)
    big = {
        n: Factors(u.b.float() * 1e30, u.a.float() * 1e5, u.scaling)
        for n in attacks.SHAPES
        for u in [updates[2].factors(n)]
    }
    updates[2] = replace(updates[2], modules=big)
    distances = cohort(stage, updates).distances()
    assert distances.isfinite().all()
    assert (distances[2] > 1e30).sum() == 4
    assert "client-02" not in [u.client_id for u in screened(stage, updates, "multi_krum").updates]


def test_what_a_method_sends_is_found_by_asking_it() -> None:
    assert {name for name in FEDERATED if sends_pairs(METHODS[name]())} == PAIRS
    assert {name for name in FEDERATED if averages_factors(METHODS[name]())} == KEEP_A_GAUGE


@limits(deadline=None)
@given(n=st.integers(3, 9), f=st.integers(0, 3), seed=st.integers(0, 99))
def test_krum_is_its_definition(n: int, f: int, seed: int) -> None:
    """Σ over the n − f − 2 nearest others, by the book."""
    if n <= 2 * f + 2:
        return
    x = normal(n, 4, key=seed).numpy()
    expected = []
    for i in range(n):
        others = sorted(float(np.sum((x[i] - x[j]) ** 2)) for j in range(n) if j != i)
        expected.append(sum(others[: n - f - 2]))
    scores = krum_scores(torch.cdist(torch.from_numpy(x), torch.from_numpy(x)), f)
    np.testing.assert_allclose(scores, expected, rtol=1e-9)


@limits(deadline=None)
@given(n=st.integers(3, 9), far=st.sampled_from([1.0, 1e3, 1e5]), seed=st.integers(0, 99))
@example(n=4, far=1.0, seed=94)  # the median is one of the updates, and the steps come to it slowly
def test_weiszfeld_finds_the_minimum(n: int, far: float, seed: int) -> None:
    """No step away from z = Σ w_k x_k, and no update itself, has a smaller Σ α_k ‖z − x_k‖."""
    x = normal(n, 3, key=seed)
    x[0] *= far
    share = normal(n, key=("share", seed)).abs() + 0.5
    share = share / share.sum()
    # At a share of one half all points between that update and the others are equally good, and the iteration, which is
    # bounded, converges ever more slowly.
    assume(abs(float(share.max()) - 0.5) > 0.01)
    d = torch.linalg.vector_norm(x[:, None] - x, dim=-1)
    half = d.sort(dim=1).values[:, n // 2]
    w, _ = weiszfeld(d, share.tolist(), int(half.argmin()), float(half.min()))
    assert sum(w) == pytest.approx(1)
    z = torch.tensor(w, dtype=torch.float64) @ x

    def cost(point: torch.Tensor) -> float:
        return float((share * torch.linalg.vector_norm(x - point, dim=1)).sum())

    assert cost(z) <= min(map(cost, x)) * (1 + 1e-12)
    points = [*x, *(z + size * normal(3, key=(seed, size, k)) for size in (1e-3, 0.1) for k in range(20))]
    assert cost(z) <= min(map(cost, points)) + 1e-6 * cost(z)


def test_weiszfeld_needs_no_distance_apart() -> None:
    """All equal, one client, and a majority in one point."""
    assert weiszfeld(torch.zeros(3, 3, dtype=torch.float64), [0.2, 0.3, 0.5], 0, 0.0)[0] == pytest.approx(
        [0.2, 0.3, 0.5]
    )
    assert weiszfeld(torch.zeros(1, 1, dtype=torch.float64), [1.0], 0, 0.0)[0] == [1.0]
    d = torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.float64)
    assert weiszfeld(d, [1 / 3] * 3, 0, 0.0)[0][2] < 1e-5


def test_claims_are_bounded_by_those_of_others() -> None:
    assert bounded_claims([5, 1e9, 7, 6, 5], 1) == pytest.approx([5 / 30, 7 / 30, 7 / 30, 6 / 30, 5 / 30])
    assert bounded_claims([1, 1, 100], 0) == pytest.approx([1 / 102, 1 / 102, 100 / 102])
    with pytest.raises(ValueError, match=r"2 bad clients could hold 66% of the weight.*weighting = 'equal'"):
        bounded_claims([100, 1e6, 1e6, 1, 1], 2)


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fedprox", "scaffold"])
@pytest.mark.parametrize("n", [5, 6])
def test_coordinates_are_taken_one_by_one(name: str, n: int) -> None:
    stage = attacks.stage(METHODS[name](), n, counts=range(10, 10 + n))

    def flat(updates: Sequence[Update]) -> np.ndarray[Any, Any]:
        parts = [[*u.dense.values(), *(t for p in u.modules.values() for t in p.values.values())] for u in updates]
        return np.stack([torch.cat([t.double().flatten() for t in held]).numpy() for held in parts])

    values = np.sort(flat(stage.updates), axis=0)
    for kind, expected in (("median", np.median(values, axis=0)), ("trimmed_mean", values[2 : n - 2].mean(axis=0))):
        found = screened(stage, stage.updates, kind, attackers=2).updates
        assert [u.client_id for u in found] == [u.client_id for u in stage.updates]
        np.testing.assert_allclose(flat(found), np.stack([expected] * n), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("filter", FILTERS)
def test_a_filter_keeps_a_cohort_of_equals(filter: str) -> None:
    """n times one update gives that update, whichever copies are left."""
    method = METHODS["ffa_lora"]()
    stage = attacks.stage(method, 5, spread=0.0)
    expected = stage.delivered(stage.updates)
    found = screened(stage, stage.updates, filter)
    assert found.rejected == {}
    assert attacks.distance(stage.delivered(found.updates), expected) < 1e-6


@pytest.mark.parametrize("filter", FILTERS)
def test_the_order_and_the_claims_of_clients_change_nothing(filter: str) -> None:
    """Krum and medians do not look at claims; the geometric median bounds them."""
    stage = attacks.stage(METHODS["fedavg"](), 7)
    expected = stage.delivered(screened(stage, stage.updates, filter, attackers=2).updates)
    backwards = replace(stage, updates=stage.updates[::-1], sent=stage.sent[::-1])
    assert (
        attacks.distance(
            backwards.delivered(screened(backwards, backwards.updates, filter, attackers=2).updates), expected
        )
        < 1e-6
    )
    boasting = attacks.mixed(stage, [2, 4], attacks.claiming(attacks.scaled(1.0), 1e12))
    assert attacks.distance(stage.delivered(screened(stage, boasting, filter, attackers=2).updates), expected) < 1e-6


@pytest.mark.parametrize("name", FEDERATED)
@pytest.mark.parametrize("filter", ["none", *FILTERS])
def test_every_method_runs_under_every_filter_that_it_is_not_refused(name: str, filter: Any) -> None:
    """In all its exchanges; else it is refused with the names of those that are not."""
    method = METHODS[name]()
    # The filters alone where the size of an update cannot be known.
    limited = name != "glora_sums" or filter == "none"
    tree: dict[str, Any] = {
        "method": {"name": name},
        "robust": {"filter": filter, "max_norm": 1e6 if limited else "none"},
        "federation": {"ranks": 4, "participation": 1.0},
        "local": {"optimizer": "sgd" if method.info.optimizer == "sgd" else "adamw"},
    }
    reason = refusal(method, filter, limited, mixed_ranks=False)
    if reason is not None:
        with pytest.raises(ValueError, match=re.escape(reason)) as refused:
            chosen(settings.from_mapping(tree))
        able = re.search(r"methods that can have it: ([\w, ]+)$", str(refused.value))
        assert able is not None
        assert name not in able[1].split(", ")
        return
    config = settings.from_mapping(tree)
    assert chosen(config).info == method.info
    found = screen(config.robust, method)
    assert found is not None
    asked_of: list[str] = []

    def filtered(ask: str, updates: Sequence[Update], sent: Sequence[Broadcast]) -> list[Update]:
        asked_of.append(ask)
        return list(found(updates, sent, ask=ask).updates)

    attacks.play(method, filtered)
    assert asked_of == [exchange.ask for exchange in method.exchanges]


REFUSALS = [
    ({"privacy": {"secure_sums": True}}, "fedavg", "krum", "with privacy.secure_sums = true the server sees no"),
    ({"privacy": {"fixed_point": True}}, "fedavg", "median", "with privacy.fixed_point = true the server sees no"),
    ({"federation": {"sums_only": True}}, "fedavg", "median", "with federation.sums_only = true the server sees no"),
    ({"privacy": {"dp": "client"}, "federation": {"weighting": "equal"}}, "fedavg", "median", "hide no client"),
    ({}, "fedit", "median", "fedit sends factors in a gauge of each client's own"),
    ({}, "hetlora", "trimmed_mean", "hetlora sends factors in a gauge of each client's own"),
    ({"federation": {"ranks": [2, 4] * 4}}, "ffa_lora", "median", "federation.ranks differ; .*: .*fedavg"),
    ({}, "fed_sb", "krum", "asks its clients more than once"),
    ({"robust": {"max_norm": 1.0}}, "glora_sums", "none", "glora_sums sends sketches of what was trained"),
    ({}, "centralised", "krum", "has no update of one client"),
    ({"federation": {"participation": 0.5}}, "fedavg", "krum", "4 clients take part in a round, expected at least 5"),
    ({"robust": {"attackers": 3}}, "fedit", "geometric_median", "8 clients .* at least 10 with robust.attackers = 3"),
]


@pytest.mark.parametrize(("sections", "name", "filter", "message"), REFUSALS)
def test_what_cannot_be_is_refused_when_it_is_configured(
    sections: dict[str, dict[str, Any]], name: str, filter: str, message: str
) -> None:
    tree: dict[str, dict[str, Any]] = {"method": {"name": name}, "federation": {"ranks": 4, "participation": 1.0}}
    tree["robust"] = {"filter": filter}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    with pytest.raises(ValueError, match=message) as refused:
        chosen(settings.from_mapping(tree))
    assert "\n" not in str(refused.value)


def test_too_few_for_so_many_attackers() -> None:
    """Counted in every round, with those who were already rejected among the attackers."""
    stage = attacks.stage(METHODS["fedavg"](), 6)
    with pytest.raises(ValueError, match=r"'krum': 6 valid updates, expected at least 7 with 2 bad clients among them"):
        screened(stage, stage.updates, "krum", attackers=2)
    assert len(screened(stage, stage.updates, "krum", attackers=2, bad=1).updates) == 1


def test_nothing_is_asked_for() -> None:
    assert screen(asked("fedavg").robust, METHODS["fedavg"]()) is None
    # A control in the same run has nothing to filter.
    assert screen(asked("fedavg", "krum").robust, METHODS["local"]()) is None


def test_a_size_that_hides_in_the_scaling_is_found() -> None:
    stage = attacks.stage(METHODS["fedit"](), 5)
    f = stage.updates[1].factors("one")
    hidden = {**stage.updates[1].modules, "one": Factors(f.b * 1e4, f.a, f.scaling / 1e4)}
    updates = [replace(u, modules=hidden) if k == 1 else u for k, u in enumerate(stage.updates)]
    rejected = screened(stage, updates, max_norm=1e9).rejected
    assert re.fullmatch(r"one has scaling 0.0002, expected 2", rejected["client-01"])


def test_vectors_are_required_for_coordinates() -> None:
    """Even where the configuration was never read."""
    stage = attacks.stage(METHODS["glora"](), 5)
    with pytest.raises(ValueError, match="holds factor pairs"):
        screened(stage, stage.updates, "median")
