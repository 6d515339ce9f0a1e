"""FedMomentum, FedASK, Fed-PLoRA, FLoRIST and LoRA-A² against dense float64 oracles of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import (
    Array,
    Dense,
    Federation,
    array,
    assert_same,
    build,
    distance,
    encoded,
    gauge,
    received,
    regauged,
    served,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_glora_sums import crowd, lost

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import fed_plora, fedask, fedit, fedmomentum, flexlora, florist, glora_sums
from fedspan.methods.base import ServerState, aggregate
from fedspan.methods.fed_plora import module_order
from fedspan.methods.messages import Broadcast, Request

laws = settings(deadline=None, max_examples=15, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
SAME: dict[str, Any] = {"shapes": ((20, 16), (24, 30)), "ranks": (3, 3, 3), "counts": (5, 1, 30)}
MIXED: dict[str, Any] = {"shapes": ((20, 20), (24, 14)), "ranks": (2, 4, 7, 4), "counts": (5, 2, 9, 1)}


def truncated(x: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def products(sent: Broadcast) -> Dense:
    """What the adapters of a broadcast add, without its patch."""
    return {name: f.scaling * array(f.b) @ array(f.a) for name, f in sent.adapter.items()}


def patched(sent: Broadcast, name: str) -> Array:
    patch = sent.patch[name]
    return array(patch.b) @ array(patch.a) if isinstance(patch, LowRank) else array(patch)


@laws
@given(seed=seeds, balance=st.sampled_from(["init", "even", "root"]))
def test_fedmomentum_trains_on_what_is_largest_and_keeps_the_rest(seed: int, balance: Any) -> None:
    """Adapter = T_r, patch = T − T_r, by a dense SVD; and the diagnostics say how much the patch holds."""
    fed = build(fedmomentum(balance), seed, **SAME)
    state, diagnostics = served(fed)
    sent = fed.method.broadcast(state, Request(3))
    leading = {name: truncated(t, 3) for name, t in fed.ideal.items()}
    assert_same(products(sent), leading, 1e-11)
    for name, t in fed.ideal.items():
        rest = t - leading[name]
        np.testing.assert_allclose(patched(sent, name), rest, atol=1e-11 * np.linalg.norm(t))
    assert diagnostics["residual_share"] == pytest.approx(distance(leading, fed.ideal), rel=1e-10)


def test_fedmomentum_bases_add_up_over_the_rounds_and_flexlora_forgets() -> None:
    """After two rounds a client's model is T_2 + (T_1 − T_1,r): nothing is lost, which FlexLoRA's truncation loses."""
    first = build(fedmomentum(), 0, **SAME)
    state = served(first)[0]
    second = replace(build(fedmomentum(), 1, **SAME), state=state)
    expected = {name: second.ideal[name] + t - truncated(t, 3) for name, t in first.ideal.items()}
    after = served(second)[0]
    assert_same(received(second, after), expected, 1e-11)
    # A client that holds the first patch fetches the second alone.
    assert len(second.method.broadcast(after, Request(3, seen=1)).news) == 1
    flex = replace(first, method=flexlora(), state=flexlora().init(replace(first.template, rank=3), first.state.dense))
    assert distance(received(flex, served(flex)[0], 3), first.ideal) > 0.1


def test_fedmomentum_shares_a_direction_evenly_between_the_factors() -> None:
    """By default b_j and a_j have one length, (σ_j/s)^½, as in the square-root split of Σ."""
    fed = build(fedmomentum(), 2, **SAME)
    for name, f in fed.method.broadcast(served(fed)[0], Request(3)).adapter.items():
        sigma = np.linalg.svd(fed.ideal[name], compute_uv=False)[:3]
        np.testing.assert_allclose(np.linalg.norm(array(f.b), axis=0), np.sqrt(sigma / f.scaling), rtol=1e-10)
        np.testing.assert_allclose(np.linalg.norm(array(f.a), axis=1), np.sqrt(sigma / f.scaling), rtol=1e-10)


def test_fedmomentum_needs_no_patch_while_the_adapter_holds_everything() -> None:
    """One client, or a quiet round: T has no direction beyond r; no version is made, and spare rows can learn."""
    fed = build(fedmomentum(), 3, shapes=((9, 8),), ranks=(3,), counts=(2,))
    state, diagnostics = served(fed)
    assert state.patches is not None
    assert (state.patches.version, diagnostics["residual_share"]) == (0, 0.0)
    quiet = build(fedmomentum(), 3, shapes=((9, 8),), ranks=(3, 3), counts=(2, 1), silent=(0, 1))
    state, diagnostics = served(quiet)
    f = quiet.method.broadcast(state, Request(3)).adapter["layer0"]
    assert (bool(f.b.any()), bool(f.a.any()), diagnostics["residual_share"]) == (False, True, 0.0)


def sketched(fed: Federation, name: str) -> Array:
    """Q Qᵀ T by dense numpy, for the Ω that the clients were sent."""
    omega = array(fed.method.broadcast(fed.state, Request(None)).subspaces[f"{name}/rows"].basis)
    q = np.linalg.qr(fed.ideal[name] @ omega)[0]
    return q @ q.T @ fed.ideal[name]


@laws
@given(seed=seeds, oversampling=st.integers(0, 4))
def test_fedask_is_the_randomized_svd_of_t(seed: int, oversampling: int) -> None:
    """17 directions through a sketch of 4 to 8 columns: the leading R of Q Qᵀ T, at every rank that clients train."""
    fed = build(fedask(oversampling), seed, **MIXED, server_rank=4)
    state, diagnostics = served(fed)
    inside = {name: sketched(fed, name) for name in fed.template.modules}
    for rank in (1, 2, 4):
        assert_same(received(fed, state, rank), {n: truncated(x, rank) for n, x in inside.items()}, 1e-10)
    kept = {name: truncated(x, 4) for name, x in inside.items()}
    assert diagnostics["sketch_truncation_error"] == pytest.approx(distance(kept, inside), rel=1e-6, abs=1e-8)
    assert distance(inside, fed.ideal) > 0.01


@pytest.mark.parametrize("oversampling", [2, 6])
def test_fedask_loses_no_more_than_the_theorem_says(oversampling: int) -> None:
    """Over 60 Ω the mean of ‖T − Q Qᵀ T‖² is below (1 + R/(p−1)) Σ_{j>R} σ_j², and above the best possible."""
    fed = build(fedask(oversampling), 0, shapes=((40, 36),), ranks=(9, 9, 9), counts=(1, 2, 3), server_rank=9)
    t = fed.ideal["layer0"]
    sigma = np.linalg.svd(t, compute_uv=False)
    losses = []
    for seed in range(60):
        drawn = replace(fed, state=replace(fed.state, template=replace(fed.template, seed=seed)))
        losses.append(np.linalg.norm(t - sketched(drawn, "layer0")) ** 2)
    assert np.mean(losses) <= (1 + 9 / (oversampling - 1)) * np.sum(sigma[9:] ** 2)
    assert np.min(losses) >= np.sum(sigma[9 + oversampling :] ** 2)


def test_fedask_sends_sums_whose_shapes_say_nothing_of_a_client() -> None:
    """Rank 2 or 7, the same shapes; Ω is new in every round and travels in none; a square one is the identity."""
    fed = build(fedask(), 0, **MIXED, server_rank=7)
    shapes = {tuple(p.tensors()["sketch"].shape for p in u.modules.values()) for u in encoded(fed)}
    assert shapes == {((20, 15), (24, 14))}
    first = fed.method.broadcast(fed.state, Request(2))
    assert {"subspaces"} == first.seeded
    assert torch.equal(first.subspaces["layer1/rows"].basis, torch.eye(14))
    after = served(fed)[0]
    second = fed.method.broadcast(after, Request(2))
    assert not torch.equal(first.subspaces["layer0/rows"].basis, second.subspaces["layer0/rows"].basis)
    assert not after.extra


def modules_of(state: ServerState, name: str) -> tuple[Array, Array]:
    return array(state.modules[name]["sb"]), array(state.modules[name]["a"])


@laws
@given(seed=seeds)
def test_fed_plora_averages_a_module_over_those_who_trained_it(seed: int) -> None:
    """Two rounds by a loop over modules and clients; what nobody trained stays as it was."""
    fed = build(fed_plora(), seed, **MIXED, server_rank=9)
    for _ in range(2):
        order = module_order(fed.state)
        after = served(fed)[0]
        for name in fed.template.modules:
            sb, a = modules_of(fed.state, name)
            for place, j in enumerate(order.tolist()):
                having = [u for u in fed.updates if u.factors(name).rank > place]
                total = sum(u.num_examples for u in having)
                if having:
                    f = [u.factors(name) for u in having]
                    w = [u.num_examples / total for u in having]
                    sb[:, j] = sum(p * 16 / x.rank * array(x.b)[:, place] for p, x in zip(w, f, strict=True))
                    a[j] = sum(p * array(x.a)[place] for p, x in zip(w, f, strict=True))
            found = modules_of(after, name)
            np.testing.assert_allclose(found[0], sb, atol=1e-12 * np.abs(sb).max())
            np.testing.assert_allclose(found[1], a, atol=1e-12 * np.abs(a).max())
        fed = replace(build(fed_plora(), seed + 1, **MIXED, server_rank=9), state=after)


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_fed_plora_gives_every_client_the_whole_model(rank: int) -> None:
    """Adapter and folded modules add up to Σ_j b_j a_jᵀ at every rank, and no folded module is trained too."""
    fed = build(fed_plora(), 0, **MIXED, server_rank=7)
    state = served(fed)[0]
    whole = {name: np.matmul(*modules_of(state, name)) for name in fed.template.modules}
    assert_same(received(fed, state, rank), whole, 1e-12)
    sent = fed.method.broadcast(state, Request(rank))
    for name in whole:
        assert sent.adapter[name].rank == rank
        assert (name in sent.patch) == (rank < 7)
        patch = sent.patch.get(name)
        assert not isinstance(patch, LowRank) or patch.rank == 7 - rank
    if rank < 7:
        assert distance(products(sent), whole) > 0.1


def test_fed_plora_lets_every_module_be_trained_by_small_clients_in_its_turn() -> None:
    """Over 60 rounds clients of rank 1 train each of five modules, 12 times on average, within 5σ."""
    state = fed_plora().init(replace(build(fed_plora(), **SAME).template, rank=5), {})
    first = [int(module_order(replace(state, round_num=r))[0]) for r in range(60)]
    counts = np.bincount(first, minlength=5)
    assert np.abs(counts - 12).max() <= 5 * np.sqrt(60 * 0.2 * 0.8)
    assert counts.min() > 0


def test_fed_plora_at_equal_ranks_is_fedit_and_dilutes_nothing_at_mixed_ones() -> None:
    """One rank: FedIT's product. Mixed: clients that send back what they were sent leave the model as it is."""
    fed = build(fed_plora(), 1, **SAME, server_rank=3)
    plain = replace(fed, method=fedit(), state=fedit().init(fed.template, fed.state.dense))
    assert_same(received(fed, served(fed)[0]), received(plain, served(plain)[0]), 1e-12)
    fed = build(fed_plora(), 1, **MIXED, server_rank=7)
    state = served(fed)[0]
    before = received(fed, state)
    back = []
    for update in fed.updates:
        sent = fed.method.broadcast(state, Request(update.factors("layer0").rank))
        back.append(fed.method.encode(replace(update, modules=sent.adapter), sent, None)[0])
    assert_same(received(fed, aggregate(fed.method, state, back)[0]), before, 1e-12)


