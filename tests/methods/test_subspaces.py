"""FedGaLore, shared-projector GaLore and Fed-SB against dense oracles, and on real models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from federations import Array, Federation, array, assert_same, build, encoded, received, served, traffic
from hypothesis import given, settings
from hypothesis import strategies as st
from local_training import LOCAL, tasks
from torch import Tensor

from fedspan.client.training import Assignment, LocalResult, TrainingSettings, work_on
from fedspan.data import Encoded
from fedspan.federation.clients import Client
from fedspan.federation.rounds import RunState
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.fed_sb import fed_sb
from fedspan.methods.fedgalore import fedgalore
from fedspan.methods.folds import Partial
from fedspan.methods.full_weights import fedavg, fedftg
from fedspan.methods.messages import Broadcast, GaloreOptions, Request, Subspace, Template, Update, Vector
from fedspan.methods.patches import patch_dense
from fedspan.methods.server_optimizers import with_server_optimizer
from fedspan.methods.shared_galore import shared_galore

__all__ = ["tasks"]  # the fixture
laws = settings(deadline=None, max_examples=15, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
SHAPES = [(10, 14), (14, 10), (9, 9)]
SHARED = {basis: shared_galore(rank=3, basis=basis, svd="exact") for basis in ("projector", "energy", "seeded")}


def spaces_of(fed: Federation) -> dict[str, Subspace]:
    """What the clients of this round are confined to."""
    return dict(fed.method.broadcast(fed.state, Request(None)).subspaces)


def estimated(
    method: Method, grads: Sequence[Tensor], counts: Sequence[float], rank: int = 3, seed: int = 0
) -> tuple[ServerState, list[Update]]:
    """The state after the exchanges on these gradients of one module, and what the clients last answered."""
    shape = (grads[0].shape[0], grads[0].shape[1])
    dense = {"x": torch.zeros(shape, dtype=torch.float64)} if method.info.trains != "adapter" else {}
    state = method.init(Template({"x": shape}, rank, seed=seed), dense)
    sent: list[Update] = []
    for number, exchange in enumerate(method.exchanges):
        state = replace(state, exchange=number)
        if exchange.ask == "train":
            break
        raw = [
            Update(f"c{k}", n, {"x": Vector({"gradient": g})}, {})
            for k, (g, n) in enumerate(zip(grads, counts, strict=True))
        ]
        sent = [method.encode(u, method.broadcast(state, Request(None)), None)[0] for u in raw]
        state, _ = aggregate(method, state, sent)
    return state, sent


def gradients(seed: int, shape: tuple[int, int], num: int, decay: float = 2.0) -> list[Tensor]:
    """Gaussian directions with a decaying spectrum, in part common to all clients."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(shape)
    found = []
    for _ in range(num):
        u, s, vh = np.linalg.svd(common + 0.5 * rng.standard_normal(shape), full_matrices=False)
        found.append(torch.from_numpy(u * (s * decay ** -np.arange(len(s))) @ vh))
    return found


def eigenvectors(total: Array, rank: int) -> Array:
    return np.linalg.eigh(total)[1][:, ::-1][:, :rank]


def psd_sum(grads: Sequence[Tensor], counts: Sequence[float], kind: str, rank: int) -> Array:
    """Σ p_k Q_k Q_kᵀ or Σ p_k G_k G_kᵀ, on the narrower side."""
    total = 0.0
    for grad, count in zip(grads, counts, strict=True):
        g = array(grad) if grad.shape[0] <= grad.shape[1] else array(grad).T
        q = np.linalg.svd(g)[0][:, :rank]
        total = total + count / sum(counts) * (q @ q.T if kind == "projector" else g @ g.T)
    return total


