"""Laws of partitions and ranks."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspan.data.partition import PRESETS, by_field, dirichlet, draw_ranks, iid, preset, rows_by_number

seeds = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def check_cover(parts: list[np.ndarray], num_clients: int, num_examples: int) -> None:
    """One sorted index array per client, each example in exactly one of them."""
    assert len(parts) == num_clients
    for part in parts:
        assert part.dtype.kind == "i"
        assert np.array_equal(part, np.sort(part))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


def check_equal(left: list[np.ndarray], right: list[np.ndarray]) -> None:
    for one, other in zip(left, right, strict=True):
        assert np.array_equal(one, other)


@given(st.integers(1, 200), st.data(), seeds)
def test_iid_is_an_even_disjoint_cover_fixed_by_the_generator(
    num_examples: int, data: st.DataObject, seed: int
) -> None:
    num_clients = data.draw(st.integers(1, num_examples))
    parts = iid(num_examples, num_clients, rng(seed))
    check_cover(parts, num_clients, num_examples)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    check_equal(parts, iid(num_examples, num_clients, rng(seed)))


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=120),
    st.data(),
    st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    seeds,
)
def test_dirichlet_is_a_disjoint_cover_fixed_by_the_generator(
    labels: list[int], data: st.DataObject, alpha: float, seed: int
) -> None:
    num_clients = data.draw(st.integers(1, len(labels)))
    parts = dirichlet(labels, num_clients, alpha, rng(seed))
    check_cover(parts, num_clients, len(labels))
    check_equal(parts, dirichlet(labels, num_clients, alpha, rng(seed)))


def skew(alpha: float, seed: int) -> float:
    """Mean total-variation distance of a client's label mix from the global one, over clients with data."""
    labels = np.repeat(np.arange(5), 200)
    mixes = [
        np.bincount(labels[part], minlength=5) / len(part)
        for part in dirichlet(labels, 10, alpha, rng(seed))
        if len(part)
    ]
    return float(np.mean([np.abs(mix - 0.2).sum() / 2 for mix in mixes]))


def test_dirichlet_skew_falls_with_alpha() -> None:
    """Means of 20 seeds; their standard errors are below 0.01, the gaps asked for are 0.1."""
    skews = [np.mean([skew(alpha, seed) for seed in range(20)]) for alpha in (0.05, 0.5, 5.0, 500.0)]
    assert all(high - low > 0.1 for high, low in pairwise(skews)), skews
    assert skews[0] > 0.6
    assert skews[-1] < 0.05


def test_dirichlet_does_not_favour_a_client() -> None:
    """Expected sizes are equal: over 400 seeds each client's mean lies within 5 standard errors."""
    sizes = np.array([[len(part) for part in dirichlet([0, 1] * 20, 4, 0.5, rng(seed))] for seed in range(400)])
    errors = sizes.std(axis=0) / np.sqrt(len(sizes))
    assert np.all(np.abs(sizes.mean(axis=0) - 10) < 5 * errors)


def test_which_examples_of_a_class_a_client_gets_is_random() -> None:
    """A client's share of one class is no run of neighbours (files are often ordered), and varies by seed."""
    drawn = [dirichlet([0] * 40, 2, 100.0, rng(seed))[0] for seed in range(5)]
    assert all(part[-1] - part[0] + 1 > len(part) for part in drawn)
    assert len({tuple(part.tolist()) for part in drawn}) == 5


fields = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=80)


@given(fields, st.data(), seeds)
def test_by_field_covers_and_never_mixes_more_than_it_must(values: list[str], data: st.DataObject, seed: int) -> None:
    """With fewer values than clients every client has a single value; otherwise values stay whole."""
    num_clients = data.draw(st.integers(1, len(values)))
    parts = by_field(values, num_clients, rng(seed))
    check_cover(parts, num_clients, len(values))
    check_equal(parts, by_field(values, num_clients, rng(seed)))
    held = [{values[i] for i in part} for part in parts]
    assert all(len(part) for part in parts)
    if len(set(values)) <= num_clients:
        assert all(len(names) == 1 for names in held)
    else:
        assert sum(map(len, held)) == len(set(values))


def test_by_field_gives_the_ith_value_to_the_ith_client() -> None:
    parts = by_field(["b", "a", "c", "a"], 3, rng())
    assert [part.tolist() for part in parts] == [[1, 3], [0], [2]]


@given(st.lists(st.integers(-1, 6), max_size=40), st.integers(0, 5))
def test_rows_by_number_are_those_that_have_it(numbers: list[int], count: int) -> None:
    array = np.array(numbers, dtype=np.int32)
    check_equal(rows_by_number(array, count), [np.flatnonzero(array == number) for number in range(count)])


