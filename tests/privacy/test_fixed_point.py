"""Fixed point: exact sums in any order, a bounded error, and nothing that could wrap."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.privacy.fixed_point import FixedPoint

BITS = st.integers(1, 62)
CLIENTS = st.integers(1, 9)


def rounded(value: float, bits: int) -> int:
    """round-half-even of 2^f·v in exact rational arithmetic."""
    return round(Fraction(value) * 2**bits)


@st.composite
def cases(draw: st.DrawFn) -> tuple[FixedPoint, list[list[float]]]:
    """A fixed point and several clients' numbers within its range, the ends of the range among them."""
    point, num_clients = FixedPoint(draw(BITS)), draw(CLIENTS)
    limit = point.limit(num_clients)
    half = 2.0 ** -(point.fraction_bits + 1)
    value = st.one_of(
        st.floats(-limit, limit, allow_subnormal=True),
        st.sampled_from([limit, -limit, 0.0, -0.0, half, -half, 3 * half, 5e-324, math.nextafter(limit, 0)]),
    ).filter(lambda v: abs(v) <= limit)
    length = draw(st.integers(1, 5))
    row = st.lists(value, min_size=length, max_size=length)
    return point, draw(st.lists(row, min_size=num_clients, max_size=num_clients))


@given(cases(), st.randoms(use_true_random=False))
def test_the_sum_is_exact_in_any_order_and_grouping(case: tuple[FixedPoint, list[list[float]]], random: object) -> None:
    point, rows = case
    words = [point.encode(torch.tensor(row, dtype=torch.float64), len(rows)) for row in rows]
    shuffled = list(words)
    random.shuffle(shuffled)
    cut = len(words) // 2
    left, right = (np.sum([np.zeros_like(words[0]), *part], axis=0, dtype=np.uint64) for part in
                   (shuffled[:cut], shuffled[cut:]))  # fmt: skip
    total = left + right
    assert np.array_equal(total, np.sum(words, axis=0, dtype=np.uint64))
    decoded = point.decode(total)
    assert decoded.dtype == torch.float64
    for column, got in enumerate(decoded.tolist()):
        exact = sum(rounded(row[column], point.fraction_bits) for row in rows)
        assert abs(exact) < 2**63
        assert got == float(Fraction(exact, 2**point.fraction_bits))  # the nearest float64; the sum itself to 53 bits


@given(cases())
def test_the_error_of_a_client_is_at_most_half_a_unit(case: tuple[FixedPoint, list[list[float]]]) -> None:
    point, rows = case
    for row in rows:
        words = point.encode(torch.tensor(row, dtype=torch.float64), len(rows))
        for value, word in zip(row, words.tolist(), strict=True):
            signed = word - 2**64 if word >= 2**63 else word
            assert signed == rounded(value, point.fraction_bits)
            error = abs(Fraction(signed, 2**point.fraction_bits) - Fraction(value))
            assert error <= Fraction(1, 2 ** (point.fraction_bits + 1))


@given(BITS, st.integers(1, 10**6))
def test_what_is_out_of_range_would_wrap_or_nearly_and_what_is_in_range_never_does(bits: int, num_clients: int) -> None:
    point = FixedPoint(bits)
    limit = point.limit(num_clients)
    for value in (limit, -limit):
        word = int(point.encode(torch.tensor([value], dtype=torch.float64), num_clients)[0])
        signed = word - 2**64 if word >= 2**63 else word
        assert abs(signed) * num_clients <= 2**63 - 1
    # The next float64 that rounds to another integer is refused, whichever sign it has, and it would wrap.
    beyond = max(math.nextafter(limit, math.inf), limit + 2.0**-bits)
    assert rounded(beyond, bits) * num_clients > 2**63 - 1
    for value in (beyond, -beyond):
        with pytest.raises(ValueError, match=f"does not fit the fixed point.*{num_clients} clients"):
            point.encode(torch.tensor([value], dtype=torch.float64), num_clients)


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_float32_is_encoded_as_the_same_numbers_in_float64(values: list[float]) -> None:
    single, double = torch.tensor(values, dtype=torch.float32), torch.tensor(values, dtype=torch.float64)
    assert np.array_equal(FixedPoint().encode(single, 4), FixedPoint().encode(double, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -(2.0**31), 2.0**31])
def test_what_has_no_place_is_refused_by_name(value: float) -> None:
    values = torch.tensor([[0.0, 1.0], [value, math.nan]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"value \S+ at 2 does not fit.*at most 2\.14748e\+09 in size"):
        FixedPoint().encode(values, 1)


def test_shape_is_flattened_and_the_values_are_left_as_they_are() -> None:
    values = torch.tensor([[1.5, -2.0], [0.25, 0.0]], requires_grad=True)
    words = FixedPoint(4).encode(values.mT, 3)
    assert words.dtype == np.uint64
    assert words.tolist() == [24, 4, 2**64 - 32, 0]
    assert values.tolist() == [[1.5, -2.0], [0.25, 0.0]]
    assert FixedPoint(4).decode(words).tolist() == [1.5, 0.25, -2.0, 0.0]
    assert FixedPoint().encode(torch.zeros(0), 2).shape == (0,)


def test_other_types_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16: expected float32 or float64"):
        FixedPoint().encode(torch.zeros(1, dtype=torch.bfloat16), 2)
    with pytest.raises(ValueError, match="num_clients = 0"):
        FixedPoint().encode(torch.zeros(1), 0)
    for bits in (0, 63):
        with pytest.raises(ValueError, match=f"fraction_bits = {bits}: expected 1 to 62"):
            FixedPoint(bits)
    for total in (np.zeros(2, np.int64), np.zeros((2, 1), np.uint64)):
        with pytest.raises(ValueError, match="expected a vector of uint64"):
            FixedPoint().decode(total)