@pytest.mark.parametrize("kind", ["projector", "energy"])
@pytest.mark.parametrize("shape", [(30, 44), (44, 30)], ids=str)
def test_the_shared_basis_is_the_consensus_of_the_gradients(kind: Any, shape: tuple[int, int]) -> None:
    """P spans the top eigenvectors of Σ p_k P_k (or of Σ p_k G_k G_kᵀ), counts and all; every repeat comes nearer."""
    grads, counts = gradients(1, shape, 5), (1, 5, 2, 9, 3)
    top = eigenvectors(psd_sum(grads, counts, kind, 4), 4)
    errors = []
    for repeats in (0, 1, 6):
        method = shared_galore(rank=4, basis=kind, repeats=repeats, svd="exact")
        state, _ = estimated(method, grads, counts)
        p = array(state.modules["x"]["basis"])
        np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-12)
        errors.append(np.linalg.norm(p @ p.T - top @ top.T))
        assert method.broadcast(state, Request(None)).subspaces["x"].side == (
            "left" if shape[0] < shape[1] else "right"
        )
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[1] < 0.2
    assert errors[2] < 1e-3
    unweighted = eigenvectors(psd_sum(grads, (1,) * 5, kind, 4), 4)
    assert np.linalg.norm(p @ p.T - unweighted @ unweighted.T) > 10 * errors[2]


@pytest.mark.parametrize("kind", ["projector", "energy"])
def test_a_consensus_that_the_probe_spans_is_found_at_once(kind: Any) -> None:
    """Where the clients' directions are no more than r + 8, the sketch of the sum holds all of it, without a repeat."""
    rng = np.random.default_rng(0)
    grads = [torch.from_numpy(rng.standard_normal((30, 2)) @ rng.standard_normal((2, 50))) for _ in range(3)]
    state, _ = estimated(shared_galore(rank=2, basis=kind, repeats=0, svd="exact"), grads, (3, 2, 1))
    p, top = array(state.modules["x"]["basis"]), eigenvectors(psd_sum(grads, (3, 2, 1), kind, 2), 2)
    np.testing.assert_allclose(p @ p.T, top @ top.T, atol=1e-9)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("kind", ["projector", "energy"])
def test_spare_directions_are_random_and_those_that_are_named_are_kept(kind: Any, svd: Any) -> None:
    """Clients without a gradient name nothing; P is r wide and orthonormal all the same, so that it can learn."""
    one = torch.zeros(12, 20, dtype=torch.float64)
    one[4, 7] = 3.0
    for grads in ([one, torch.zeros_like(one)], [torch.zeros_like(one)] * 2):
        state, _ = estimated(shared_galore(rank=3, basis=kind, svd=svd), grads, (1, 30))
        p = array(state.modules["x"]["basis"])
        np.testing.assert_allclose(p.T @ p, np.eye(3), atol=1e-9)
        assert bool(grads[0].any()) == (np.linalg.norm(p[4]) > 1 - 1e-9)


@pytest.mark.parametrize("kind", list(SHARED))
@laws
@given(seed=seeds, scale=st.sampled_from([1.0, 0.25]), repeats=st.integers(0, 2))
def test_what_is_shared_is_exact(kind: Any, seed: int, scale: float, repeats: int) -> None:
    """W + Σ p_k (W_k − W), from coordinates alone and whatever the scale; a step outside P does not travel."""
    method = shared_galore(rank=3, basis=kind, scale=scale, repeats=repeats)
    fed = build(method, seed, SHAPES, ranks=(1, 1, 1), counts=(5, 1, 3))
    assert_same(received(fed, served(fed)[0]), fed.ideal, 1e-12)
    outside = []
    for update in fed.updates:
        noise = {n: torch.from_numpy(np.random.default_rng(seed).standard_normal(s)) for n, s in layers(fed).items()}
        outside.append(replace(update, dense={n: x + noise.get(n, 0.0) for n, x in update.dense.items()}))
    projected = {}
    for i, (name, space) in enumerate(spaces_of(fed).items()):
        p = array(space.basis) / scale
        assert space.side == ("left", "right", "left")[i]
        step = fed.ideal[name] + array(noise[name])
        projected[name] = p @ (p.T @ step) if space.side == "left" else step @ p @ p.T
    assert_same(received(fed, served(fed, outside)[0]), projected, 1e-12)


def layers(fed: Federation) -> dict[str, tuple[int, int]]:
    return dict(fed.template.modules)


