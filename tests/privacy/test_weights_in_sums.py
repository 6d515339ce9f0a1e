"""The weights in the totals of several rounds: equations that the server can solve for every client's own."""

from __future__ import annotations

import numpy as np
import pytest

from fedspan.config import FederationConfig
from fedspan.federation.clients import Client
from fedspan.federation.sampling import create_sampler

EXAMPLES = (812, 97, 1460, 233, 351, 640, 1025, 118)


def solved(weighting: str, examples: tuple[int, ...] = EXAMPLES) -> np.ndarray:
    """Return every client's weight as a server computes it from who took part and the total weights of ten rounds."""
    none = np.zeros(0, dtype=np.int64)
    clients = [Client(f"client-{k}", 4, none, none, count) for k, count in enumerate(examples)]
    sampler = create_sampler(FederationConfig(num_clients=8, participation=0.5), 0, "none")
    taken = np.zeros((10, 8))
    for round_num in range(10):
        taken[round_num, sampler.draw(8, round_num)] = 1
    totals = taken @ [client.weight(weighting) for client in clients]
    assert np.linalg.matrix_rank(taken) == 8
    weights: np.ndarray = np.linalg.lstsq(taken, totals, rcond=None)[0]
    return weights


def test_ten_totals_give_every_clients_number_of_examples() -> None:
    np.testing.assert_allclose(solved("examples"), EXAMPLES, rtol=1e-9)


def test_rounded_weights_give_the_powers_of_two_and_nothing_within_them() -> None:
    """Two federations whose counts differ by up to a factor of √2 either way look the same in every total."""
    rounded = solved("rounded")
    np.testing.assert_allclose(rounded, [1024, 128, 2048, 256, 256, 512, 1024, 128], rtol=1e-9)
    others = tuple(
        round(w * factor) for w, factor in zip(rounded, (0.72, 1.4, 0.8, 1.0, 1.3, 0.9, 1.1, 1.2), strict=True)
    )
    assert not set(others) & set(EXAMPLES)
    assert np.array_equal(solved("rounded", others), rounded)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 11, 12, 90, 91, 10**6, 10**12 + 7])
def test_a_rounded_weight_is_within_a_factor_of_the_root_of_two(count: int) -> None:
    none = np.zeros(0, dtype=np.int64)
    weight = Client("a", 4, none, none, count).weight("rounded")
    assert weight in {2.0**k for k in range(50)}
    assert 2**-0.5 * (1 - 1e-12) <= weight / count <= 2**0.5 * (1 + 1e-12)


def test_equal_weights_give_nothing() -> None:
    np.testing.assert_allclose(solved("equal"), np.ones(8), rtol=1e-9)
