"""RoLoRA, FedSA-LoRA, FedSVD, raFLoRA and FedRot-LoRA against dense oracles of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close_federations import SAME, fedit_of, laws, mean, seeds
from federations import (
    Array,
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
    weighted_sum,
)
from hypothesis import given
from hypothesis import strategies as st

from fedspan.methods import (
    fedit,
    fedrot_lora,
    fedsa_lora,
    fedsvd,
    ffa_lora,
    flexlora,
    raflora,
    rolora,
)
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.messages import Broadcast, Factors, Request, Template, Update
from fedspan.runs import checkpoint
from fedspan.runs.checkpoint import Checkpoint

MIXED: dict[str, Any] = {"shapes": ((20, 20), (24, 14)), "ranks": (2, 4, 7, 4), "counts": (5, 2, 9, 1)}


def learnt(sent: Broadcast, target: torch.Tensor, steps: int = 40) -> Factors:
    """Gradient descent on ½‖s·B·A − target‖² over the factors that the recipe trains."""
    f = sent.adapter["layer0"]
    b, a = f.b.double().requires_grad_(sent.recipe.train_b), f.a.double().requires_grad_(sent.recipe.train_a)
    for _ in range(steps):
        loss = 0.5 * (f.scaling * b @ a - target).square().sum()
        trained = [x for x in (b, a) if x.requires_grad]
        grads = torch.autograd.grad(loss, trained)
        for x, g in zip(trained, grads, strict=True):
            x.data -= 0.02 * g
    return Factors(b.detach(), a.detach(), f.scaling)


def federated_descent(method: Method, rounds: int) -> tuple[list[float], list[ServerState]]:
    """Three clients with targets of their own: the loss of the broadcast pair on the mean target, round by round."""
    template = Template({"layer0": (8, 6)}, 2, alpha=2.0, seed=3)
    rng = np.random.default_rng(0)
    targets = [torch.from_numpy(rng.standard_normal((8, 2)) @ rng.standard_normal((2, 6))) for _ in range(3)]
    state, losses, states = method.init(template, {}), [], []
    for _ in range(rounds):
        updates = []
        for k, target in enumerate(targets):
            sent = method.broadcast(state, Request(2))
            update = Update(f"client{k}", 1.0, {"layer0": learnt(sent, target)}, {})
            updates.append(method.encode(update, sent, None)[0])
        state, _ = aggregate(method, state, updates)
        f = method.broadcast(state, Request(2)).adapter["layer0"]
        losses.append(float((f.scaling * f.b.double() @ f.a.double() - sum(targets) / 3).square().sum()))
        states.append(state)
    return losses, states


def test_rolora_learns_in_its_very_first_round() -> None:
    """B trains first: with B = 0 the gradient of A is zero, and a round that starts with A is wasted."""
    sent = rolora().broadcast(rolora().init(Template({"layer0": (8, 6)}, 2), {}), Request(2))
    assert (sent.recipe.train_a, sent.recipe.train_b) == (False, True)
    target = torch.ones(8, 6, dtype=torch.float64)
    wrong = learnt(replace(sent, recipe=replace(sent.recipe, train_a=True, train_b=False)), target)
    assert torch.equal(wrong.a, sent.adapter["layer0"].a.double())
    assert learnt(sent, target).b.any()


def test_rolora_takes_turns_and_every_round_learns() -> None:
    """Over six rounds of real local descent one factor changes and the other does not, bit by bit; the loss falls."""
    losses, states = federated_descent(rolora(), 6)
    assert all(after < before for before, after in pairwise(losses))
    for number in range(1, 6):
        before, after = states[number - 1].modules["layer0"], states[number].modules["layer0"]
        still, moved = ("a", "b") if number % 2 == 0 else ("b", "a")
        assert torch.equal(before[still], after[still])
        assert not torch.equal(before[moved], after[moved])


def test_rolora_leaves_the_row_space_that_a_frozen_a_is_confined_to() -> None:
    """The same problem: what FFA-LoRA can never reach RoLoRA does."""
    assert federated_descent(rolora(), 12)[0][-1] < 0.9 * federated_descent(ffa_lora(), 12)[0][-1]


@laws
@given(seed=seeds, alpha=st.sampled_from([0.5, 16.0]), rslora=st.booleans())
def test_rolora_is_exact_in_both_kinds_of_rounds(seed: int, alpha: float, rslora: bool) -> None:
    """Σ p_k s B_k A with A the server's, then Σ p_k s B A_k with B the server's."""
    first = build(rolora(), seed, **SAME, alpha=alpha, rslora=rslora)
    state = served(first)[0]
    assert_same(received(first, state), first.ideal, 1e-12)
    fed = build(rolora(), seed + 1, **SAME, alpha=alpha, rslora=rslora)
    updates = []
    for update in fed.updates:
        modules = {n: replace(update.factors(n), b=state.modules[n]["b"]) for n in update.modules}
        updates.append(replace(update, modules=modules))
    fed = replace(fed, state=state, updates=tuple(updates))
    assert all(set(p.values) == {"a"} for update in encoded(fed) for p in update.modules.values())
    assert_same(received(fed, served(fed)[0]), fed.ideal, 1e-12)
    # A scaling of a client's own goes into the factor that travels.
    tripled = [
        replace(u, modules={n: replace(u.factors(n), scaling=3 * u.factors(n).scaling) for n in u.modules})
        for u in fed.updates
    ]
    expected = {name: 3 * value for name, value in fed.ideal.items()}
    assert_same(received(fed, served(fed, tripled)[0]), expected, 1e-12)


def fedsa_round(fed: Federation, kept: dict[str, Any], active: list[int]) -> tuple[ServerState, dict[str, Any]]:
    """One round in which those clients come back with what the federation holds for them."""
    method, sent, kept = fed.method, [], dict(kept)
    for k in active:
        update = fed.updates[k]
        own = kept.get(update.client_id)
        start = method.start(method.broadcast(fed.state, Request(3)), own)
        answer, kept[update.client_id] = method.encode(update, start, own)
        sent.append(answer)
    return aggregate(method, fed.state, sent)[0], kept


def test_fedsa_shares_a_and_nothing_of_b() -> None:
    """Up goes A alone; the server holds the weighted mean of A, and no B at all; down, B does not travel."""
    fed = build(fedsa_lora(), 0, **SAME)
    for update in encoded(fed):
        assert all(set(payload.values) == {"a"} for payload in update.modules.values())
    state = served(fed)[0]
    for name, held in state.modules.items():
        assert set(held) == {"a"}
        np.testing.assert_allclose(array(held["a"]), mean(fed, name, "a"), rtol=1e-12)
    np.testing.assert_allclose(
        array(state.dense["head"]), weighted_sum(fed, lambda u: array(u.dense["head"])), rtol=1e-12
    )
    assert fed.method.broadcast(state, Request(3)).seeded == {"b"}


def test_fedsa_models_are_own_b_times_common_a() -> None:
    """What each client starts the next round from, and the client that never took part: B = 0."""
    fed = build(fedsa_lora(), 1, **SAME)
    state, kept = fedsa_round(fed, {}, [0, 1])
    sent = fed.method.broadcast(state, Request(3))
    for k in (0, 1):
        start = fed.method.start(sent, kept[f"client{k}"])
        for name, f in start.adapter.items():
            assert torch.equal(f.b, fed.updates[k].factors(name).b)
            assert torch.equal(f.a, state.modules[name]["a"])
    unseen = fed.method.start(sent, kept.get("client2"))
    assert not any(f.b.any() for f in unseen.adapter.values())
    assert torch.equal(unseen.dense["head"], state.dense["head"])


def test_fedsa_factors_do_not_leak_between_clients() -> None:
    """Clients simulated one after another: no B is another's, and a model that trains on changes no state."""
    fed = build(fedsa_lora(), 2, **SAME)
    _, kept = fedsa_round(fed, {}, [0, 1, 2])
    before = {c: {n: t.clone() for n, t in own.items()} for c, own in kept.items()}
    for update in fed.updates:
        for name in update.modules:
            update.factors(name).b.fill_(7.0)
            update.factors(name).a.fill_(7.0)
    for client, own in kept.items():
        assert all(torch.equal(value, before[client][name]) for name, value in own.items())
    values = [own["layer0/b"] for own in kept.values()]
    assert not any(torch.equal(values[i], values[j]) for i in range(3) for j in range(i))