@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("kind", list(SHARED))
def test_the_rank_of_what_was_learnt_grows_with_every_subspace(kind: Any, refresh: int) -> None:
    """After t rounds rank(W_t − W_0) = r·⌈t/refresh⌉: what no LoRA adapter of rank r can hold."""
    fed = build(shared_galore(rank=2, basis=kind, refresh=refresh), 3, [(12, 15)], ranks=(1, 1), counts=(1, 2))
    base, ranks = array(fed.state.dense["layer0"]), []
    for number in range(5):
        state = served(fed)[0]
        ranks.append(np.linalg.matrix_rank(array(state.dense["layer0"]) - base, tol=1e-8))
        again = spaces_of(replace(fed, state=state)) if (number + 1) % refresh else None
        if again is not None:
            assert torch.equal(again["layer0"].basis, spaces_of(fed)["layer0"].basis)
        fed = build(fed.method, 10 + number, [(12, 15)], ranks=(1, 1), counts=(1, 2), start=state)
    assert ranks == [min(12, 2 * (t // refresh + 1)) for t in range(5)]


def test_seeded_directions_are_asked_of_nobody_and_differ_by_block_module_and_seed() -> None:
    method = shared_galore(rank=2, basis="seeded", refresh=2)
    assert [exchange.ask for exchange in method.exchanges] == ["train"]
    found = {}
    for seed in (0, 1):
        fed = build(method, seed, [(9, 9), (9, 9)], ranks=(1,), counts=(1,))
        for number in range(4):
            state = replace(fed.state, round_num=number)
            sent = method.broadcast(state, Request(None))
            assert "subspaces" in sent.seeded
            for name, space in sent.subspaces.items():
                found[seed, name, number] = space.basis
    for (seed, name, number), basis in found.items():
        for other, value in found.items():
            same = other[:2] == (seed, name) and other[2] // 2 == number // 2
            assert torch.equal(basis, value) == same


@pytest.mark.parametrize("optimizer", [None, "fedavgm"])
@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("kind", list(SHARED))
def test_the_news_are_all_that_a_client_needs(kind: Any, refresh: int, optimizer: Any) -> None:
    """The weights of whoever was away for any number of rounds, plus what it is sent, are the server's."""
    method = shared_galore(rank=2, basis=kind, refresh=refresh)
    if optimizer:
        method = with_server_optimizer(method, optimizer, 1.0, 0.5)
    shapes, options = [(20, 30), (30, 20)], {"ranks": (1, 1), "counts": (1, 2)}
    fed = build(method, 3, shapes, **options)
    base = fed.state.dense
    held, spaces = [(base, 0)], []
    for number in range(6):
        spaces.append(spaces_of(fed))
        version = fed.state.patches.version
        state = served(fed)[0]
        # Who took part has seen the version that it was sent.
        held.append((fed.state.dense, version))
        for old, seen in held:
            sent = method.broadcast(state, Request(None, seen))
            whole = len(sent.news) != state.patches.version - seen  # all there is to add to the base
            weights = base if whole else old
            # Which subspaces it can expand coordinates in: all that can be drawn, or that of its last round.
            known = spaces if kind == "seeded" else {seen - 1: spaces[seen - 1]} if seen else {}
            for name in fed.template.modules:
                pieces = [expanded(p[name], name, known, seen + i - 1) for i, p in enumerate(sent.news)]
                torch.testing.assert_close(weights[name] + sum(pieces), state.dense[name], rtol=0, atol=1e-11)
        fed = build(method, 10 + number, shapes, **options, start=state, seen=version)


def test_a_subspace_counts_as_held_from_the_round_that_it_was_made_in() -> None:
    """One that was made while a client was away has yet to travel to it, if it answered in the round just before."""
    method, state = shared_galore(rank=2, refresh=2), None
    for number in range(3):
        fed = build(method, number, [(20, 30)], ranks=(1, 1), counts=(1, 2), start=state, seen=number)
        state = served(fed)[0]
    assert state is not None
    assert state.round_num == 3
    # The subspace of rounds 2 and 3, from 0, was made in round 2, in which clients see version 3.
    held = {seen: "subspaces" in method.broadcast(state, Request(None, seen)).seeded for seen in range(4)}
    assert held == {0: False, 1: False, 2: False, 3: True}


def expanded(patch: Any, name: str, known: Any, round_num: int) -> Tensor:
    """What a client makes of it: coordinates are of their round's subspace, which it must know."""
    if isinstance(patch, Tensor) and patch.shape in ((2, 30), (30, 2)):
        return known[round_num][name].expand(patch)
    return patch_dense(patch)


def test_coordinates_alone_go_up_and_the_news_down() -> None:
    """Up r·n beside the sketches, down r·n, the repeat's probe and P, against m·n each way for averaged weights."""
    for m, n in ((24, 40), (40, 24), (30, 30)):
        short, long, options = min(m, n), max(m, n), {"shapes": [(m, n)], "ranks": (1, 1), "counts": (1, 2)}
        for repeats in (0, 2):
            up, down = traffic(shared_galore(rank=3, repeats=repeats), 1, **options)
            assert up == 3 * long + (1 + repeats) * 11 * short
            assert down == 3 * long + repeats * 11 * short + 3 * short
        assert traffic(shared_galore(rank=3, basis="seeded"), 1, **options) == (3 * long, 3 * long)
        # The second round of a subspace asks nothing and sends no basis.
        assert traffic(shared_galore(rank=3, refresh=2), 1, **options) == (3 * long, 3 * long)
        assert traffic(fedavg(), 1, **options) == traffic(fedftg(), 1, **options) == (m * n, m * n)
        extra = 3 * (long if m <= n else m)
        assert traffic(fedgalore(galore_rank=3), 1, **options) == (m * n + extra, m * n + extra)


@pytest.mark.parametrize("method", [*SHARED.values(), fed_sb()], ids=[*SHARED, "fed_sb"])
@laws
@given(seed=seeds)
def test_masked_sums_give_what_the_answers_give(method: Method, seed: int) -> None:
    """Every exchange through nothing but Σ n_k x_k under masks that cancel, as secure aggregation hands it over."""
    fed = build(method, seed, SHAPES, ranks=(2, 2, 2), counts=(5, 1, 3))
    sent = encoded(fed)
    total = Partial()
    for k, update in enumerate(sent):
        single = method.exchanges[fed.state.exchange].fold.add(Partial(), update)
        sums = {n: {part: x + mask(seed, k, x) for part, x in t.items()} for n, t in single.sums.items()}
        assert all(not torch.equal(sums[n][p], x) for n, t in single.sums.items() for p, x in t.items())
        masked = replace(single, sums=sums, dense={n: x + mask(seed, k, x) for n, x in single.dense.items()})
        total = method.exchanges[-1].fold.merge(total, masked)
    assert total.collected == ()
    assert_same(received(fed, method.finish(fed.state, total)[0]), received(fed, served(fed)[0]), 1e-9)


def mask(seed: int, k: int, x: Tensor) -> Tensor:
    """Of three clients; the masks of one shape sum to zero."""
    rng = np.random.default_rng([seed, *x.shape])
    shares = torch.from_numpy(rng.standard_normal((2, *x.shape)) * 100)
    return shares[k] if k < 2 else -shares.sum(dim=0)


@pytest.mark.parametrize("method", [*SHARED.values(), fed_sb()], ids=[*SHARED, "fed_sb"])
def test_splitting_or_renaming_clients_does_not_change_the_estimate(method: Method) -> None:
    """The sketches are weighted by counts: two halves of a client name what it names, in any order."""
    grads = gradients(4, (20, 24), 3)
    bases = []
    for order, counts in (((0, 1, 2), (6, 1, 2)), ((2, 1, 0, 0), (2, 1, 3, 3)), ((1, 0, 2), (100, 600, 200))):
        state, _ = estimated(method, [grads[i] for i in order], counts)
        bases.append([space_projector(t) for t in method.broadcast(state, Request(None)).subspaces.values()])
    for other in bases[1:]:
        np.testing.assert_allclose(other, bases[0], atol=1e-9)


def space_projector(space: Subspace) -> Array:
    p = array(space.basis)
    return p @ p.T


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (7, 7)], ids=str)
def test_fed_sb_stands_on_the_singular_vectors_of_the_mean_gradient(shape: tuple[int, int]) -> None:
    """B and V are the leading singular vectors of Σ p_k G_k, found from two sums; R starts at zero, or from a step."""
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1])) for _ in range(3)]
    grads, counts = [torch.from_numpy(x) for x in parts], (1, 6, 3)
    mean = sum(n / 10 * x for n, x in zip(counts, parts, strict=True))
    u, s, vh = np.linalg.svd(mean)
    for step in (0.0, 0.1):
        method = fed_sb(first_step=step)
        state, _ = estimated(method, grads, counts, rank=4)
        sent = method.broadcast(state, Request(4))
        f, v = sent.adapter["x"], array(sent.subspaces["x/a"].basis)
        b = array(f.b)
        np.testing.assert_allclose(b @ b.T, u[:, :4] @ u[:, :4].T, atol=1e-9)
        np.testing.assert_allclose(v @ v.T, vh[:4].T @ vh[:4], atol=1e-9)
        best = u[:, :4] * s[:4] @ vh[:4]
        np.testing.assert_allclose(f.scaling * b @ array(f.a), -step * best, atol=1e-9)
        assert (sent.recipe.train_a, sent.recipe.train_b, sent.recipe.confined) == (True, False, True)


