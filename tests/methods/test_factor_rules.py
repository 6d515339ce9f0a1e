"""FedIT, HetLoRA and FFA-LoRA against dense oracles of their own, and the control `local`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import Array, Federation, array, assert_same, build, encoded, received, served, weighted_sum
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.methods import fedit, ffa_lora, hetlora, local
from fedspan.methods.messages import Factors, Request, Update

laws = settings(deadline=None, max_examples=20, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


@laws
@given(seed=seeds, alpha=st.sampled_from([1.0, 16.0]), rslora=st.booleans())
def test_fedit_is_the_product_of_the_means(seed: int, alpha: float, rslora: bool) -> None:
    """s·(Σ p_k B_k)(Σ p_k A_k), weighted by the counts of all clients."""
    fed = build(fedit(), seed, ranks=(3, 3, 3), counts=(5, 1, 30), alpha=alpha, rslora=rslora)
    s = alpha / (3**0.5 if rslora else 3)
    expected = {
        name: s
        * weighted_sum(fed, lambda u, n=name: array(u.factors(n).b))
        @ weighted_sum(fed, lambda u, n=name: array(u.factors(n).a))
        for name in fed.template.modules
    }
    assert_same(received(fed, served(fed)[0]), expected, 1e-12)


def padded(fed: Federation, update: Update, name: str) -> tuple[Array, Array]:
    """(s B, A) with zeros beyond the client's rank."""
    f, size = update.factors(name), fed.template.rank
    b, a = array(f.b) * 16 / f.rank, array(f.a)
    return np.pad(b, ((0, 0), (0, size - f.rank))), np.pad(a, ((0, size - f.rank), (0, 0)))


@laws
@given(seed=seeds)
def test_hetlora_weights_by_the_norm_of_the_whole_update(seed: int) -> None:
    """B̄ = Σ w_k pad(s_k B_k), Ā = Σ w_k pad(A_k), w_k ∝ n_k (Σ_modules ‖s_k B_k A_k‖²)^½."""
    fed = build(hetlora(), seed, ranks=(1, 2, 5), counts=(5, 1, 3))
    names = list(fed.template.modules)
    norms = [sum(np.linalg.norm(fed.delta_of(u, n)) ** 2 for n in names) ** 0.5 for u in fed.updates]
    weights = np.array([u.num_examples for u in fed.updates]) * norms
    weights = weights / weights.sum()
    state, expected = served(fed)[0], {}
    for name in names:
        pairs = [padded(fed, u, name) for u in fed.updates]
        b, a = (sum(w * pair[i] for w, pair in zip(weights, pairs, strict=True)) for i in range(2))
        expected[name] = b @ a
    assert_same(received(fed, state), expected, 1e-12)


def test_hetlora_components_that_nobody_trained_can_still_learn() -> None:
    """After a round of low-rank clients alone the others' components have B = 0 but not A = 0.

    With zeros in both factors their gradient would vanish for ever, and high ranks would be high in name only.
    """
    fed = build(hetlora(), 0, ranks=(2, 3), counts=(1, 1), server_rank=8)
    f = fed.method.broadcast(served(fed)[0], Request(8)).adapter["layer0"]
    assert not f.b[:, 3:].any()
    assert bool((f.a[3:].norm(dim=1) > 0.1).all())


def tailed(fed: Federation, tail: float) -> tuple[Update, Any]:
    """The client sends back what it was sent with the columns of B from ⌊γr⌋ on scaled by `tail`."""
    sent = fed.method.start(fed.method.broadcast(served(fed)[0], Request(8)), None)
    factors = {}
    for name, f in sent.adapter.items():
        b = f.b.clone()
        b[:, 6:] *= tail
        factors[name] = Factors(b, f.a, f.scaling)
    return replace(fed.updates[0], modules=factors), sent