def naive_by_field(values: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The definition as it reads: a look at every row for each value, and at every value or client for each choice."""
    groups = [np.flatnonzero(values == value) for value in np.unique(values)]
    sizes = np.array([len(group) for group in groups])
    if len(groups) > num_clients:
        loads = np.zeros(num_clients, dtype=np.int64)
        held: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        for group in sorted(rng.permutation(len(groups)).tolist(), key=lambda group: -sizes[group]):
            client = int(np.argmin(loads))
            held[client].append(groups[group])
            loads[client] += sizes[group]
        return [np.sort(np.concatenate(part)) for part in held]
    counts = np.ones(len(groups), dtype=np.int64)
    for _ in range(num_clients - len(groups)):
        counts[np.argmax(sizes / counts)] += 1
    if len(groups) == num_clients:
        return groups
    parts = [np.array_split(rng.permutation(group), count) for group, count in zip(groups, counts, strict=True)]
    return [np.sort(part) for group in parts for part in group]


@given(fields, st.data(), seeds)
def test_by_field_is_its_definition(values: list[str], data: st.DataObject, seed: int) -> None:
    num_clients = data.draw(st.integers(1, len(values)))
    check_equal(by_field(values, num_clients, rng(seed)), naive_by_field(np.array(values), num_clients, rng(seed)))


@pytest.mark.parametrize("num_clients", [20_000, 10_000, 30_000])
def test_by_field_costs_what_sorting_costs(num_clients: int) -> None:
    """A look at every row for each of 20,000 values takes 5 seconds of a core, of 200,000 minutes."""
    values = [f"site-{i * 7919 % 20_000}" for i in range(30_000)]
    begin = time.process_time()
    parts = by_field(values, num_clients, rng())
    assert time.process_time() - begin < 2
    check_cover(parts, num_clients, len(values))


def test_by_field_groups_values_evenly() -> None:
    """Sizes 6, 5, 4, 3, 2 on two clients: largest first gives 6+3+2 and 5+4."""
    values = [name for name, count in zip("abcde", (6, 5, 4, 3, 2), strict=True) for _ in range(count)]
    parts = by_field(values, 2, rng(1))
    assert sorted(map(len, parts)) == [9, 11]


def test_by_field_splits_the_larger_value_over_more_clients() -> None:
    values = ["big"] * 60 + ["small"] * 20
    parts = by_field(values, 4, rng())
    assert [({values[i] for i in part}, len(part)) for part in parts] == [
        ({"big"}, 20),
        ({"big"}, 20),
        ({"big"}, 20),
        ({"small"}, 20),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: iid(3, 4, rng()),
        lambda: dirichlet([0, 1, 0], 4, 0.5, rng()),
        lambda: by_field(["a", "b", "a"], 4, rng()),
    ],
)
def test_more_clients_than_examples_is_an_error(make) -> None:
    with pytest.raises(ValueError, match=r"4 clients for 3 examples"):
        make()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_dirichlet_needs_a_positive_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha ="):
        dirichlet([0, 1], 2, alpha, rng())


DOLLY = Counter[str]()
for _client in PRESETS["dolly-ftg-2"]:
    DOLLY.update(_client)


def dolly_values(scale: float = 1.0, extra: int = 0) -> list[str]:
    values = [name for name, count in DOLLY.items() for _ in range(max(1, int(count * scale)) + extra)]
    return [str(value) for value in rng(7).permutation(values)]


@pytest.mark.parametrize("extra", [0, 3])
def test_the_dolly_preset_has_the_published_counts(extra: int) -> None:
    """With all rows at hand, four clients of 3752; rows beyond the published counts are left out."""
    values = dolly_values(extra=extra)
    parts = preset("dolly-ftg-2", values, rng())
    assert [len(part) for part in parts] == [3752] * 4
    for part, counts in zip(parts, PRESETS["dolly-ftg-2"], strict=True):
        assert Counter(values[i] for i in part) == dict(counts)
    assert len(np.unique(np.concatenate(parts))) == 4 * 3752


def test_the_dolly_preset_scales_with_the_rows_at_hand() -> None:
    """With a tenth of the rows, all are used and each count is within one of its tenth."""
    values = [*dolly_values(scale=0.1), "poetry"]
    parts = preset("dolly-ftg-2", values, rng())
    used = np.sort(np.concatenate(parts))
    assert np.array_equal(used, np.flatnonzero(np.array(values) != "poetry"))
    have = Counter(values)
    for part, counts in zip(parts, PRESETS["dolly-ftg-2"], strict=True):
        found = Counter(values[i] for i in part)
        for name, count in counts.items():
            assert abs(found[name] - count * have[name] / DOLLY[name]) < 1
    check_equal(parts, preset("dolly-ftg-2", values, rng()))


def test_a_missing_category_or_preset_is_named() -> None:
    values = [value for value in dolly_values(0.01) if value != "summarization"]
    with pytest.raises(ValueError, match="summarization"):
        preset("dolly-ftg-2", values, rng())
    with pytest.raises(ValueError, match=r"unknown preset 'dolly'.*dolly-ftg-2"):
        preset("dolly", values, rng())


def test_ranks_from_a_number_and_from_a_list() -> None:
    assert draw_ranks(8, (2, 4), 3, rng()) == (8, 8, 8)
    assert draw_ranks((2, 4, 16), (), 3, rng()) == (2, 4, 16)
    with pytest.raises(ValueError, match=r"2 ranks for 3 clients"):
        draw_ranks([2, 4], (), 3, rng())


@pytest.mark.parametrize(
    ("spec", "values", "message"),
    [
        (0, (2,), "rank 0"),
        ((4, -1), (2,), "rank -1"),
        ("uniform", (), "rank_values"),
        ("uniform", (0, 2), "rank_values holds 0"),
        ("zipf", (2, 4), "heavy_tail"),
    ],
)
def test_bad_ranks_are_named(spec, values, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_ranks(spec, values, 2, rng())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("normal", [0.13447, 0.36553, 0.36553, 0.13447]),  # exp(-1.5²/2) against exp(-0.5²/2)
        ("heavy_tail", [144 / 205, 36 / 205, 16 / 205, 9 / 205]),
    ],
)
def test_rank_distributions(spec: str, expected: list[float]) -> None:
    """Shares of 20,000 draws lie within 5 standard deviations (0.018); ranks may be given in any order."""
    num = 20_000
    drawn = Counter(draw_ranks(spec, (16, 4, 2, 8), num, rng(3)))
    shares = [drawn[rank] / num for rank in (2, 4, 8, 16)]
    np.testing.assert_allclose(shares, expected, atol=0.018)
    assert draw_ranks(spec, (2, 4), 50, rng(3)) == draw_ranks(spec, (4, 2), 50, rng(3))
