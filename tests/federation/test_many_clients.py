"""A round of many clients among a million: what it looks at, holds and costs grows with the clients in it alone."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pytest
import tiny
import torch

from fedspan.client.training import LocalResult
from fedspan.federation import rounds
from fedspan.federation.clients import Client
from fedspan.federation.sampling import UniformSampler
from fedspan.methods import METHODS
from fedspan.methods.folds import COLLECT, SUM, Partial
from fedspan.methods.messages import Broadcast, Factors, Update
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.running_sum import SumSettings
from fedspan.privacy.sum_layout import SumLayout

POPULATION = 1_000_000
NONE = np.zeros(0, dtype=np.int64)


class Watched(Sequence[Client]):
    """A million clients that are made when they are looked at."""

    def __init__(self) -> None:
        self.looked_at = 0

    def __len__(self) -> int:
        return POPULATION

    @overload
    def __getitem__(self, at: int) -> Client: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Client]: ...
    def __getitem__(self, at: int | slice) -> Client | Sequence[Client]:
        assert isinstance(at, int)
        self.looked_at += 1
        return Client(f"client-{at:06d}", 4, NONE, NONE, stated=10)


@pytest.mark.parametrize("number", [10, 1000])
def test_a_million_clients_are_drawn_from_at_the_cost_of_those_drawn(number: int) -> None:
    """One entry for each of a million would take 8 MB."""
    sampler = UniformSampler(number / POPULATION)
    sampler.draw(POPULATION, 0)
    tracemalloc.start()
    try:
        drawn = sampler.draw(POPULATION, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(drawn)) == number
    assert peak < 200 * number + 50_000


def round_of(number: int) -> tuple[int, int]:
    """Return the most results that were held at once in a round of so many clients, and the clients looked at."""
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, clients, method = 0, Watched(), METHODS["fedit"]()
    cohort = [clients[i] for i in UniformSampler(number / POPULATION).draw(len(clients), 0)]

    def work(window: Sequence[tuple[Client, Broadcast]], round_num: int) -> Iterator[tuple[LocalResult, float]]:
        nonlocal most
        for client, sent in window:
            moved = {name: Factors(f.b + 1.0, f.a + 1.0, f.scaling) for name, f in sent.adapter.items()}
            for f in moved.values():
                held.add(f.b)
            yield LocalResult(Update(client.client_id, 1.0, moved, dict(sent.dense)), 1.0, 1), 0.0
            del moved, f
            most = max(most, len(held))

    rounds.run_round(method, tiny.run_state(method, 4), cohort, work)
    return most, clients.looked_at


def test_a_round_holds_as_much_with_two_thousand_clients_as_with_a_hundred() -> None:
    few, many = round_of(100), round_of(2_000)
    assert few[0] == many[0] <= 4 * len(tiny.SHAPES)
    assert (few[1], many[1]) == (100, 2_000)


def test_a_collected_update_is_appended_and_copies_no_others() -> None:
    """A new tuple for every update would cost the square of their number."""
    updates = [Update(f"client-{k}", 1.0, {}, {}) for k in range(4)]
    partial = COLLECT.add_in_place(COLLECT.add_in_place(Partial(), updates[0]), updates[1])
    held = partial.collected
    partial = COLLECT.add_in_place(partial, updates[2])
    assert partial.collected is held
    assert [u.client_id for u in held] == ["client-0", "client-1", "client-2"]
    pure = COLLECT.add(partial, updates[3])
    assert len(held) == 3
    assert len(pure.collected) == 4


@pytest.mark.parametrize("seed", range(5))
def test_sums_in_fixed_point_have_the_same_bits_in_any_grouping(seed: int) -> None:
    """Regional sums are integers, so the way in which clients form regions cannot change the sum of all."""
    region_of = np.random.default_rng(seed).integers(0, 5, 9).tolist()
    rng = torch.Generator().manual_seed(0)
    updates = [
        Update(
            f"client-{k}",
            1.0 + k,
            {"one": Factors(torch.randn((6, 2), generator=rng), torch.randn((2, 5), generator=rng), 1.0)},
            {},
        )
        for k in range(9)
    ]
    sums = SumSettings(FixedPoint(), masked=False, threshold=1.0)
    layout = SumLayout.of(updates[0])

    def total_of(members: Sequence[Update]) -> np.ndarray:
        adding = sums.begin(layout, len(updates))
        assert [adding.add(update, 0.5) for update in members] == [None] * len(members)
        assert adding.total is not None
        return adding.total

    regions = [[u for u, r in zip(updates, region_of, strict=True) if r == region] for region in range(5)]
    regional = [total_of(members) for members in regions if members]
    np.testing.assert_array_equal(sum(regional[1:], regional[0]), total_of(updates))


def test_the_mean_over_a_tree_is_that_over_all_to_the_rounding_of_float64() -> None:
    rng = torch.Generator().manual_seed(0)
    updates = [Update(f"client-{k:03d}", 1.0 + k % 7, {}, {"head": torch.randn(50, generator=rng)}) for k in range(60)]

    def fold(members: Sequence[Update]) -> Partial:
        partial = Partial()
        for update in members:
            partial = SUM.add_in_place(partial, update)
        return partial

    flat = fold(updates)
    tree = Partial()
    for start in range(0, 60, 7):
        tree = SUM.merge(tree, fold(updates[start : start + 7]))
    torch.testing.assert_close(tree.dense["head"], flat.dense["head"], rtol=1e-14, atol=1e-12)
    assert (tree.num_clients, tree.weight) == (flat.num_clients, flat.weight)