def rounds_of(method: Method, num: int, **options: Any) -> list[Federation]:
    """Consecutive rounds of clients that take part in all of them."""
    feds, seen = [build(method, 0, **options)], 0
    for number in range(1, num):
        last = feds[-1]
        seen = last.state.patches.version if last.state.patches else 0
        feds.append(build(method, number, **options, start=served(last)[0], seen=seen))
    return feds


def test_fed_sb_moves_between_its_two_bases_for_ever() -> None:
    """Three rounds: each is exact, the bases stay, and ΔW never leaves their spaces, as LoRA's never leave A₀'s."""
    options: dict[str, Any] = {"shapes": [(14, 20)], "ranks": (3, 3), "counts": (1, 4)}
    feds = rounds_of(fed_sb(), 3, **options)
    first = feds[0].method.broadcast(feds[0].state, Request(3))
    b, v = array(first.adapter["layer0"].b), array(first.subspaces["layer0/a"].basis)
    for fed in feds:
        state = served(fed)[0]
        delta = received(fed, state)
        assert_same(delta, fed.ideal, 1e-12)
        inside = b @ b.T @ delta["layer0"] @ v @ v.T
        np.testing.assert_allclose(delta["layer0"], inside, atol=1e-12)
        again = fed.method.broadcast(state, Request(3))
        assert torch.equal(again.adapter["layer0"].b, first.adapter["layer0"].b)
        assert torch.equal(again.subspaces["layer0/a"].basis, first.subspaces["layer0/a"].basis)


