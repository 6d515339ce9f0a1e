"""GLoRA and FlexLoRA: the two propositions, the truncation, the readouts, and what each variant promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from federations import (
    Array,
    Federation,
    array,
    assert_same,
    build,
    distance,
    gauge,
    received,
    regauged,
    served,
    weighted_sum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spectral import by_queries, second_round

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import flexlora, glora
from fedspan.methods.base import ServerState
from fedspan.methods.messages import Factors, Request, Template, Update
from fedspan.methods.readout import FRESH, fresh_a, leading_adapter

laws = settings(deadline=None, max_examples=15, derandomize=True)
MIXED: dict[str, Any] = {"shapes": ((20, 20), (24, 14)), "ranks": (2, 4, 7), "counts": (5, 2, 9)}
BASES = ("projector", "energy")


def held(state: ServerState, name: str) -> Array:
    """U·C, densely."""
    return array(state.modules[name]["u"]) @ array(state.modules[name]["c"])


def with_deltas(fed: Federation, factors: list[dict[str, tuple[Array, Array]]]) -> Federation:
    """The federation with other (B, A) than were drawn."""
    updates = []
    for update, pairs in zip(fed.updates, factors, strict=True):
        made = {
            name: Factors(torch.from_numpy(b), torch.from_numpy(a), update.factors(name).scaling)
            for name, (b, a) in pairs.items()
        }
        updates.append(replace(update, modules=made))
    return replace(fed, updates=tuple(updates))


def next_round(fed: Federation, state: ServerState, updates: list[Update]) -> ServerState:
    return served(replace(fed, state=state, updates=tuple(updates)))[0]


def returned(fed: Federation, state: ServerState, rank: int, client_id: str = "client0", count: float = 1) -> Update:
    """What a client that learns nothing sends back: the readout that it was given."""
    sent = fed.method.broadcast(state, Request(rank))
    return Update(client_id, count, dict(sent.adapter), dict(fed.updates[0].dense))


def low_rank(seed: int, m: int, n: int, spectrum: list[float]) -> tuple[Array, Array, Array]:
    """(U, σ, V) with orthonormal U (m, q) and V (n, q)."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((m, len(spectrum))))
    v, _ = np.linalg.qr(rng.standard_normal((n, len(spectrum))))
    return u, np.array(spectrum), v


@pytest.mark.parametrize("sides", ["left", "both"])
@pytest.mark.parametrize("basis", BASES)
def test_proposition_1_the_server_rank_need_only_span_the_union(basis: str, sides: str) -> None:
    """Eight clients of rank 3 inside one 5-dimensional column (and row) space: R = 5 is exact, R = 4 is not."""
    rng = np.random.default_rng(0)
    u, _, v = low_rank(1, 20, 16, [1.0] * 5)
    for server_rank, exact in ((5, True), (4, False)):
        fed = build(
            glora(server_rank=server_rank, basis=basis, sides=sides), shapes=[(20, 16)], ranks=[3] * 8, counts=[1] * 8
        )
        fed = with_deltas(
            fed, [{"layer0": (u @ rng.standard_normal((5, 3)), rng.standard_normal((3, 5)) @ v.T)} for _ in range(8)]
        )
        state, diagnostics = served(fed)
        assert diagnostics["server_rank"] == server_rank
        if exact:
            assert_same(received(fed, state), fed.ideal, 1e-12)
        else:
            assert distance(received(fed, state), fed.ideal) > 0.01