def test_fedsa_b_survives_absence_and_the_checkpoint(tmp_path: Path) -> None:
    """Client 0 is away for two rounds, in between the run is saved and read back: its B is what it was, bit by bit."""
    fed = build(fedsa_lora(), 3, **SAME)
    state, kept = fedsa_round(fed, {}, [0, 1])
    mine = {name: value.clone() for name, value in kept["client0"].items()}
    state, kept = fedsa_round(replace(fed, state=state), kept, [1, 2])
    checkpoint.write(tmp_path / "c", Checkpoint(state, client_states=kept))
    saved = checkpoint.read(tmp_path / "c")
    state, kept = fedsa_round(replace(fed, state=saved.state), dict(saved.client_states), [2])
    start = fed.method.start(fed.method.broadcast(state, Request(3)), kept["client0"])
    for name, f in start.adapter.items():
        assert torch.equal(f.b, mine[f"{name}/b"])


def test_fedsa_keeps_a_scaling_of_its_own_in_b() -> None:
    """(B, A, 3s) comes back as (3B, Ā, s)."""
    fed = build(fedsa_lora(), 4, ranks=(3,), counts=(1,))
    update = fed.updates[0]
    modules = {n: replace(update.factors(n), scaling=3 * update.factors(n).scaling) for n in update.modules}
    state, kept = fedsa_round(replace(fed, updates=(replace(update, modules=modules),)), {}, [0])
    start = fed.method.start(fed.method.broadcast(state, Request(3)), kept["client0"])
    own = {name: f.scaling * array(f.b) @ array(f.a) for name, f in start.adapter.items()}
    assert_same(own, {name: 3 * value for name, value in fed.ideal.items()}, 1e-12)