def test_fed_sb_sends_the_core_alone_and_its_bases_once() -> None:
    """r² up and down in every later round; a client's first training costs it B and V as well."""
    options: dict[str, Any] = {"shapes": [(24, 40)], "ranks": (3, 3), "counts": (1, 2)}
    assert traffic(fed_sb(), 3, **options) == (9, 9)
    fed = rounds_of(fed_sb(), 2, **options)[1]
    new, known = (fed.method.broadcast(fed.state, Request(3, seen)) for seen in (0, 1))
    assert known.seeded == {"a", "b", "subspaces"}
    assert new.seeded == {"a"}
    for sent in (new, known):
        (core,) = sent.news
        # A is derived: the news and the bases hold the whole adapter.
        a = core["layer0"] @ sent.subspaces["layer0/a"].basis.mT / sent.adapter["layer0"].scaling
        torch.testing.assert_close(a, sent.adapter["layer0"].a)
    for sent, answer in build(fed_sb(), 0, **options).before:
        (payload,) = answer.modules.values()
        assert payload.values["sketch"].shape in ((24, 11), (11, 40))
        assert not answer.dense
        assert not sent.news


def test_fed_sb_clears_its_list_of_updates_between_rounds() -> None:
    """A public Fed-SB fork goes on averaging last round's cores: the second round's core is that round's mean alone."""
    options: dict[str, Any] = {"shapes": [(9, 12)], "ranks": (2, 2), "counts": (3, 1)}
    first, second = rounds_of(fed_sb(), 2, **options)
    core = array(served(second)[0].modules["layer0"]["core"])
    cores = [array(u.modules["layer0"].values["core"]) for u in encoded(second)]
    np.testing.assert_allclose(core, 0.75 * cores[0] + 0.25 * cores[1], atol=1e-12)
    assert np.linalg.norm(core - array(served(first)[0].modules["layer0"]["core"])) > 0.1


