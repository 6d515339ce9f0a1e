"""Laws of client sampling: sizes, fairness, reproducibility, and what privacy asks of it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspan.config import FederationConfig
from fedspan.federation.sampling import SAMPLERS, PoissonSampler, UniformSampler, create_sampler

seeds = st.integers(0, 2**32 - 1)
SECRET = 2**200 + 12345


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(1, 60), seeds, st.integers(0, 1000))
def test_participants_are_distinct_sorted_and_fixed_by_seed_and_round(
    num_clients: int, participation: float, min_clients: int, seed: int, round_num: int
) -> None:
    if min_clients > num_clients:
        with pytest.raises(ValueError, match="min_clients"):
            UniformSampler(participation, min_clients, seed).draw(num_clients, round_num)
        return
    sampler = UniformSampler(participation, min_clients, seed)
    drawn = sampler.draw(num_clients, round_num)
    assert sampler.expected_size(num_clients) == len(drawn)
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(num_clients))
    assert len(drawn) >= min_clients
    assert len(drawn) == min_clients or abs(len(drawn) - participation * num_clients) <= 0.5 + 1e-9
    assert drawn == UniformSampler(participation, min_clients, seed).draw(num_clients, round_num)


def test_participants_take_turns() -> None:
    """Each of 10 clients joins half of 400 rounds within 5 standard deviations (50)."""
    counts = Counter(client for r in range(400) for client in UniformSampler(0.5, 1, 0).draw(10, r))
    assert all(abs(counts[client] - 200) < 50 for client in range(10))
    assert UniformSampler(1.0, 1, 5).draw(10, 3) == list(range(10))
    assert len({tuple(UniformSampler(0.5, 1, 0).draw(8, r)) for r in range(20)}) > 5
    assert len({tuple(UniformSampler(0.5, 1, seed).draw(8, 0)) for seed in range(20)}) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0.0, 1, 0), "participation"), ((1.5, 1, 0), "participation"), ((0.5, 1, -1), "seed")],
)
def test_bad_participation_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniformSampler(*arguments)


def test_coins_are_independent_and_may_draw_nobody() -> None:
    """n = 4000 rounds of 10 clients at q = 0.2: every client's rate, every pair's, the empty round's, 5σ."""
    n, q = 4000, 0.2
    drawn = np.zeros((n, 10))
    for t in range(n):
        drawn[t, PoissonSampler(q, lambda: SECRET).draw(10, t)] = 1
    assert np.abs(drawn.mean(axis=0) - q).max() < 5 * math.sqrt(q * (1 - q) / n)
    pairs = drawn.T @ drawn / n - np.diag(drawn.mean(axis=0))
    off = pairs[~np.eye(10, dtype=bool)]
    assert np.abs(off - q * q).max() < 5 * math.sqrt(q * q * (1 - q * q) / n)
    assert PoissonSampler(q, lambda: SECRET).expected_size(10) == q * 10
    empty = (1 - q) ** 10
    assert abs((drawn.sum(axis=1) == 0).mean() - empty) < 5 * math.sqrt(empty * (1 - empty) / n)
    assert PoissonSampler(q, lambda: SECRET).draw(10, 7) == PoissonSampler(q, lambda: SECRET).draw(10, 7)
    assert PoissonSampler(1.0, lambda: SECRET).draw(3, 7) == [0, 1, 2]
    other = [PoissonSampler(q, lambda: SECRET + 1).draw(10, t) for t in range(50)]
    assert other != [PoissonSampler(q, lambda: SECRET).draw(10, t) for t in range(50)]
    with pytest.raises(ValueError, match=r"participation = 1.5: expected a share above 0 and up to 1"):
        PoissonSampler(1.5, lambda: SECRET).draw(10, 0)


def test_the_settings_name_the_sampler() -> None:
    half, everyone = FederationConfig(participation=0.5), FederationConfig(participation=1.0)
    assert isinstance(create_sampler(half, 3, "none"), UniformSampler)
    assert isinstance(create_sampler(half, 3, "example"), UniformSampler)
    assert isinstance(create_sampler(half, 3, "client", lambda: SECRET), PoissonSampler)
    assert isinstance(create_sampler(everyone, 3, "client"), UniformSampler)
    assert set(SAMPLERS) == {"uniform", "poisson"}


@pytest.mark.parametrize(
    ("sampler", "dp", "message"),
    [
        ("unifrom", "none", "did you mean 'uniform'"),
        ("uniform", "client", "expected 'auto' or 'poisson'"),
        ("poisson", "none", "expected 'uniform'"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(sampler: str, dp: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_sampler(FederationConfig(sampler=sampler), 0, dp)


def test_poisson_without_a_secret_is_refused_when_it_draws() -> None:
    with pytest.raises(ValueError, match="the server's secret"):
        create_sampler(FederationConfig(), 0, "client").draw(8, 0)