@laws
@given(seed=seeds)
def test_fedsvd_keeps_the_product_and_orthonormal_rows(seed: int) -> None:
    """T in the form of its SVD: A Aᵀ = I, the columns of B orthogonal, the longest first."""
    fed = build(fedsvd(), seed, **SAME)
    state = served(fed)[0]
    assert_same(received(fed, state), fed.ideal, 1e-12)
    for held in state.modules.values():
        np.testing.assert_allclose(array(held["a"] @ held["a"].mT), np.eye(3), atol=1e-13)
        lengths = np.linalg.norm(array(held["b"]), axis=0)
        assert (np.diff(lengths) <= 0).all()
        np.testing.assert_allclose(array(held["b"].mT @ held["b"]), np.diag(lengths**2), atol=1e-12 * lengths[0] ** 2)


def test_fedsvd_keeps_its_random_a_until_something_is_learnt() -> None:
    """A silent round changes neither factor; a B of one column still gives r orthonormal rows that can all learn."""
    fed = build(fedsvd(), 0, **{**SAME, "silent": (0, 1, 2)})
    state = served(fed)[0]
    for name, held in state.modules.items():
        assert torch.equal(held["a"], fed.state.modules[name]["a"].double())
        assert not held["b"].any()
    lone = []
    for update in build(fedsvd(), 0, **SAME).updates:
        pairs = {n: update.factors(n) for n in update.modules}
        kept = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        lone.append(replace(update, modules={n: replace(f, b=f.b * kept) for n, f in pairs.items()}))
    for held in served(fed, lone)[0].modules.values():
        np.testing.assert_allclose(array(held["a"] @ held["a"].mT), np.eye(3), atol=1e-13)
        assert float(held["b"][:, 1:].abs().max()) < 1e-14 * float(held["b"].abs().max()) * 100


def test_fedsvd_never_leaves_the_row_space_of_its_first_a() -> None:
    """The SVD turns A within row(A₀): over rounds of real descent it stays there, as FFA-LoRA does."""
    losses, states = federated_descent(fedsvd(), 5)
    first = array(fedsvd().init(Template({"layer0": (8, 6)}, 2, alpha=2.0, seed=3), {}).modules["layer0"]["a"])
    inside = np.linalg.pinv(first) @ first
    for state in states:
        a = array(state.modules["layer0"]["a"])
        np.testing.assert_allclose(a @ inside, a, atol=1e-7)  # A₀ is float32
    assert losses[-1] <= losses[0]


@pytest.mark.parametrize("shape", [(2, 7), (7, 2), (2, 2)])
def test_fedsvd_stands_ranks_above_a_layers_size(shape: tuple[int, int]) -> None:
    """Factors keep the shapes (m, r) and (r, n), and the product is T."""
    fed = build(fedsvd(), 1, shapes=[shape], ranks=(4, 4), counts=(1, 2))
    state = served(fed)[0]
    assert state.modules["layer0"]["a"].shape == (4, shape[1])
    assert state.modules["layer0"]["b"].shape == (shape[0], 4)
    assert_same(received(fed, state), fed.ideal, 1e-12)
    # Spare components keep their random A beside a zero B: with both at zero they would never learn.
    before, after = fed.state.modules["layer0"]["a"], state.modules["layer0"]
    torch.testing.assert_close(after["a"][min(shape) :], before[min(shape) :].to(after["a"]), rtol=0, atol=0)
    assert not after["b"][:, min(shape) :].any()


