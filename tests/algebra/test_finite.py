"""The test for NaN and infinity, which sums first, agrees with the test of every entry."""

from __future__ import annotations

import pytest
import torch

from fedspan.algebra.finite import is_finite

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([0.0, -1.0], True),
        ([float("nan"), 1.0], False),
        ([float("inf"), 1.0], False),
        ([float("inf"), float("-inf")], False),
    ],
)
def test_one_bad_entry_is_seen(values: list[float], finite: bool, dtype: torch.dtype) -> None:
    assert is_finite(torch.tensor(values, dtype=dtype)) is finite


def test_finite_entries_whose_sum_is_too_large_are_finite() -> None:
    assert is_finite(torch.full((3, 4), LARGEST))
    assert is_finite(torch.full((100,), 60_000.0, dtype=torch.float16))
    assert not is_finite(torch.tensor([LARGEST, LARGEST, float("nan")]))


def test_whole_numbers_are_finite() -> None:
    assert is_finite(torch.tensor([2**62, 2**62, 2**62]))
    assert is_finite(torch.tensor([True]))
