"""LoRA-FAIR, its ridge form and FLoRA-NA: pairs nearer to the ideal update than FedIT's, against dense oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from close_federations import SAME, close, fedit_of, laws, mean, seeds
from federations import (
    Array,
    Federation,
    array,
    assert_same,
    build,
    distance,
    received,
    served,
)
from hypothesis import given
from hypothesis import strategies as st

from fedspan.methods import (
    flora_na,
    lora_fair,
    lora_fair_ridge,
)
from fedspan.methods.base import Method
from fedspan.methods.messages import Factors


def cosine_objective(fed: Federation, name: str, penalty: float) -> Callable[[Array], tuple[float, Array]]:
    """The paper's objective and its gradient at ΔB ≠ 0, densely."""
    s = fed.updates[0].factors(name).scaling
    b, a, t = mean(fed, name, "b"), mean(fed, name, "a"), fed.ideal[name] / s

    def at(change: Array) -> tuple[float, Array]:
        x = (b + change) @ a
        size, dot = np.linalg.norm(x), float(np.sum(t * x))
        length, full = np.linalg.norm(change), np.linalg.norm(t)
        slope = (-t / (full * size) + dot * x / (full * size**3)) @ a.T
        return 1 - dot / (full * size) + penalty * length, slope + penalty * change / max(length, 1e-300)

    return at


def corrected(fed: Federation, name: str) -> Array:
    """ΔB as the server chose it; rounding of B̄ is no correction."""
    b = mean(fed, name, "b")
    change = array(served(fed)[0].modules[name]["b"]) - b
    return change if np.abs(change).max() > 1e-14 * np.abs(b).max() else np.zeros_like(b)


@laws
@given(seed=seeds, spread=st.sampled_from([0.01, 0.3, 1.0]), penalty=st.sampled_from([1e-6, 1e-3, 1e-2]))
def test_lora_fair_minimises_the_papers_objective(seed: int, spread: float, penalty: float) -> None:
    """At ΔB the gradient vanishes, no random direction improves on it, and neither does ΔB = 0."""
    fed = close(seed, spread, lora_fair(penalty))
    rng = np.random.default_rng(seed)
    for name in fed.template.modules:
        at, change = cosine_objective(fed, name, penalty), corrected(fed, name)
        reached, slope = at(change)
        zero, steepest = at(np.zeros_like(change))
        if change.any():
            assert np.linalg.norm(slope) < 1e-8 * np.linalg.norm(steepest)
            assert reached < zero
        else:
            assert np.linalg.norm(steepest) <= penalty
        for size in (1e-4, 1e-2, 1.0):
            for _ in range(10):
                direction = rng.standard_normal(change.shape)
                step = size * np.linalg.norm(mean(fed, name, "b")) / np.linalg.norm(direction)
                assert at(change + step * direction)[0] >= reached - 1e-13


@pytest.mark.parametrize("penalty", [1e-3, 0.2])
def test_lora_fair_stands_clients_that_agree_on_nothing(penalty: float) -> None:
    """Random clients, rows of A from 0.01 to 10 in size: there may be several minima, none below ΔB = 0, or none.

    The gradient vanishes at whatever correction was chosen, and it is always better than no correction.
    """
    moved = 0
    sizes = torch.tensor([0.01, 1.0, 10.0], dtype=torch.float64)[:, None]
    for seed in range(100):
        fed = build(lora_fair(penalty), seed, shapes=((4, 5),), ranks=(3, 3), counts=(3, 2))
        uneven = [(u, u.factors("layer0")) for u in fed.updates]
        fed = replace(fed, updates=tuple(replace(u, modules={"layer0": replace(f, a=f.a * sizes)}) for u, f in uneven))
        at, change = cosine_objective(fed, "layer0", penalty), corrected(fed, "layer0")
        if change.any():
            moved += 1
            reach = np.linalg.norm(mean(fed, "layer0", "b") + change)  # the cosine's slope is of the size 1/‖X‖
            assert np.linalg.norm(at(change)[1]) < 1e-7 / reach
            assert at(change)[0] < at(np.zeros_like(change))[0]
    assert 20 < moved < 100