def by_slices(fed: Federation, name: str) -> Array:
    """Σ_h Σ_{k: r_k ≥ h} (n_k / N_h) s_k B_k[:, slice_h] A_k[slice_h, :] over the run's rank levels h."""
    levels = sorted({u.factors(name).rank for u in fed.updates})
    total = np.zeros(fed.template.modules[name])
    for low, high in zip([0, *levels], levels, strict=False):
        having = [u for u in fed.updates if u.factors(name).rank >= high]
        examples = sum(u.num_examples for u in having)
        for u in having:
            f = u.factors(name)
            part = array(f.b)[:, low:high] @ array(f.a)[low:high]
            total += u.num_examples / examples * (fed.template.alpha / f.rank) * part
    return total


@laws
@given(seed=seeds)
def test_raflora_is_the_sum_over_rank_slices(seed: int) -> None:
    """Component by component is slice by slice; and the weighting is called: mixed ranks are not FlexLoRA."""
    fed = build(raflora(), seed, **MIXED)
    expected = {name: by_slices(fed, name) for name in fed.template.modules}
    assert_same(received(fed, served(fed)[0]), expected, 1e-11)
    assert distance(expected, fed.ideal) > 0.1


@laws
@given(seed=seeds, server_rank=st.integers(2, 9))
def test_raflora_at_equal_ranks_is_flexlora(seed: int, server_rank: int) -> None:
    """To the last bit, truncated or not."""
    ours = build(raflora(), seed, **SAME, server_rank=server_rank)
    state, theirs = served(ours)[0], served(replace(ours, method=flexlora()))[0]
    for name, held in state.modules.items():
        assert all(torch.equal(value, theirs.modules[name][part]) for part, value in held.items())


@pytest.mark.parametrize(("make", "kept"), [(raflora, 1.0), (flexlora, 0.2)], ids=["raflora", "flexlora"])
def test_raflora_does_not_let_high_ranks_fade(make: Callable[[], Method], kept: float) -> None:
    """Clients that learn nothing send back what they were sent: raFLoRA's state stays, FlexLoRA's tail fades by a share
    per round (rank collapse)."""
    fed = build(make(), 0, shapes=((20, 16),), ranks=(2, 2, 6), counts=(3, 1, 1), server_rank=6)
    full = build(make(), 0, shapes=((20, 16),), ranks=(6,), counts=(1,), server_rank=6)
    state = served(full)[0]
    strengths = []
    for _ in range(3):
        strengths.append(np.linalg.svd(received(fed, state)["layer0"], compute_uv=False)[:6])
        sent = {rank: fed.method.broadcast(state, Request(rank)) for rank in (2, 6)}
        back = [replace(u, modules=sent[u.factors("layer0").rank].adapter) for u in fed.updates]
        state = served(replace(fed, state=state), back)[0]
    np.testing.assert_allclose(strengths[2][:2], strengths[0][:2], rtol=1e-10)
    np.testing.assert_allclose(strengths[2][2:], kept**2 * strengths[0][2:], rtol=1e-10)


@laws
@given(seed=seeds)
def test_the_rb_weighting_averages_factors_component_by_component(seed: int) -> None:
    """(Σ_k n_k/N_j s_k b_kj)(Σ_k n_k/N_j a_kj): padding adds no zeros to the means. At equal ranks it is FedIT."""
    fed = build(raflora(weighting="rb"), seed, **MIXED)
    expected = {}
    for name, (m, n) in fed.template.modules.items():
        b, a = np.zeros((m, 7)), np.zeros((7, n))
        for j in range(7):
            having = [u for u in fed.updates if u.factors(name).rank > j]
            examples = sum(u.num_examples for u in having)
            for u in having:
                f = u.factors(name)
                b[:, j] += u.num_examples / examples * 16 / f.rank * array(f.b)[:, j]
                a[j] += u.num_examples / examples * array(f.a)[j]
        expected[name] = b @ a
    assert_same(received(fed, served(fed)[0]), expected, 1e-11)
    assert distance(expected, received(fed, served(replace(fed, method=raflora()))[0])) > 0.1
    equal = build(raflora(weighting="rb"), seed, **SAME, server_rank=3)
    assert_same(received(equal, served(equal)[0]), fedit_of(equal), 1e-11)


def orthogonal(seed: int) -> Callable[[int, int], Array]:
    rng = np.random.default_rng(seed)
    return lambda k, rank: gauge(rng, rank, 1.0)


def second(method: Method, seed: int) -> Federation:
    """A federation whose last global pair is not the fresh one."""
    fed = build(method, seed, **SAME)
    return replace(build(method, seed + 1, **SAME), state=served(fed)[0])