@pytest.mark.parametrize(("tail", "rank"), [(0.99, 6), (1.0, 8), (1.01, 8)])
def test_hetlora_prunes_exactly_when_training_shrank_the_tail(tail: float, rank: int) -> None:
    """‖B[:, γr:]‖‖A[γr:, :]‖ against its value before training; a pruned client stays pruned."""
    fed = build(hetlora(gamma=0.75), 0, ranks=(8, 8), counts=(1, 1), server_rank=8)
    update, sent = tailed(fed, tail)
    assert sent.recipe.tail_penalty == (5e-3, 6)
    update, kept = fed.method.encode(update, sent, None)
    assert kept is not None
    assert int(kept["rank"]) == rank
    assert all(payload.values["a"].shape[0] == rank for payload in update.modules.values())
    again = fed.method.start(fed.method.broadcast(fed.state, Request(8)), kept)
    assert {f.rank for f in again.adapter.values()} == {rank}
    # The scaling stays that of the client's own rank: pruning takes components away and changes no other.
    assert {f.scaling for f in again.adapter.values()} == {2.0}
    assert again.recipe.tail_penalty == (5e-3, int(0.75 * rank))


def test_hetlora_does_not_prune_from_a_zero_start_nor_below_one() -> None:
    """In the first round B = 0 and every tail grows; a rank of 1 has no tail; γ = 1 turns pruning off."""
    fed = build(hetlora(gamma=0.5), 0, ranks=(4,), counts=(1,))
    sent = fed.method.start(fed.method.broadcast(fed.state, Request(4)), None)
    assert int(fed.method.encode(fed.updates[0], sent, None)[1]["rank"]) == 4
    for method, rank in ((hetlora(gamma=0.5), 1), (hetlora(gamma=1.0), 4)):
        fed = build(method, 0, ranks=(rank,), counts=(1,))
        sent = method.start(method.broadcast(served(fed)[0], Request(rank)), None)
        assert sent.recipe.tail_penalty is None
        shrunk = {n: Factors(f.b * 0.1, f.a, f.scaling) for n, f in sent.adapter.items()}
        assert int(method.encode(replace(fed.updates[0], modules=shrunk), sent, None)[1]["rank"]) == rank


@pytest.mark.parametrize(("options", "rank", "kept"), [({"gamma": 0.7}, 4, 2), ({}, 4, 3)])
def test_hetlora_cuts_at_the_floor_and_counts_what_is_left(options: dict[str, float], rank: int, kept: int) -> None:
    """⌊γ r⌋, at the default γ too; the norm that a client counts by is that of the components it keeps."""
    fed = build(hetlora(**options), 0, ranks=(rank, rank), counts=(1, 1), server_rank=rank)
    sent = fed.method.start(fed.method.broadcast(served(fed)[0], Request(rank)), None)
    tail = torch.arange(rank) >= kept
    shrunk = {n: Factors(torch.where(tail, 0.9 * f.b, 2 * f.b), f.a, f.scaling) for n, f in sent.adapter.items()}
    update, keep = fed.method.encode(replace(fed.updates[0], modules=shrunk), sent, None)
    assert keep is not None
    assert int(keep["rank"]) == kept
    norms = [np.linalg.norm(f.scaling * array(f.b)[:, :kept] @ array(f.a)[:kept]) for f in shrunk.values()]
    for payload in update.modules.values():
        assert float(payload.values["size"]) == pytest.approx(float(np.linalg.norm(norms)), rel=1e-9)


def test_hetlora_compares_tails_as_products() -> None:
    """A longer column of B over a shorter row of A is no longer tail."""
    fed = build(hetlora(gamma=0.75), 0, ranks=(8, 8), counts=(1, 1), server_rank=8)
    sent = fed.method.start(fed.method.broadcast(served(fed)[0], Request(8)), None)
    tail = torch.arange(8) >= 6
    scaled = {
        n: Factors(torch.where(tail, 3 * f.b, f.b), torch.where(tail[:, None], 0.2 * f.a, f.a), f.scaling)
        for n, f in sent.adapter.items()
    }
    _, keep = fed.method.encode(replace(fed.updates[0], modules=scaled), sent, None)
    assert int(keep["rank"]) == 6


def test_hetlora_survives_a_round_of_silent_clients() -> None:
    """All B_k = 0: there is nothing to weight by, and the state stays."""
    fed = build(hetlora(), 0, ranks=(2, 3), counts=(1, 1), silent=(0, 1))
    state = served(fed)[0]
    assert state.modules == fed.state.modules
    assert state.round_num == 1