@pytest.mark.parametrize("method", [fed_sb(), SHARED["projector"], fedftg(), fedgalore(3)], ids=lambda m: m.info.name)
def test_a_server_optimizer_acts_on_what_the_method_averages(method: Method) -> None:
    """FedAvgM at η = 1, β = 0 is the method itself; with β the second step holds β times the first."""
    options: dict[str, Any] = {"shapes": [(8, 11)], "ranks": (2, 2), "counts": (3, 1)}
    still, heavy = (with_server_optimizer(method, "fedavgm", 1.0, beta) for beta in (0.0, 0.5))
    fed = build(method, 0, **options)
    plain = served(fed)[0]
    for other in (still, heavy):
        one = served(replace(fed, method=other))[0]
        for name, value in method.vector.read(plain).items():
            assert torch.equal(method.vector.read(one)[name], value)
    second = build(heavy, 1, **options, start=one)
    names = method.vector.read(plain)
    before, after = method.vector.read(second.state), method.vector.read(served(second)[0])
    alone = method.vector.read(served(replace(second, method=method))[0])
    start = method.vector.read(fed.state)
    for name in names:
        momentum = 0.5 * (before[name] - start[name])
        torch.testing.assert_close(after[name], alone[name] + momentum)
        assert float(momentum.norm()) > 0


def ajive(moments: Sequence[Array], shares: Sequence[float], threshold: float, floor: float) -> Array | None:
    """Through the n×n sum of the row spaces' projectors, instead of stacked bases."""
    total = 0.0
    for v, p in zip(moments, shares, strict=True):
        total = total + p * np.linalg.pinv(v) @ v
    values, vectors = np.linalg.eigh(total)
    joint = vectors[:, (values >= threshold - 1e-9) & (values > 1e-9)]
    mean = sum(p * v for p, v in zip(shares, moments, strict=True))
    return np.maximum(mean @ joint @ joint.T, floor * mean) if joint.shape[1] else None


@laws
@given(seed=seeds, threshold=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]), floor=st.sampled_from([0.0, 0.1, 1.0]))
def test_fedgalore_shares_the_part_of_the_second_moments_that_clients_have_in_common(
    seed: int, threshold: float, floor: float
) -> None:
    method = fedgalore(galore_rank=2, threshold=threshold, floor=floor)
    fed = build(method, seed, SHAPES, ranks=(1, 1, 1), counts=(5, 1, 2))
    rng = np.random.default_rng(seed)
    # A row that all have, and one of each client's own.
    common = {n: rng.uniform(0.5, 1, (1, max(s))) for n, s in layers(fed).items()}
    updates = []
    for update in fed.updates:
        own = {n: np.concatenate([c, rng.uniform(0, 1, c.shape)]) for n, c in common.items()}
        updates.append(replace(update, moments={n: torch.from_numpy(x) for n, x in own.items()}))
    fed = replace(fed, updates=tuple(updates))
    state, diagnostics = served(fed)
    assert_same(received(fed, state), fed.ideal, 1e-12)
    sent = method.broadcast(state, Request(None)).moments
    for name in layers(fed):
        expected = ajive([array(u.moments[name]) for u in updates], (5 / 8, 1 / 8, 2 / 8), threshold, floor)
        assert expected is not None
        np.testing.assert_allclose(array(sent[name]), expected, atol=1e-8)
        assert bool((sent[name] >= 0).all())
    if threshold == 1.0:
        assert diagnostics["joint_directions"] == 1.0