def test_lora_fair_leaves_alone_what_a_maps_to_zero() -> None:
    """With a rank above the layer's width some columns of B̄ have no product; rounding does not move them."""
    for seed in range(10):
        fed = close(seed, 0.5, lora_fair(1e-9), shapes=((9, 2),), ranks=(4, 4, 4))
        change = corrected(fed, "layer0")
        lost = np.linalg.svd(mean(fed, "layer0", "a"))[0][:, 2:]
        assert np.linalg.norm(change @ lost) < 1e-12 * np.linalg.norm(mean(fed, "layer0", "b"))


@pytest.mark.parametrize("seed", range(4))
def test_lora_fair_is_not_beaten_by_descent_from_elsewhere(seed: int) -> None:
    """L-BFGS on the m·r unknowns, from five random starts, finds nothing lower."""
    fed = close(seed, 0.5, lora_fair(1e-3), shapes=((12, 10),))
    at, change = cosine_objective(fed, "layer0", 1e-3), corrected(fed, "layer0")
    for start in range(5):
        rng = np.random.default_rng(start)
        x = torch.from_numpy(rng.standard_normal(change.shape) * 10.0 ** rng.uniform(-3, 0.5)).requires_grad_()
        solver = torch.optim.LBFGS([x], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure(x: torch.Tensor = x, solver: torch.optim.LBFGS = solver) -> float:
            value, slope = at(x.detach().numpy())
            x.grad = torch.from_numpy(slope)
            return value

        solver.step(closure)
        assert at(x.detach().numpy())[0] >= at(change)[0] - 1e-10


def test_lora_fair_moves_only_where_the_cosine_gains_more_than_the_penalty() -> None:
    """‖ΔB‖ is not squared: from some λ on the correction is exactly zero, and FedIT's pair stays."""
    fed = close(5, 0.5, lora_fair(1e-3))
    steepest = np.linalg.norm(cosine_objective(fed, "layer0", 0.0)(np.zeros((12, 3)))[1])
    for factor, moves in ((0.99, True), (1.01, False)):
        assert corrected(replace(fed, method=lora_fair(factor * steepest)), "layer0").any() == moves
    assert_same(received(fed, served(replace(fed, method=lora_fair(1e3)))[0]), fedit_of(fed), 1e-12)


@pytest.mark.parametrize("method", [lora_fair(), lora_fair_ridge(), flora_na()], ids=lambda m: m.info.name)
def test_corrections_stand_a_cosine_that_does_not_exist(method: Method) -> None:
    """T = 0 because nobody learnt anything, or B̄ Ā = 0 because two clients are opposite: all is finite, nothing 0/0."""
    silent = build(method, 0, ranks=(3, 3), counts=(1, 1), silent=(0, 1))
    state, diagnostics = served(silent)
    assert not any(value.any() for value in received(silent, state).values())
    assert diagnostics == {"fedit_distance": 0.0, "ideal_distance": 0.0}
    fed = build(method, 0, ranks=(3, 3), counts=(1, 1))
    first = fed.updates[0]
    modules = {n: Factors(-first.factors(n).b, fed.updates[1].factors(n).a, 16 / 3) for n in first.modules}
    state, diagnostics = served(fed, [first, replace(fed.updates[1], modules=modules)])
    assert all(bool(t.isfinite().all()) for held in state.modules.values() for t in held.values())
    assert diagnostics["fedit_distance"] == pytest.approx(1.0)


@laws
@given(seed=seeds, penalty=st.sampled_from([1e-3, 0.1, 10.0]))
def test_the_ridge_form_is_its_closed_form(seed: int, penalty: float) -> None:
    """ΔB = (T Āᵀ − B̄ Ā Āᵀ)(Ā Āᵀ + λ I)⁻¹, densely; and never farther from T than FedIT's product."""
    fed = close(seed, 0.5, lora_fair_ridge(penalty))
    for name in fed.template.modules:
        b, a = mean(fed, name, "b"), mean(fed, name, "a")
        t = fed.ideal[name] / fed.updates[0].factors(name).scaling
        expected = (t @ a.T - b @ a @ a.T) @ np.linalg.inv(a @ a.T + penalty * np.eye(3))
        np.testing.assert_allclose(corrected(fed, name), expected, atol=1e-11 * np.abs(b).max())
    assert distance(received(fed, served(fed)[0]), fed.ideal) <= distance(fedit_of(fed), fed.ideal)


@pytest.mark.parametrize(
    "method", [lora_fair(1e-4), lora_fair_ridge(), flora_na()], ids=["lora_fair", "lora_fair_ridge", "flora_na"]
)
def test_the_reported_distances_are_the_measured_ones(method: Method) -> None:
    """Before: FedIT's product; after: what is broadcast; over all modules, relative to ‖T‖. And it comes nearer."""
    fed = close(1, 0.5, method)
    state, diagnostics = served(fed)
    after, before = distance(received(fed, state), fed.ideal), distance(fedit_of(fed), fed.ideal)
    assert diagnostics["fedit_distance"] == pytest.approx(before, rel=1e-10)
    assert diagnostics["ideal_distance"] == pytest.approx(after, rel=1e-10)
    assert after < 0.999 * before


@laws
@given(seed=seeds, spread=st.sampled_from([1e-3, 0.3, 1.0]), sweeps=st.integers(1, 4))
def test_flora_na_is_never_farther_than_fedit_and_each_sweep_helps(seed: int, spread: float, sweeps: int) -> None:
    fed = close(seed, spread, flora_na(sweeps))
    one = distance(received(fed, served(fed)[0]), fed.ideal)
    more = distance(received(fed, served(replace(fed, method=flora_na(sweeps + 3)))[0]), fed.ideal)
    assert one <= distance(fedit_of(fed), fed.ideal) + 1e-13
    assert more <= one + 1e-13


@laws
@given(seed=seeds)
def test_flora_na_solves_each_half_exactly(seed: int) -> None:
    """After one sweep q is what dense least squares gives for its B̂, and p for the plain Ā."""
    fed = build(flora_na(1), seed, **SAME)
    state = served(fed)[0]
    for name in fed.template.modules:
        pairs = [(array(u.factors(name).b), array(u.factors(name).a)) for u in fed.updates]
        target = (fed.ideal[name] / fed.updates[0].factors(name).scaling).ravel()
        a = mean(fed, name, "a")
        p = np.linalg.lstsq(np.stack([(b @ a).ravel() for b, _ in pairs], axis=1), target, rcond=None)[0]
        b = sum(w * pair[0] for w, pair in zip(p, pairs, strict=True))
        q = np.linalg.lstsq(np.stack([(b @ x).ravel() for _, x in pairs], axis=1), target, rcond=None)[0]
        a = sum(w * pair[1] for w, pair in zip(q, pairs, strict=True))
        np.testing.assert_allclose(array(state.modules[name]["b"]), b, atol=1e-10 * np.abs(b).max())
        np.testing.assert_allclose(array(state.modules[name]["a"]), a, atol=1e-10 * np.abs(a).max())


def test_flora_na_takes_dependent_clients_as_the_shares_would() -> None:
    """A client split in two makes the least squares singular, and the result is that of the whole client.

    So it is where p is not unique to begin with and what is chosen matters for q: the second rows of the A_k cancel in
    Ā, and the first columns of the B_k are dependent.
    """
    fed = build(flora_na(1), 6, shapes=((12, 10),), ranks=(2, 2, 2), counts=(1, 1, 1))
    b, a = ([getattr(u.factors("layer0"), part).clone() for u in fed.updates] for part in "ba")
    a[1][1], a[2][1] = -a[0][1], 0.0
    b[2][:, 0] = b[0][:, 0] + b[1][:, 0]
    singular = tuple(
        replace(u, modules={"layer0": Factors(y, x, 8.0)}) for u, y, x in zip(fed.updates, b, a, strict=True)
    )
    for updates in (fed.updates, singular):
        halves = [replace(updates[0], client_id=name, num_examples=0.5) for name in ("client0", "twin")]
        whole = received(fed, served(fed, updates)[0])
        assert_same(received(fed, served(fed, [*halves, *updates[1:]])[0]), whole, 1e-11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora_fair(penalty=0.0), r"method.penalty = 0.0: expected above 0"),
        (lambda: lora_fair_ridge(penalty=float("inf")), r"method.penalty = inf: expected above 0"),
        (lambda: flora_na(sweeps=0), r"method.sweeps = 0: expected at least 1"),
    ],
)
def test_penalties_and_sweeps_out_of_range_are_named(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