@laws
@given(seed=seeds)
def test_ffa_stays_in_the_row_space_of_its_first_a(seed: int) -> None:
    """Over three rounds of mixed ranks every global update has its rows in row(A₀); A₀ never changes."""
    shapes = [(14, 20)]
    fed = build(ffa_lora(), seed, shapes, ranks=(1, 2, 3), counts=(5, 1, 3), server_rank=3)
    first = array(fed.state.modules["layer0"]["a"])
    inside = np.linalg.pinv(first) @ first
    for number in range(3):
        fed = replace(
            fed, updates=build(fed.method, seed + number + 1, shapes, (1, 2, 3), (5, 1, 3), server_rank=3).updates
        )
        # Those updates belong to the A₀ of their own seed: put this federation's in.
        fed = replace(fed, updates=tuple(on_a(u, fed.state.modules["layer0"]["a"]) for u in fed.updates))
        state = served(fed)[0]
        delta = received(fed, state)["layer0"]
        assert_same({"layer0": delta}, fed.ideal, 1e-12)
        assert np.linalg.norm(delta - delta @ inside) < 1e-10 * np.linalg.norm(delta)
        np.testing.assert_array_equal(array(state.modules["layer0"]["a"]), first)
        fed = replace(fed, state=state)


def on_a(update: Update, a: torch.Tensor) -> Update:
    f = update.factors("layer0")
    return replace(update, modules={"layer0": Factors(f.b, a[: f.rank].double(), f.scaling)})


def test_ffa_sends_b_alone_with_its_scaling() -> None:
    """A does not travel in either direction: up goes s·B, and down A counts as derived from the seed."""
    fed = build(ffa_lora(), 0, ranks=(2, 4), counts=(1, 1))
    for raw, update in zip(fed.updates, encoded(fed), strict=True):
        for name, payload in update.modules.items():
            assert set(payload.values) == {"sb"}
            np.testing.assert_allclose(
                array(payload.values["sb"]), 16 / raw.factors(name).rank * array(raw.factors(name).b), rtol=1e-15
            )
    sent = fed.method.broadcast(fed.state, Request(2))
    assert sent.seeded == {"a"}
    assert not sent.recipe.train_a
    assert sent.recipe.train_b


def test_local_clients_keep_their_own_and_share_nothing() -> None:
    """Two clients trained one after another: nothing leaves, and each goes on from its own adapter and head."""
    fed = build(local(), 0, ranks=(2, 4), counts=(1, 1))
    assert all(not update.modules and not update.dense for update in encoded(fed))
    kept = []
    for update in fed.updates:
        rank = update.factors("layer0").rank
        start = fed.method.start(fed.method.broadcast(fed.state, Request(rank)), None)
        kept.append(fed.method.encode(update, start, None)[1])
    state = served(fed)[0]
    for update, own in zip(fed.updates, kept, strict=True):
        again = fed.method.start(fed.method.broadcast(state, Request(update.factors("layer0").rank)), own)
        for name, f in again.adapter.items():
            assert torch.equal(f.a, update.factors(name).a)
            assert torch.equal(f.b, update.factors(name).b)
            assert f.scaling == update.factors(name).scaling
        assert torch.equal(again.dense["head"], update.dense["head"])


@pytest.mark.parametrize("trains", ["targets", "all"])
def test_controls_that_train_weights_send_no_adapter(trains: Any) -> None:
    """The `local` and `centralised` arms of a full-weight method know no adapters, whatever the template says."""
    fed = build(local(trains), 0, ranks=(2,), counts=(1,))
    sent = fed.method.broadcast(fed.state, Request(2))
    assert not sent.adapter
    _, kept = fed.method.encode(fed.updates[0], sent, None)
    again = fed.method.start(fed.method.broadcast(served(fed)[0], Request(2)), kept)
    for name, value in fed.updates[0].dense.items():
        assert torch.equal(again.dense[name], value)


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_hetlora_options_out_of_range_are_named(gamma: float) -> None:
    with pytest.raises(ValueError, match=f"gamma = {gamma}: expected above 0 and at most 1"):
        hetlora(gamma=gamma)