def test_fedgalore_leaves_the_moments_of_clients_without_anything_in_common_to_themselves() -> None:
    """No direction passes: Adam starts from zero, as in FedFTG. Where all agree, everything is kept."""
    fed = build(fedgalore(galore_rank=1), 0, [(4, 6)], ranks=(1, 1, 1), counts=(1, 1, 1))
    assert not fed.method.broadcast(fed.state, Request(None)).moments
    apart = [replace(u, moments={"layer0": torch.eye(6)[[k]]}) for k, u in enumerate(fed.updates)]
    assert not fed.method.broadcast(served(fed, apart)[0], Request(None)).moments
    one = fed.updates[0].moments
    same = [replace(u, moments=one) for u in fed.updates]
    torch.testing.assert_close(
        fed.method.broadcast(served(fed, same)[0], Request(None)).moments["layer0"], one["layer0"]
    )
    # One that sends none does not end the round: those of the others count alone.
    some = served(fed, [same[0], replace(same[1], moments={}), same[2]])[0]
    torch.testing.assert_close(fed.method.broadcast(some, Request(None)).moments["layer0"], one["layer0"])
    unused = [replace(u, moments={}) for u in fed.updates]
    assert not fed.method.broadcast(served(fed, unused)[0], Request(None)).moments


def test_fedftg_keeps_its_moments_on_the_site() -> None:
    """They stay on the client, and are as large as the rank times the layer."""
    fed = build(fedftg(), 0, [(10, 12)], ranks=(1,), counts=(1,))
    assert fed.updates[0].moments
    assert not encoded(fed)[0].moments
    assert encoded(build(fedgalore(2), 0, [(10, 12)], ranks=(1,), counts=(1,)))[0].moments["layer0"].shape == (2, 12)


