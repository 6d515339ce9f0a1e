"""Patches on the base: the log, FLoRA and FedEx-LoRA over rounds, and clients that were away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from federations import Array, array, assert_same, build, received, served, weighted_sum
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import fedex_lora, flora
from fedspan.methods.messages import Request
from fedspan.methods.patches import Patch, PatchLog, patch_dense, patch_numel

laws = settings(deadline=None, max_examples=25, derandomize=True)


def dense(patch: Patch) -> Array:
    return array(patch.b) @ array(patch.a) if isinstance(patch, LowRank) else array(patch)


def increments(seed: int, shape: tuple[int, int], ranks: list[int]) -> list[dict[str, LowRank]]:
    rng = np.random.default_rng(seed)
    (m, n), draw = shape, lambda *s: torch.from_numpy(rng.standard_normal(s))
    return [{"x": LowRank(draw(m, r), draw(r, n)), "y": LowRank(draw(n, r), draw(r, m))} for r in ranks]


def holds(total: Mapping[str, Array], seen: int, log: PatchLog) -> dict[str, Array]:
    """What a client at version `seen` has after adding, or replacing by, what `since` gives."""
    news = log.since(seen)
    if len(news) != log.version - seen:
        (whole,) = news
        return {name: dense(patch) for name, patch in whole.items()}
    held = dict(total)
    for patch in news:
        for name, value in patch.items():
            held[name] = held.get(name, 0) + dense(value)
    return held


@laws
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(2, 30), st.integers(2, 30)),
    ranks=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    visits=st.sets(st.integers(0, 12)),
)
def test_a_client_that_was_away_reconstructs_the_same_total(
    seed: int, shape: tuple[int, int], ranks: list[int], visits: set[int]
) -> None:
    """Whichever rounds it took part in, increments or the whole patch bring it to the sum of all."""
    log, total, seen = PatchLog({}), {}, 0
    client: dict[str, Array] = {}
    for version, patch in enumerate(increments(seed, shape, ranks), start=1):
        log = log.append(patch)
        total = {name: total.get(name, 0) + dense(value) for name, value in patch.items()}
        if version in visits or version == len(ranks):
            client, seen = holds(client, seen, log), version
            assert_same(client, total, 1e-12)
            # Nothing that a client fetches is larger than the whole patch.
            assert sum(map(patch_numel, log.since(0))) <= patch_numel(log.total)
    assert log.version == len(ranks)
    assert log.since(log.version) == ()


@laws
@given(
    shape=st.tuples(st.integers(2, 30), st.integers(2, 30)),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=15),
)
def test_the_log_stays_within_twice_the_dense_patch(shape: tuple[int, int], ranks: list[int]) -> None:
    """However many rounds, and however large a single increment, the first included; small patches stay low-rank."""
    m, n = shape
    log, rank = PatchLog({}), 0
    for patch, r in zip(increments(0, shape, ranks), ranks, strict=True):
        log, rank = log.append(patch), rank + r
        assert patch_numel(log.total) <= 2 * m * n
        assert patch_numel(log.total) + sum(map(patch_numel, log.increments)) <= 2 * 2 * m * n
        for value in log.total.values():
            assert isinstance(value, LowRank) == (rank * (m + n) < m * n)
        # A client that missed one round always finds that round's increment.
        assert len(log.increments) >= 1


def test_a_patch_keeps_modules_that_a_round_left_alone() -> None:
    """An increment of one module does not drop the accumulated patch of another."""
    first, second = increments(0, (20, 20), [1, 1])
    log = PatchLog({}).append(first).append({"x": second["x"]})
    np.testing.assert_allclose(dense(log.total["y"]), dense(first["y"]))
    np.testing.assert_allclose(dense(log.total["x"]), dense(first["x"]) + dense(second["x"]))


def test_a_version_from_the_future_is_refused() -> None:
    log = PatchLog({}).append(increments(0, (20, 20), [1])[0])
    with pytest.raises(ValueError, match="holds patch version 2: expected at most 1"):
        log.since(2)


def test_a_low_rank_patch_turns_dense_without_changing() -> None:
    """The switch happens where the factors would outgrow the matrix, and the sum is the same on both sides of it."""
    log, total = PatchLog({}), np.zeros((10, 10))
    kinds = []
    for patch in increments(1, (10, 10), [2] * 5):
        log, total = log.append({"x": patch["x"]}), total + dense(patch["x"])
        kinds.append(isinstance(log.total["x"], LowRank))
        np.testing.assert_allclose(patch_dense(log.total["x"]).numpy(), total, atol=1e-12)
    assert kinds == [True, True, False, False, False]


@pytest.mark.parametrize("shape", [(30, 50), (6, 6)], ids=["low-rank", "dense"])
def test_flora_patches_sum_up_to_all_ideal_updates(shape: tuple[int, int]) -> None:
    """Each round adds its T and starts fresh: after four rounds a client's base is Σ_t T_t away from the original."""
    kwargs = {"shapes": [shape, shape[::-1]], "ranks": (1, 2, 4), "counts": (5, 1, 3)}
    fed = build(flora(), 0, **kwargs)
    total = {name: np.zeros(value) for name, value in fed.template.modules.items()}
    starts = []
    for seed in range(4):
        fed = replace(build(fed.method, seed, **kwargs), state=fed.state)
        total = {name: total[name] + fed.ideal[name] for name in total}
        fed = replace(fed, state=served(fed)[0])
        assert_same(received(fed, fed.state), total, 1e-12)
        sent = fed.method.broadcast(fed.state, Request(2, seen=seed))
        assert len(sent.news) == 1
        assert_same({n: dense(p) for n, p in sent.news[0].items()}, fed.ideal, 1e-12)
        starts.append(sent.adapter["layer0"].a)
    # A is re-initialised each round, the same for every client but never the same twice.
    assert all(not torch.equal(x, y) for x, y in pairwise(starts))