def test_fed_plora_refuses_more_modules_than_there_are() -> None:
    fed = build(fed_plora(), 0, **SAME, server_rank=3)
    with pytest.raises(ValueError, match="a client of rank 4: expected at most 3"):
        fed.method.broadcast(fed.state, Request(4))


@laws
@given(seed=seeds, threshold=st.sampled_from([0.3, 0.8, 0.95, 0.999]))
def test_florist_keeps_the_fewest_directions_that_reach_the_threshold(seed: int, threshold: float) -> None:
    """T_p by a dense SVD with p the first rank whose energy is τ of all, module by module, at every client's rank."""
    fed = build(florist(threshold), seed, **MIXED)
    state, diagnostics = served(fed)
    expected = {}
    for name, t in fed.ideal.items():
        sigma = np.linalg.svd(t, compute_uv=False)
        p = int(np.argmax(np.cumsum(sigma**2) >= threshold * np.sum(sigma**2))) + 1
        expected[name] = truncated(t, p)
        assert np.linalg.matrix_rank(patched(fed.method.broadcast(state, Request(2)), name), tol=1e-8) == p
    for rank in (1, 7):
        assert_same(received(fed, state, rank), expected, 1e-11)
    lost = distance(expected, fed.ideal)
    assert 0 < lost <= np.sqrt(1 - threshold)
    assert diagnostics["truncation_error"] == pytest.approx(lost, rel=1e-9)
    rng = np.random.default_rng(seed)
    other = regauged(fed, lambda k, rank: gauge(rng, rank, 1e4))
    assert_same(received(other, served(other)[0]), expected, 1e-8)


def test_florist_adds_to_the_base_round_by_round_and_is_exact_at_one() -> None:
    """The second round's T_p comes on top of the first's; `exact` follows the threshold; odd ones are refused."""
    first = build(florist(0.9), 0, **MIXED)
    state = served(first)[0]
    second = replace(build(florist(0.9), 1, **MIXED), state=state)
    alone = received(second, served(replace(second, state=first.state))[0])
    before = received(first, state)
    expected = {name: x + before[name] for name, x in alone.items()}
    assert_same(received(second, served(second)[0]), expected, 1e-11)
    assert (florist().info.exact, florist(1.0).info.exact) == (False, True)
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"method\.threshold = {threshold}: expected above 0 and at most 1"):
            florist(threshold)


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_fedask_follows_the_energy_that_projectors_do_not_see(spectrum: str) -> None:
    """Ten clients of rank 8 at R = 16: less is lost than by GLoRA's one pass, a tenth where the target decays."""
    ours, projected = (lost(crowd(method, 10, spectrum, 0)) for method in (fedask(), glora_sums()))
    assert ours < (0.97 if spectrum == "flat" else 0.1) * projected