@pytest.mark.parametrize("options", [{}, {"basis": "energy"}, {"sides": "both"}, {"update": "innovation"}], ids=str)
def test_proposition_2_holds_for_a_truncated_server_and_deficient_updates(options: dict[str, Any]) -> None:
    """With R below the union and B_k that has lost rank, a gauge of condition 1e6 still leaves state and readouts.

    After such a gauge the rounding of B_k A_k stands far above eps·σ_1. Taken for directions, it would vote in the
    projector sum with the full weight of the client.
    """

    @laws
    @given(seed=st.integers(0, 2**32 - 1), server_rank=st.integers(1, 6))
    def law(seed: int, server_rank: int) -> None:
        fed = build(glora(server_rank=server_rank, **options), seed, **MIXED)
        halved = [
            {name: (np.repeat(b[:, : -(-b.shape[1] // 2)], 2, axis=1)[:, : b.shape[1]], a) for name, (b, a) in pairs(u)}
            for u in fed.updates
        ]
        fed = with_deltas(fed, halved)
        rng = np.random.default_rng(seed)
        other = regauged(fed, lambda k, rank: gauge(rng, rank, 1e6))
        first, second = served(fed)[0], served(other)[0]
        for rank in (None, 1, 3):
            assert_same(received(other, second, rank), received(fed, first, rank), 1e-6)

    law()


@pytest.mark.parametrize("options", [{}, {"basis": "energy"}, {"sides": "both"}, {"update": "innovation"}], ids=str)
def test_the_server_rank_is_that_of_the_union_in_any_gauge(options: dict[str, Any]) -> None:
    """Three clients at rank 6 whose updates have rank 3, 3 and 2 of 8 directions: 8 are kept, however ill-conditioned.

    Not 18: directions made of rounding cost traffic and take the place of real ones.
    """
    rng = np.random.default_rng(0)
    fed = build(glora(server_rank=18, **options), shapes=[(30, 25)], ranks=[6] * 3, counts=[1, 2, 3])
    thin = [
        (rng.standard_normal((30, q)), rng.standard_normal((q, 6)), rng.standard_normal((6, 25))) for q in (3, 3, 2)
    ]
    fed = with_deltas(fed, [{"layer0": (b @ mix, a)} for b, mix, a in thin])
    for condition in (1.0, 1e6):
        other = regauged(fed, lambda k, rank, c=condition: gauge(rng, rank, c))
        assert served(other)[1]["server_rank"] == 8


def pairs(update: Update) -> list[tuple[str, tuple[Array, Array]]]:
    return [(n, (array(update.factors(n).b), array(update.factors(n).a))) for n in update.modules]


@pytest.mark.parametrize("sides", ["left", "both"])
@given(seed=st.integers(0, 2**32 - 1), server_rank=st.integers(1, 10))
@laws
def test_the_projector_state_is_the_dense_formula(sides: str, seed: int, server_rank: int) -> None:
    """U·C = U Uᵀ T (T V Vᵀ on the right too), U the top-R eigenvectors of the dense Σ p_k P_k."""
    fed = build(glora(server_rank=server_rank, sides=sides), seed, **MIXED)
    state, _ = served(fed)
    for name, ideal in fed.ideal.items():
        left = dense_consensus(fed, name, server_rank, "b")
        expected = left @ ideal
        if sides == "both":
            expected = expected @ dense_consensus(fed, name, server_rank, "a")
        np.testing.assert_allclose(held(state, name), expected, atol=1e-7 * np.linalg.norm(ideal))


def dense_consensus(fed: Federation, name: str, rank: int, part: str) -> Array:
    """U Uᵀ from the m×m projector sum."""

    def projector(update: Update) -> Array:
        factor = array(getattr(update.factors(name), part))
        basis, _ = np.linalg.qr(factor if part == "b" else factor.T)
        return basis @ basis.T

    u = np.linalg.eigh(weighted_sum(fed, projector))[1][:, ::-1][:, :rank]
    return u @ u.T


@pytest.mark.parametrize("factory", [glora, flexlora], ids=["glora-energy", "flexlora"])
@given(seed=st.integers(0, 2**32 - 1), server_rank=st.integers(1, 10))
@laws
def test_the_energy_state_is_the_dense_truncated_svd(factory: Any, seed: int, server_rank: int) -> None:
    """Nothing of that rank is nearer to T (Eckart and Young): what is lost is the tail of T's singular values."""
    method = glora(basis="energy") if factory is glora else flexlora()
    fed = build(method, seed, **MIXED, server_rank=server_rank)
    state, diagnostics = served(fed)
    lost = 0.0
    for name, ideal in fed.ideal.items():
        u, s, vh = np.linalg.svd(ideal, full_matrices=False)
        best = u[:, :server_rank] * s[:server_rank] @ vh[:server_rank]
        np.testing.assert_allclose(held(state, name), best, atol=1e-8 * s[0])
        lost += float((s[server_rank:] ** 2).sum())
    total = sum(np.linalg.norm(x) ** 2 for x in fed.ideal.values())
    assert diagnostics["truncation_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("sides", ["left", "both"])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("update", ["replace", "innovation"])
def test_the_reported_truncation_error_is_the_measured_one(basis: str, sides: str, update: str) -> None:
    """‖T − U·C‖/‖T‖ over all modules, over two rounds; T is state + Σ p_k·innovation where innovations are added."""

    @laws
    @given(seed=st.integers(0, 2**32 - 1), server_rank=st.integers(1, 16))
    def law(seed: int, server_rank: int) -> None:
        fed = build(glora(server_rank=server_rank, basis=basis, sides=sides, update=update), seed, **MIXED)
        for number in range(2):
            target = fed.ideal
            if update == "innovation":
                target = {name: held(fed.state, name) + added(fed, name) for name in target}
            state, diagnostics = served(fed)
            measured = distance({name: held(state, name) for name in target}, target)
            assert diagnostics["truncation_error"] == pytest.approx(measured, rel=1e-6, abs=1e-12)
            fed = replace(build(fed.method, seed + number + 1, **MIXED), state=state)

    law()


def added(fed: Federation, name: str) -> Array:
    """Σ p_k (adapter that came back − readout that was sent)."""

    def innovation(update: Update) -> Array:
        sent = fed.method.broadcast(fed.state, Request(update.factors(name).rank)).adapter[name]
        return fed.delta_of(update, name) - sent.scaling * array(sent.b) @ array(sent.a)

    return weighted_sum(fed, innovation)


@pytest.mark.parametrize("method", [glora(), glora(sides="both"), flexlora()], ids=["left", "both", "flexlora"])
def test_a_readout_is_the_best_of_its_rank(method: Any) -> None:
    """Its distance to the state is the tail of the state's singular values, so it decreases to 0 as r grows."""
    fed = build(method, 3, **MIXED)
    state, _ = served(fed)
    for name in fed.template.modules:
        s = np.linalg.svd(held(state, name), compute_uv=False)
        errors = [np.linalg.norm(received(fed, state, rank)[name] - held(state, name)) for rank in range(1, 15)]
        tails = [np.linalg.norm(s[rank:]) for rank in range(1, 15)]
        np.testing.assert_allclose(errors, tails, atol=1e-11 * s[0])
        assert all(b < a for a, b in pairwise(errors[:12]))
        assert errors[13] < 1e-11 * s[0]


@pytest.mark.parametrize("balance", ["init", "even", "root"])
@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_is_divided_out_of_every_readout(rslora: bool, balance: Any) -> None:
    """FlexLoRA at rank r with α/r (or α/√r): scaling·B·A is the truncated SVD, shared between B and A as asked."""
    fed = build(flexlora(balance=balance), 3, **MIXED, alpha=5.0, rslora=rslora)
    state, _ = served(fed)
    for rank in (1, 2, 5):
        for name, f in fed.method.broadcast(state, Request(rank)).adapter.items():
            assert f.scaling == pytest.approx(5.0 / (rank**0.5 if rslora else rank))
            u, s, vh = np.linalg.svd(fed.ideal[name])
            np.testing.assert_allclose(
                f.scaling * array(f.b) @ array(f.a), u[:, :rank] * s[:rank] @ vh[:rank], atol=1e-9 * s[0]
            )
            rows = {"init": np.full(rank, 1 / 3), "even": s[:rank] / f.scaling, "root": s[:rank] / f.scaling**2}[
                balance
            ]
            np.testing.assert_allclose(array(f.a) @ array(f.a).T, np.diag(rows), atol=1e-9 * s[0])
            left = array(f.b).T @ array(f.b)
            np.testing.assert_allclose(left, np.diag(s[:rank] ** 2 / (rows * f.scaling**2)), atol=1e-8 * s[0] ** 2)


@pytest.mark.parametrize(("adaptive", "balance"), [(True, "init"), (False, "even")])
def test_the_balance_follows_the_optimizer_of_the_clients(adaptive: bool, balance: Any) -> None:
    template = Template({"x": (9, 7)}, 3, adaptive=adaptive)
    x = LowRank(torch.eye(9, 3), torch.tensor([3.0, 2.0, 1.0])[:, None] * torch.eye(3, 7))
    automatic, named = leading_adapter(template, "x", x, 3, 0), leading_adapter(template, "x", x, 3, 0, balance)
    assert torch.equal(automatic.b, named.b)
    assert torch.equal(automatic.a, named.a)


def test_a_readout_s_rows_are_as_long_as_fresh_ones() -> None:
    """In `init`, so that the optimizer's steps mean the same in old and new directions."""
    template = Template({"x": (50, 4000)}, 8)
    fresh = fresh_a(template, "x", 200).norm(dim=1)
    # n entries with squares of mean 1/(3n) and deviation (2/√5)/(3n): 5σ of the mean over 200 rows.
    assert float(fresh.square().mean()) == pytest.approx(FRESH**2, rel=5 * 0.9 / (4000 * 200) ** 0.5)


def test_nested_readouts_nest_and_plain_ones_do_not() -> None:
    """Every direction s·b_j a_j of a smaller adapter is that of a larger one."""
    for readout in ("nested", "svd"):
        fed = build(glora(readout=readout), 4, **MIXED)
        state, _ = served(fed)
        large = fed.method.broadcast(state, Request(6)).adapter
        for rank in (1, 3, 5):
            for name, small in fed.method.broadcast(state, Request(rank)).adapter.items():
                if readout == "nested":
                    for j in range(rank):
                        one = [f.scaling * array(f.b)[:, [j]] @ array(f.a)[[j]] for f in (small, large[name])]
                        np.testing.assert_allclose(*one, atol=1e-12 * np.linalg.norm(one[1]))
    # What nesting gives up: the best adapter of a small rank.
    nested, best = (build(glora(readout=r), 4, **MIXED) for r in ("nested", "svd"))
    assert distance(received(nested, served(nested)[0], 2), nested.ideal) > distance(
        received(best, served(best)[0], 2), best.ideal
    )


@pytest.mark.parametrize("basis", BASES)
@given(seed=st.integers(0, 2**32 - 1), tolerance=st.sampled_from([1e-6, 0.01, 0.1, 0.5]))
@laws
def test_auto_rank_keeps_the_tolerance_and_no_more(basis: str, seed: int, tolerance: float) -> None:
    """The smallest R with ‖T − U·C‖ ≤ tolerance·‖T‖, per module, and never above the dense oracle's."""
    fed = build(glora(server_rank="auto", tolerance=tolerance, basis=basis), seed, **MIXED)
    state, diagnostics = served(fed)
    for name, ideal in fed.ideal.items():
        s = np.linalg.svd(ideal, compute_uv=False)
        tails = np.array([np.linalg.norm(s[r:]) for r in range(len(s) + 1)]) / np.linalg.norm(s)
        rank = state.modules[name]["u"].shape[1]
        assert rank == int((tails <= tolerance).argmax())
        assert np.linalg.norm(held(state, name) - ideal) <= tolerance * np.linalg.norm(ideal) * (1 + 1e-9)
    assert diagnostics["truncation_error"] <= tolerance


def test_innovation_keeps_what_a_low_rank_client_never_saw() -> None:
    """A state of rank 4, then a round with one client of rank 1 that learns nothing.

    "replace" collapses the state to the single direction that the client was sent; "innovation" keeps all of it.
    """
    u, s, v = low_rank(2, 18, 12, [4.0, 3.0, 2.0, 1.0])
    taught = {"layer0": (u * s, v.T / 4.0)}
    for update, rank_left in (("replace", 1), ("innovation", 4)):
        fed = build(glora(update=update), shapes=[(18, 12)], ranks=(4,), counts=(1,))
        fed = with_deltas(fed, [taught])
        before = served(fed)[0]
        after = next_round(fed, before, [returned(fed, before, 1)])
        kept = np.linalg.svd(held(after, "layer0"), compute_uv=False)
        assert int((kept > 1e-9).sum()) == rank_left
        if update == "innovation":
            np.testing.assert_allclose(held(after, "layer0"), held(before, "layer0"), atol=1e-12 * s[0])


@pytest.mark.parametrize("basis", BASES)
def test_innovation_keeps_what_absent_clients_taught(basis: str) -> None:
    """A rank-3 client teaches three directions and leaves; one of rank 2 then strengthens the second of them."""
    u, s, v = low_rank(3, 18, 12, [3.0, 2.0, 1.0])
    for update, strengths in (("replace", [3.0, 2.5, 0.0]), ("innovation", [3.0, 2.5, 1.0])):
        fed = build(glora(update=update, basis=basis), shapes=[(18, 12)], ranks=(3,), counts=(1,))
        before = served(with_deltas(fed, [{"layer0": (u * s, v.T * 3 / 16)}]))[0]
        idle = returned(fed, before, 2)
        f = idle.factors("layer0")
        stronger = Factors(f.b * torch.tensor([1.0, 1.25], dtype=torch.float64), f.a, f.scaling)
        after = next_round(fed, before, [replace(idle, client_id="client1", modules={"layer0": stronger})])
        np.testing.assert_allclose(np.diag(u.T @ held(after, "layer0") @ v), strengths, atol=1e-10)


@pytest.mark.parametrize("basis", BASES)
def test_clients_that_learn_nothing_leave_an_innovation_server_as_it_is(basis: str) -> None:
    """Readouts of any ranks come back unchanged: every innovation is 0, and so is the change of the state."""
    fed = build(glora(update="innovation", basis=basis), 6, **MIXED)
    before = served(fed)[0]
    idle = [returned(fed, before, rank, f"client{rank}", rank) for rank in (1, 2, 5)]
    after = next_round(fed, before, idle)
    for name in fed.template.modules:
        np.testing.assert_allclose(
            held(after, name), held(before, name), atol=1e-11 * np.linalg.norm(held(before, name))
        )


@pytest.mark.parametrize("basis", BASES)
def test_starting_from_the_state_adds_the_clients_updates_exactly(basis: str) -> None:
    """start="state": three rounds of mixed ranks on a frozen patch sum up to Σ_t T_t, past any readout."""
    fed = build(glora(start="state", basis=basis, server_rank=40), 0, **MIXED)
    total, starts = {name: np.zeros(shape) for name, shape in fed.template.modules.items()}, []
    for seed in range(3):
        fed = replace(build(fed.method, seed, **MIXED), state=fed.state)
        total = {name: total[name] + fed.ideal[name] for name in total}
        fed = replace(fed, state=served(fed)[0])
        for rank in (1, 4, None):
            # The patch is the whole state, whatever the client's rank, and the fresh adapter adds nothing.
            assert_same(received(fed, fed.state, rank), total, 1e-12)
        starts.append(fed.method.broadcast(fed.state, Request(4)).adapter["layer0"].a)
    assert not any(torch.equal(x, y) for x, y in pairwise(starts))


def test_starting_from_the_state_truncates_by_energy_optimally() -> None:
    """With R below the rank of state + Σ p_k ΔW_k, basis="energy" keeps the best rank-R approximation of it."""
    fed = build(glora(start="state", basis="energy", server_rank=5), 0, **MIXED)
    first = served(fed)[0]
    second = replace(build(fed.method, 1, **MIXED), state=first)
    after = served(second)[0]
    for name in fed.template.modules:
        u, s, vh = np.linalg.svd(held(first, name) + second.ideal[name], full_matrices=False)
        np.testing.assert_allclose(held(after, name), u[:, :5] * s[:5] @ vh[:5], atol=1e-9 * s[0])


def test_a_new_direction_outvotes_the_old_state() -> None:
    """An innovation stronger than the state's weakest direction enters a full projector state at once, though only one
    client of two has it: each votes for as many directions as the state has, and the other vote is the lighter."""
    u, s, v = low_rank(5, 18, 12, [3.0, 2.0, 0.1, 8.0])
    fed = build(glora(update="innovation", server_rank=3), shapes=[(18, 12)], ranks=(3, 3), counts=(2, 1))
    known = {"layer0": (u[:, :3] * s[:3], v[:, :3].T * 3 / 16)}
    before = served(with_deltas(fed, [known, known]))[0]
    sent = fed.method.broadcast(before, Request(3)).adapter["layer0"]
    b = np.hstack([array(sent.b), u[:, 3:] * s[3]])
    a = np.vstack([array(sent.a), v[:, 3:].T / sent.scaling])
    dense = dict(fed.updates[0].dense)
    grown = Factors(torch.from_numpy(b), torch.from_numpy(a), sent.scaling)
    answers = [Update("client1", 2, {"layer0": grown}, dense), Update("client2", 1, {"layer0": sent}, dense)]
    with_new = next_round(fed, before, answers)
    assert abs(u[:, 3] @ held(with_new, "layer0") @ v[:, 3]) > 4


PUSHED: dict[str, dict[str, Any]] = {
    "replace": {},
    "energy": {"basis": "energy"},
    "both": {"sides": "both"},
    "nested": {"readout": "nested"},
    "innovation": {"update": "innovation"},
    "state": {"start": "state"},
    "auto": {"server_rank": "auto", "tolerance": 1e-13, "update": "innovation"},
    "randomized": {"algebra": "randomized"},
    "randomized-state": {"algebra": "randomized", "start": "state", "basis": "energy"},
}
pushed = pytest.mark.parametrize("options", PUSHED.values(), ids=PUSHED)


@pushed
@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_momentum_is_the_dense_heavy_ball(options: dict[str, Any], beta: float) -> None:
    """Where R spans everything, four rounds follow S_t = T_t + β (S_{t−1} − S_{t−2}), T_t on top of S_{t−1}."""
    method = glora(**{"server_rank": 40, "momentum": beta, **options})
    fed = build(method, 0, **MIXED)
    path: list[dict[str, Array]] = [{name: np.zeros(shape) for name, shape in fed.template.modules.items()}] * 2
    for number in range(4):
        fed = replace(build(method, number, **MIXED), state=fed.state)
        target = fed.ideal
        if options.get("start") == "state":
            target = {name: path[-1][name] + fed.ideal[name] for name in target}
        elif options.get("update") == "innovation":
            target = {name: path[-1][name] + added(fed, name) for name in target}
        path.append({name: target[name] + beta * (path[-1][name] - path[-2][name]) for name in target})
        fed = replace(fed, state=served(fed)[0])
        assert_same({name: held(fed.state, name) for name in target}, path[-1], 1e-10)
        # A fresh adapter of rank 4 on the state, or the readout of all of it: both add up to the state.
        assert_same(received(fed, fed.state, 24), path[-1], 1e-10)


@pytest.mark.parametrize("auto", [False, True])
@laws
@given(seed=st.integers(0, 2**32 - 1), server_rank=st.integers(1, 8))
def test_momentum_is_cut_to_the_server_rank_by_energy(auto: bool, seed: int, server_rank: int) -> None:
    """S_t = trunc_R(trunc_R(T_t) + β (S_{t−1} − S_{t−2})) by dense SVDs, or at the tolerance; the loss as reported."""
    limits: dict[str, Any] = {"server_rank": "auto", "tolerance": 0.2} if auto else {"server_rank": server_rank}
    method = glora(basis="energy", momentum=0.6, **limits)

    def cut(x: Array) -> Array:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        tails = np.array([np.linalg.norm(s[r:]) for r in range(len(s) + 1)])
        rank = int((tails <= 0.2 * tails[0]).argmax()) if auto else server_rank
        return u[:, :rank] * s[:rank] @ vh[:rank]

    fed = build(method, seed, **MIXED)
    names = list(fed.template.modules)
    path = [{name: np.zeros(fed.template.modules[name]) for name in names}] * 2
    for number in range(3):
        fed = replace(build(method, seed + number, **MIXED), state=fed.state)
        sums = {n: cut(fed.ideal[n]) + 0.6 * (path[-1][n] - path[-2][n]) for n in names}
        # The first round has nothing to add, and its estimate is not cut again.
        path.append({name: cut(sums[name]) if number else sums[name] for name in names})
        state, diagnostics = served(fed)
        assert_same({name: held(state, name) for name in names}, path[-1], 1e-8)
        measured = distance(path[-1], sums)
        assert diagnostics["momentum_truncation_error"] == pytest.approx(measured, rel=1e-6, abs=1e-10)
        assert diagnostics["server_rank"] == max(np.linalg.matrix_rank(x) for x in path[-1].values())
        fed = replace(fed, state=state)


@pushed
def test_momentum_does_not_see_the_gauge(options: dict[str, Any]) -> None:
    """Three rounds, R = 3, every client in an ill-conditioned gauge of its own: the same readouts."""
    method = glora(**{"server_rank": 3, "momentum": 0.8, **options})
    rng = np.random.default_rng(0)
    first = second = build(method, 0, **MIXED)
    for number in range(3):
        drawn = build(method, number, **MIXED)
        first, second = (replace(drawn, state=fed.state) for fed in (first, second))
        second = regauged(second, lambda k, rank: gauge(rng, rank, 1e6))
        first, second = (replace(fed, state=served(fed)[0]) for fed in (first, second))
        for rank in (None, 1, 3):
            assert_same(received(second, second.state, rank), received(first, first.state, rank), 1e-6)


@pytest.mark.parametrize("options", [x for x in PUSHED.values() if x.get("server_rank") != "auto"], ids=str)
def test_momentum_is_the_same_through_questions(options: dict[str, Any]) -> None:
    """A conversation over two separate sets of clients leads to the state and the figures of `finish`."""
    method = glora(**{"server_rank": 6, "momentum": 0.7, **options, "algebra": "randomized"})
    fed = second_round(method, 3)
    state, diagnostics = served(fed)
    modules, measured, _ = by_queries(fed, 2)
    assert_same(modules, {name: held(state, name) for name in modules}, 1e-7)
    assert measured == pytest.approx(diagnostics, rel=1e-6)
    plain = served(replace(fed, method=glora(**{"server_rank": 6, **options, "algebra": "randomized"})))[0]
    assert distance({name: held(plain, name) for name in modules}, modules) > 0.05


def test_without_momentum_nothing_is_added() -> None:
    """No second pair is kept; and momentum has nothing to act on in the first round, which has the same bits."""
    plain, heavy = (build(glora(momentum=beta), 0, **MIXED) for beta in (0.0, 0.9))
    first, second = served(plain)[0], served(heavy)[0]
    for name in plain.template.modules:
        assert first.modules[name].keys() == {"u", "c"}
        assert second.modules[name].keys() == {"u", "c", "u0", "c0"}
        assert all(torch.equal(second.modules[name][part], first.modules[name][part]) for part in "uc")


def test_momentum_keeps_no_direction_that_is_made_of_rounding() -> None:
    """S_1 = S_2 of rank 5, then an update of rank 1 and a thousandth of the size: what cancels leaves no direction."""
    u, s, v = low_rank(8, 20, 14, [5.0, 4.0, 3.0, 2.0, 1.0])
    fed = build(glora(server_rank=9, momentum=0.5), shapes=[(20, 14)], ranks=(5,), counts=(1,))
    for number, (scale, rank) in enumerate(((1.0, 5), (0.5, 5), (1e-3, 1))):
        kept = s * (np.arange(5) < rank) * scale
        fed = with_deltas(fed, [{"layer0": (u * kept, v.T * 5 / 16)}])
        state, diagnostics = served(fed)
        assert diagnostics["server_rank"] == rank, number
        fed = replace(fed, state=state)


def test_momentum_reaches_the_optimum_of_a_quadratic_sooner() -> None:
    """One gradient step a round on ½ tr((W − W*)ᵀ H (W − W*)) with condition 200: heavy ball against plain descent."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((10, 10)))
    curvature = turn * np.geomspace(1, 200, 10) @ turn.T
    optimum = rng.standard_normal((10, 8))
    left = {}
    for beta in (0.0, 0.75):
        fed = build(glora(start="state", server_rank=8, momentum=beta), shapes=[(10, 8)], ranks=(8,), counts=(1,))
        for _ in range(100):
            w = held(fed.state, "layer0")
            step = -curvature @ (w - optimum) / 200
            fed = with_deltas(fed, [{"layer0": (step * 8 / 16, np.eye(8))}])
            fed = replace(fed, state=served(fed)[0])
        left[beta] = np.linalg.norm(held(fed.state, "layer0") - optimum) / np.linalg.norm(optimum)
    assert left[0.0] > 0.1
    assert left[0.75] < 0.4 * left[0.0]


def test_spare_readout_directions_can_still_learn() -> None:
    """Where the state has fewer directions than the adapter, B is 0 and A is not: B has a gradient."""
    for readout in ("svd", "nested"):
        fed = build(glora(readout=readout), shapes=[(18, 12)], ranks=(2,), counts=(1,))
        for state, known in ((fed.state, 0), (served(fed)[0], 2)):
            f = fed.method.broadcast(state, Request(6)).adapter["layer0"]
            assert not f.b[:, known:].any()
            assert bool((f.a[known:].norm(dim=1) > 0.1).all())
            assert np.linalg.matrix_rank(array(f.b)) == known
            # Not where earlier rounds have looked already.
            later = fed.method.broadcast(replace(state, round_num=state.round_num + 1), Request(6)).adapter["layer0"]
            assert np.linalg.matrix_rank(np.vstack([array(f.a[known:]), array(later.a[known:])])) == 2 * (6 - known)


def test_a_silent_round_is_no_special_case() -> None:
    """A round in which every B_k = 0 leaves an empty state and an error of 0."""
    for options in ({}, {"basis": "energy"}, {"sides": "both"}, {"server_rank": "auto"}, {"update": "innovation"}):
        fed = build(glora(**options), 0, **MIXED, silent=(0, 1, 2))
        state, diagnostics = served(fed)
        assert (diagnostics["server_rank"], diagnostics["truncation_error"]) == (0.0, 0.0)
        assert all(x == {"rank": 0, "discarded": 0.0} for x in diagnostics.get("certificate", {}).values())
        assert all(not value.any() for value in received(fed, state).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_rank": 0}, "server_rank = 0: expected at least 1, 'auto' or 'double'"),
        ({"server_rank": "auto", "tolerance": 0.0}, "tolerance = 0.0: expected between 0 and 1"),
        ({"tolerance": 1.0}, "tolerance = 1.0: expected between 0 and 1"),
        ({"momentum": 1.0}, "momentum = 1.0: expected at least 0 and below 1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glora(**options)


@pytest.mark.parametrize("basis", ["projector", "energy"])
def test_a_split_start_is_the_whole_state_at_every_rank(basis: Any) -> None:
    """Readout and patch together are U·C, so that nobody learns again what it cannot hold; only the readout trains."""
    fed = build(glora(start="split", basis=basis), 5, **MIXED)
    state, _ = served(fed)
    whole = received(fed, state)
    for rank in (1, 3, 5):
        assert_same(received(fed, state, rank), whole, 1e-12)
        sent = fed.method.broadcast(state, Request(rank))
        assert {f.rank for f in sent.adapter.values()} == {rank}
        for name, patch in sent.patch.items():
            assert patch.rank + rank == state.modules[name]["u"].shape[1]


def test_a_split_round_is_the_mean_of_the_clients_whole_models() -> None:
    """Σ p_k (own adapter + the frozen rest it was sent), whatever the ranks: the average of what the clients run."""
    fed = build(glora(start="split", server_rank=24), 6, **MIXED)
    state, _ = served(fed)
    again = build(fed.method, 7, **MIXED)
    updates = tuple(replace(u, client_id=f"c{k}") for k, u in enumerate(again.updates))
    counts = np.array([u.num_examples for u in updates])
    second = replace(fed, state=state, updates=updates)
    after, _ = served(second)
    for name in fed.template.modules:
        mean = 0.0
        for p, u in zip(counts / counts.sum(), updates, strict=True):
            f = u.factors(name)
            patch = fed.method.broadcast(state, Request(f.rank)).patch.get(name)
            rest = 0.0 if patch is None else array(patch.b) @ array(patch.a)
            mean = mean + p * (f.scaling * array(f.b) @ array(f.a) + rest)
        assert_same({name: received(second, after)[name]}, {name: mean}, 1e-10)


def test_a_server_rank_may_be_twice_the_clients_largest() -> None:
    fed = build(glora(server_rank="double"), 2, **MIXED, server_rank=4)
    for kept in served(fed)[0].modules.values():
        assert kept["u"].shape[1] == 8
    same = build(glora(server_rank=8), 2, **MIXED, server_rank=4)
    assert_same(received(same, served(same)[0]), received(fed, served(fed)[0]), 1e-12)


@pytest.mark.parametrize("basis", BASES)
def test_an_automatic_rank_comes_with_a_certificate_for_every_module(basis: Any) -> None:
    """Its rank, and the share of ‖T‖_F² that is not in the state: measured densely, they are so."""
    fed = build(glora(server_rank="auto", tolerance=0.4, basis=basis), 3, **MIXED)
    state, measured = served(fed)
    assert measured["certificate"].keys() == fed.template.modules.keys()
    for name, said in measured["certificate"].items():
        ideal = fed.ideal[name]
        lost = np.linalg.norm(ideal - held(state, name)) ** 2 / np.linalg.norm(ideal) ** 2
        assert said["discarded"] == pytest.approx(lost, rel=1e-9)
        assert said["discarded"] <= 0.4**2
        assert said["rank"] == state.modules[name]["u"].shape[1]
    assert "certificate" not in served(build(glora(), 3, **MIXED))[1]


AUTO: dict[str, dict[str, Any]] = {
    "replace": {},
    "innovation": {"update": "innovation"},
    "state": {"start": "state"},
    "split": {"start": "split"},
    "both-innovation": {"update": "innovation", "sides": "both"},
    "nested-split": {"start": "split", "readout": "nested"},
    "energy-state": {"start": "state", "basis": "energy"},
}


def whole_model(fed: Federation, update: Update, name: str) -> Array:
    """Everything that the client adds to its base: what it was sent, with its own adapter in place of the one sent."""
    sent = fed.method.broadcast(fed.state, Request(update.factors(name).rank))
    patch = sent.patch.get(name)
    return fed.delta_of(update, name) + (0.0 if patch is None else array(patch.b) @ array(patch.a))


@pytest.mark.parametrize("options", AUTO.values(), ids=AUTO)
@pytest.mark.parametrize("idle", [1, 3])
def test_an_automatic_rank_keeps_what_the_state_holds(options: dict[str, Any], idle: int) -> None:
    """Three clients of rank 4 make a state of rank 12. A round in which one of them, or all, learn nothing leaves it:
    the clients' votes are no wider than an adapter, and the state is."""
    method = glora(server_rank="auto", tolerance=1e-5, **options)
    fed = build(method, 1, [(64, 48)], [4] * 3, [1] * 3, server_rank=4, dtype=torch.float32)
    state, diagnostics = served(fed)
    assert diagnostics["server_rank"] == 12
    updates = [returned(fed, state, 4, f"client{k}") for k in range(idle)]
    after = next_round(fed, state, updates)
    if method.broadcast(state, Request(4)).patch or options.get("update") == "innovation":
        assert after.modules["layer0"]["u"].shape[1] == 12
        np.testing.assert_allclose(held(after, "layer0"), held(state, "layer0"), atol=1e-4)
    else:
        assert after.modules["layer0"]["u"].shape[1] == 4  # the whole of what came back


@pytest.mark.parametrize("options", AUTO.values(), ids=AUTO)
@pytest.mark.parametrize("tolerance", [0.01, 0.3])
def test_the_certificate_holds_in_every_round(options: dict[str, Any], tolerance: float) -> None:
    """Four rounds of mixed ranks: ‖T − U·C‖ ≤ tolerance·‖T‖ densely, T being the mean of what the clients ran, and the
    share that was discarded is the one that is certified."""
    fed = build(glora(server_rank="auto", tolerance=tolerance, **options), 0, **MIXED, server_rank=7)
    for number in range(4):
        fed = replace(build(fed.method, number, **MIXED, server_rank=7), state=fed.state)
        for name in fed.template.modules:
            if options.get("update") == "innovation":
                target = held(fed.state, name) + added(fed, name)
            else:
                target = weighted_sum(fed, lambda u, n=name, f=fed: whole_model(f, u, n))
            after, diagnostics = served(fed)
            lost = np.linalg.norm(target - held(after, name)) / np.linalg.norm(target)
            said = diagnostics["certificate"][name]
            assert lost <= tolerance * (1 + 1e-9)
            assert said["discarded"] == pytest.approx(lost**2, rel=1e-6, abs=1e-20)
            assert said["rank"] == after.modules[name]["u"].shape[1]
        fed = replace(fed, state=after)


def test_with_momentum_the_certificate_is_about_the_state_that_is_kept() -> None:
    fed = build(glora(server_rank="auto", tolerance=0.2, start="split", momentum=0.7), 0, **MIXED)
    for number in range(3):
        fed = replace(build(fed.method, number, **MIXED), state=fed.state)
        state, diagnostics = served(fed)
        for name, said in diagnostics["certificate"].items():
            assert said["rank"] == state.modules[name]["u"].shape[1]
            assert 0 <= said["momentum_discarded"] <= 0.2**2
            assert (said["momentum_discarded"] > 0) == (number > 0)
        fed = replace(fed, state=state)
