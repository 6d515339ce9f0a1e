"""The ordered map: order, errors, one core per kernel, and the same bits whatever the number of threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fedspan.support import parallel


def test_results_come_in_the_order_of_the_items() -> None:
    """The first item takes longest and still comes first; several threads were at work."""
    seen = set()

    def slow(i: int) -> int:
        seen.add(threading.get_ident())
        time.sleep(0.02 * (4 - i))
        return i * i

    with parallel.threads(3):
        assert parallel.ordered_map(slow, range(4)) == [0, 1, 4, 9]
    assert len(seen) == 3
    seen.clear()
    assert parallel.ordered_map(slow, range(4)) == [0, 1, 4, 9]
    assert seen == {threading.get_ident()}
    assert parallel.ordered_map(slow, []) == []


def test_kernels_run_on_one_core_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for number in (1, 3):
            with parallel.threads(number):
                assert parallel.ordered_map(lambda _: torch.get_num_threads(), range(6)) == [1] * 6
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit() -> None:
    draws = torch.Generator().manual_seed(0)
    items = [torch.randn(300, 40 + i, generator=draws) for i in range(9)]

    def work(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x.mT @ x)[0]

    alone = parallel.ordered_map(work, items)
    for number in (2, 3):
        with parallel.threads(number):
            assert all(map(torch.equal, parallel.ordered_map(work, items), alone))


def test_an_error_reaches_the_caller_and_the_setting_is_restored() -> None:
    def fail(i: int) -> int:
        raise ValueError(f"item {i}")

    for number in (1, 2):
        with parallel.threads(number), pytest.raises(ValueError, match="item 0"):
            parallel.ordered_map(fail, range(3))
    with pytest.raises(ValueError, match="threads = 0: expected at least 1"), parallel.threads(0):
        pass


def test_a_map_inside_a_map_stays_on_its_thread() -> None:
    def inner(_: int) -> set[int]:
        return set(parallel.ordered_map(lambda _: threading.get_ident(), range(4))) - {threading.get_ident()}

    with parallel.threads(2):
        assert parallel.ordered_map(inner, range(4)) == [set()] * 4