@laws
@given(seed=seeds)
def test_fedrot_sees_no_rotation_but_a_general_gauge(seed: int) -> None:
    """Every client's pair turned by an orthogonal G of its own changes nothing, in the first round and later."""
    for fed in (build(fedrot_lora(), seed, **SAME), second(fedrot_lora(), seed)):
        expected = received(fed, served(fed)[0])
        turned = regauged(fed, orthogonal(seed))
        assert_same(received(turned, served(turned)[0]), expected, 1e-10)
        rng = np.random.default_rng(seed)
        other = regauged(fed, lambda k, rank, rng=rng: gauge(rng, rank, 10.0))
        assert distance(received(other, served(other)[0]), expected) > 0.01
        plain = replace(turned, method=fedit())
        assert distance(received(plain, served(plain)[0]), fedit_of(fed)) > 0.01


def test_fedrot_turns_and_does_not_change_what_a_client_sends() -> None:
    """(B Q, QᵀA) with Q orthogonal: the product and all lengths stay, and no rotation brings the pair closer."""
    fed = second(fedrot_lora(), 0)
    sent = fed.method.broadcast(fed.state, Request(3)).adapter
    for raw, update in zip(fed.updates, encoded(fed), strict=True):
        for name, f in ((name, update.factors(name)) for name in update.modules):
            before = raw.factors(name)
            np.testing.assert_allclose(array(f.b @ f.a), array(before.b @ before.a), atol=1e-12)
            target = sent[name]

            # QᵀM symmetric and positive semi-definite is what makes Q the best rotation (Schönemann 1966).
            overlap = unit(f.b).T @ unit(target.b) + unit(f.a) @ unit(target.a).T
            np.testing.assert_allclose(overlap, overlap.T, atol=1e-12)
            assert np.linalg.eigvalsh(overlap).min() > -1e-12
            assert np.trace(overlap) > np.trace(unit(before.b).T @ unit(target.b) + unit(before.a) @ unit(target.a).T)


def unit(x: torch.Tensor) -> Array:
    return array(x) / np.linalg.norm(array(x))


def test_fedrot_aligns_by_a_alone_while_b_is_zero() -> None:
    """In the first round every pair is turned so that A lies on the random A₀; turned copies then average exactly."""
    fed = build(fedrot_lora(), 2, **SAME)
    first = fed.updates[0]
    copies = tuple(replace(u, modules=first.modules) for u in fed.updates)
    turned = regauged(replace(fed, updates=copies), orthogonal(5))
    assert_same(received(turned, served(turned)[0]), turned.ideal, 1e-11)
    assert distance(fedit_of(turned), turned.ideal) > 0.1
    a_only = [
        replace(u, modules={n: replace(first.factors(n), a=fed.state.modules[n]["a"].double()) for n in u.modules})
        for u in copies
    ]
    for update in encoded(regauged(replace(fed, updates=tuple(a_only)), orthogonal(6))):
        for name in update.modules:
            np.testing.assert_allclose(array(update.factors(name).a), array(fed.state.modules[name]["a"]), atol=1e-12)


def test_fedrot_alternate_aligns_by_one_factor_from_the_second_round_on() -> None:
    """As the authors' code does: nothing in round 1, then A, then B, each turned as far as it alone asks for."""
    fed, by = build(fedrot_lora("alternate"), 0, **SAME), []
    for number in range(4):
        fed = replace(build(fed.method, number, **SAME), state=fed.state)
        sent = fed.method.broadcast(fed.state, Request(3))
        by.append(sent.recipe.align)
        for raw, update in zip(fed.updates, encoded(fed), strict=True):
            for name in update.modules:
                before, f, target = raw.factors(name), update.factors(name), sent.adapter[name]
                np.testing.assert_allclose(array(f.b @ f.a), array(before.b @ before.a), atol=1e-12)
                overlaps = {"a": unit(f.a) @ array(target.a).T, "b": unit(f.b).T @ array(target.b)}
                # A best rotation leaves a symmetric positive semi-definite overlap (Schönemann 1966).
                best = [
                    part
                    for part, x in overlaps.items()
                    if x.any() and np.allclose(x, x.T, atol=1e-9) and np.linalg.eigvalsh(x).min() > -1e-9
                ]
                assert best == ([sent.recipe.align] if sent.recipe.align else [])
                assert torch.equal(f.a, before.a) == (number == 0)
        fed = replace(fed, state=served(fed)[0])
    assert by == [None, "a", "b", "a"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fedrot_lora(align="a"), r"method.align = 'a': expected 'both' or 'alternate'"),  # type: ignore[arg-type]
        (lambda: raflora(weighting="equal"), r"method.weighting = 'equal': expected 'rank' or 'rb'"),
    ],
)
def test_options_out_of_range_are_named(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
