"""GLoRA's momentum: the dense heavy ball, cut to the server's rank, in any gauge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import (
    Array,
    assert_same,
    build,
    distance,
    gauge,
    received,
    regauged,
    served,
)
from glora_rounds import MIXED, added, held, laws, low_rank, with_deltas
from hypothesis import given
from hypothesis import strategies as st
from test_spectral import by_queries, second_round

from fedspan.methods import glora

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
