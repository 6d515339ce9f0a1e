"""The numbers of a federation's clients in a checkpoint: as they were, in their order, whatever their number."""

from __future__ import annotations

import pytest
import torch

from fedspan.runs.client_numbers import number_tensors, numbers_of


@pytest.mark.parametrize("numbers", [{}, {"client-0": 0}, {"b": 3, "a": 2**40, "Z.9_-": 1}])
def test_numbers_come_back_in_their_order(numbers: dict[str, int]) -> None:
    found = numbers_of(number_tensors(numbers))
    assert list(found.items()) == list(numbers.items())
    assert all(type(x) is int for x in found.values())


def test_a_million_clients_are_tensors_and_no_text() -> None:
    """A structure in JSON would grow with the clients; two tensors hold an id's bytes and eight more for each."""
    numbers = {f"client-{k:05d}": k for k in range(20_000)}
    tensors = number_tensors(numbers)
    assert {name: x.numel() for name, x in tensors.items()} == {"ids": 20_000 * 13 - 1, "numbers": 20_000}
    assert numbers_of(tensors) == numbers


@pytest.mark.parametrize(("ids", "count"), [(b"a\nb", 1), (b"a", 2), (b"a", 0), (b"", 2)])
def test_ids_without_numbers_are_refused(ids: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="numbers of clients"):
        numbers_of({"ids": torch.tensor(list(ids), dtype=torch.uint8), "numbers": torch.arange(count)})