def test_options_of_galore_reach_the_recipe() -> None:
    wanted = GaloreOptions(4, 7, 0.5, "power", "right", "project")
    state = ServerState(Template({}, 8), {}, {})
    for method in (fedftg, fedgalore):
        made = method(galore_rank=4, update_gap=7, scale=0.5, svd="power", side="right", on_refresh="project")
        assert made.broadcast(state, Request(None)).recipe.galore == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shared_galore(rank=0), "method.rank = 0: expected at least 1"),
        (lambda: shared_galore(refresh=0), "method.refresh = 0: expected at least 1"),
        (lambda: shared_galore(repeats=-1), "method.repeats = -1: expected at least 0"),
        (lambda: shared_galore(probe_batches=0), "method.probe_batches = 0: expected at least 1"),
        (lambda: shared_galore(scale=0.0), "method.scale = 0.0: expected more than 0"),
        (lambda: fed_sb(first_step=-1.0), "method.first_step = -1.0: expected at least 0"),
        (lambda: fed_sb(probe_batches=0), "method.probe_batches = 0: expected at least 1"),
        (lambda: fedgalore(threshold=1.5), "method.threshold = 1.5: expected from 0 to 1"),
        (lambda: fedgalore(floor=-0.1), "method.floor = -0.1: expected from 0 to 1"),
        (lambda: fedgalore(galore_rank=0), "method.galore_rank = 0: expected at least 1"),
        (lambda: fedftg(update_gap=0), "method.update_gap = 0: expected at least 1"),
        (lambda: fedftg(scale=0.0), "method.scale = 0.0: expected more than 0"),
    ],
)
def test_options_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def run(method: Method, bases: dict[str, Path], data: Encoded, rounds: int, base: str = "llama", rank: int = 4) -> Any:
    """Rounds of two clients with halves of the data, on a real model: the standings and the records."""
    model = tiny.load(bases[base], tiny.KIND[base], trains=method.info.trains)
    cohort, half = tiny.clients(rank, rank, sizes=(12, 12)), len(data) // 2
    rows = {c.client_id: np.arange(half) + half * k for k, c in enumerate(cohort)}

    def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
        given = Assignment(client.client_id, sent, rows[client.client_id], 3, 1.0)
        return work_on(model, given, data, TrainingSettings(local=LOCAL), round_num)

    standings = [RunState(method.init(model.template(rank, 8.0, False, 0), model.dense()))]
    records = []
    for _ in range(rounds):
        run_state, record = tiny.run_round(method, standings[-1], cohort, work)
        standings.append(run_state)
        records.append(record)
    return model, standings, records


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", list(SHARED))
def test_a_real_model_learns_in_shared_subspaces(bases: dict[str, Path], tasks: Encoded, kind: Any, base: str) -> None:
    """Each round moves every target by its r directions more, and costs the coordinates' bytes; the loss falls."""
    _, standings, records = run(shared_galore(rank=2, basis=kind, scale=2.0), bases, tasks, 5, base)
    dense, shapes = [run_state.state.dense for run_state in standings], standings[0].state.template.modules
    free = sum(t.numel() for n, t in dense[0].items() if n not in shapes)
    asked = sum(2 * min(10, *s) * min(s) for s in shapes.values()) if kind != "seeded" else 0
    held = sum(2 * max(s) for s in shapes.values())
    basis = sum(2 * min(s) for s in shapes.values()) if kind != "seeded" else 0
    for t in range(5):
        for name in shapes:
            step = (dense[t + 1][name] - dense[t][name]).double()
            assert int(torch.linalg.matrix_rank(step, rtol=1e-3)) == 2
        assert not records[t]["rejected"]
        assert records[t]["bytes_up"] == 2 * 4 * (held + asked + free)
        assert records[t]["optimizer_bytes"] == 2 * 4 * (held + free)
        # The first probe is drawn; the second travels.
        assert records[t]["bytes_down"] == 2 * 4 * (bool(t) * held + asked // 2 + basis + free)
    name = next(iter(shapes))
    assert int(torch.linalg.matrix_rank((dense[5][name] - dense[0][name]).double(), rtol=1e-4)) > 6
    assert records[-1]["train_loss"] < records[0]["train_loss"]


def test_a_real_model_learns_in_the_core_alone(bases: dict[str, Path], tasks: Encoded) -> None:
    """The adapter's product stays between the bases, and a later round costs r² numbers a module each way."""
    method = fed_sb()
    _, standings, records = run(method, bases, tasks, 5)
    shapes = standings[0].state.template.modules
    sent = [method.broadcast(run_state.state, Request(4, 1)) for run_state in standings[1:]]
    for name in shapes:
        assert all(torch.equal(s.adapter[name].b, sent[0].adapter[name].b) for s in sent)
        assert float(sent[-1].adapter[name].a.norm()) > 0
    assert [r["bytes_up"] for r in records[1:]] == [2 * 4 * 16 * len(shapes)] * 4
    assert [r["bytes_down"] for r in records[1:]] == [2 * 4 * 16 * len(shapes)] * 4
    width = {name: min(12, *s) for name, s in shapes.items()}
    sketches = sum(width[name] * (m + n) for name, (m, n) in shapes.items())
    assert records[0]["bytes_up"] == 2 * 4 * (sketches + 16 * len(shapes))
    ranges = sum(width[name] * m for name, (m, _) in shapes.items())
    assert records[0]["bytes_down"] == 2 * 4 * (ranges + sum(4 * (m + n) for m, n in shapes.values()))
    assert records[-1]["train_loss"] < records[0]["train_loss"]


def test_a_real_client_starts_from_the_shared_second_moments(bases: dict[str, Path], tasks: Encoded) -> None:
    """FedGaLore's second round starts from moments, trains otherwise than FedFTG's, and sends r·max(m, n) more."""
    options: dict[str, Any] = {"galore_rank": 3, "svd": "power", "on_refresh": "project", "update_gap": 2}
    runs = [run(method(**options), bases, tasks, 3) for method in (fedftg, fedgalore)]
    (_, plain, cheap), (_, shared, dear) = runs
    shapes = shared[0].state.template.modules
    extra = 2 * 4 * sum(3 * max(s) for s in shapes.values())
    assert [d["bytes_up"] - c["bytes_up"] for c, d in zip(cheap, dear, strict=True)] == [extra] * 3
    assert [d["bytes_down"] - c["bytes_down"] for c, d in zip(cheap, dear, strict=True)] == [0, extra, extra]
    tiny.same(dict(plain[1].state.dense), dict(shared[1].state.dense))
    moments = fedgalore(**options).broadcast(shared[1].state, Request(None)).moments
    assert moments.keys() == shapes.keys()
    assert all(bool((v >= 0).all()) and bool(v.any()) for v in moments.values())
    name = next(iter(shapes))
    assert not torch.equal(plain[2].state.dense[name], shared[2].state.dense[name])
    assert dear[-1]["train_loss"] < dear[0]["train_loss"]