@pytest.mark.parametrize("shape", [(40, 60), (6, 6)], ids=["low-rank", "dense"])
def test_fedex_patches_sum_up_to_all_residuals(shape: tuple[int, int]) -> None:
    """After every round adapter + patch = earlier residuals + T, and the patch alone is Σ_t (T_t − s B̄_t Ā_t)."""
    kwargs = {"shapes": [shape, shape[::-1]], "ranks": (2, 2, 2), "counts": (5, 1, 3)}
    fed = build(fedex_lora(), 0, **kwargs)
    names = list(fed.template.modules)
    patch = {name: np.zeros(fed.template.modules[name]) for name in names}
    for seed in range(4):
        fed = replace(build(fed.method, seed, **kwargs), state=fed.state)
        expected = {name: patch[name] + fed.ideal[name] for name in names}
        means = {
            name: 8
            * weighted_sum(fed, lambda u, n=name: array(u.factors(n).b))
            @ weighted_sum(fed, lambda u, n=name: array(u.factors(n).a))
            for name in names
        }
        residual = {name: fed.ideal[name] - means[name] for name in names}
        patch = {name: patch[name] + residual[name] for name in names}
        state, diagnostics = served(fed)
        assert_same(received(fed, state), expected, 1e-12)
        sent = fed.method.broadcast(state, Request(2, seen=seed))
        assert_same({n: dense(p) for n, p in sent.patch.items()}, patch, 1e-12)
        size = sum(np.linalg.norm(x) ** 2 for x in residual.values()) ** 0.5
        assert diagnostics["residual_norm"] == pytest.approx(size, rel=1e-10)
        fed = replace(fed, state=state)


def test_a_fedex_residual_has_the_rank_that_theory_gives() -> None:
    """(K−1)·r directions and no more are sent, and fewer would not do."""
    fed = build(fedex_lora(), 0, shapes=[(80, 90)], ranks=(2, 2, 2, 2), counts=(5, 1, 3, 1))
    patch = served(fed)[0].patches.total["layer0"]
    assert isinstance(patch, LowRank)
    assert patch.rank == 6
    assert np.linalg.matrix_rank(dense(patch)) == 6


def test_a_single_fedex_client_leaves_no_residual() -> None:
    fed = build(fedex_lora(), 0, ranks=(2,), counts=(7,))
    state, diagnostics = served(fed)
    assert state.patches.version == 0
    assert diagnostics == {"residual_norm": 0.0}


def test_flora_starts_every_round_from_another_fresh_adapter() -> None:
    """The same for all clients of a round; were it the same in all rounds, so would be the space they can learn in."""
    fed = build(flora(), 8, ranks=(2, 3))
    states = [fed.state, served(fed)[0]]
    first, second = (fed.method.broadcast(state, Request(3)).adapter for state in states)
    other = fed.method.broadcast(states[1], Request(2, seen=1)).adapter
    for name, f in first.items():
        assert not torch.equal(f.a, second[name].a)
        assert torch.equal(other[name].a, second[name].a[:2])
        assert not second[name].b.any()
