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
from glora_rounds import BASES, MIXED, added, held, laws, low_rank, next_round, returned, with_deltas
from hypothesis import given
from hypothesis import strategies as st

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import flexlora, glora
from fedspan.methods.messages import Factors, Request, Template, Update
from fedspan.methods.readout import FRESH, fresh_a, leading_adapter


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
