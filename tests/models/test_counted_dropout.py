"""Laws of dropout by counting: masks depend on the client, the step and the place alone, and are fair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedspan.models.counted_dropout import CountedDropout, step_seeds
from fedspan.models.counted_dropout import mask as mask_of_rows


def seeds(*clients: int, step: int = 0) -> Tensor:
    return torch.tensor([step_seeds(client, step + 1)[step] for client in clients])


def mask(x: Tensor, seeds: Tensor, call: int, p: float) -> Tensor:
    """The mask of rows in their clients' own order."""
    return mask_of_rows(x, seeds, torch.arange(len(x)) % (len(x) // len(seeds)), call, p)


def test_a_row_has_its_mask_wherever_it_lies() -> None:
    numbers = torch.tensor([2, 0, 1, 3, 1, 0])
    sorted_ = mask_of_rows(torch.zeros(6, 9, 50), seeds(1, 2), numbers, 3, 0.4)
    plain = mask(torch.zeros(8, 9, 50), seeds(1, 2), 3, 0.4)
    assert torch.equal(sorted_, plain[[2, 0, 1, 7, 5, 4]])


@pytest.mark.parametrize("shape", [(4, 50), (4, 9, 50), (4, 3, 9, 9)])
def test_a_client_has_its_mask_in_every_company(shape: tuple[int, ...]) -> None:
    together = mask(torch.zeros(8, *shape[1:]), seeds(1, 2), 3, 0.4)
    alone = mask(torch.zeros(4, *shape[1:]), seeds(2), 3, 0.4)
    assert torch.equal(together[4:], alone)
    assert not torch.equal(together[:4], alone)


@pytest.mark.parametrize(("short", "long"), [((4, 9, 50), (6, 17, 50)), ((4, 3, 9, 9), (6, 3, 17, 17))])
def test_padding_changes_no_mask(short: tuple[int, ...], long: tuple[int, ...]) -> None:
    """Neither of tokens nor of rows."""
    small, large = (mask(torch.zeros(shape), seeds(7), 1, 0.5) for shape in (short, long))
    assert torch.equal(large[tuple(slice(size) for size in short)], small)


def test_every_step_and_call_has_a_mask_of_its_own() -> None:
    """Two independent masks of p = ½ agree in half of n places: |count − n/2| ≤ 5 √(n/4), n = 40,000."""
    like = torch.zeros(8, 100, 50)
    masks = [mask(like, seeds(5, step=step), call, 0.5) for step in range(3) for call in (1, 2, 3)]
    for i, x in enumerate(masks):
        for y in masks[:i]:
            assert abs(int((x == y).sum()) - 20_000) <= 5 * 100


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_fair_in_every_direction(p: float) -> None:
    """The share of dropped places in any row, token or channel is p: 5σ of n draws; kept ones are worth 1/(1 − p)."""
    drawn = mask(torch.zeros(16, 60, 80), seeds(3, 4), 2, p)
    assert set(drawn.unique().tolist()) == set(torch.tensor([0.0, 1 / (1 - p)]).tolist())
    dropped = (drawn == 0).double()
    for dims in ((0, 1), (0, 2), (1, 2), (0, 1, 2)):
        share = dropped.mean(dim=dims)
        count = dropped.numel() / max(1, share.numel())
        assert float((share - p).abs().max()) <= 5 * (p * (1 - p) / count) ** 0.5


def test_neighbours_are_independent() -> None:
    """Along every dimension the product of centred neighbours has mean 0: 5σ of n pairs at p = ½."""
    signs = (mask(torch.zeros(16, 60, 80), seeds(3, 4), 2, 0.5) > 0).double() * 2 - 1
    for dim in range(3):
        n = signs.shape[dim]
        pairs = signs.narrow(dim, 0, n - 1) * signs.narrow(dim, 1, n - 1)
        assert abs(float(pairs.mean())) <= 5 / pairs.numel() ** 0.5


def test_the_way_back_has_the_mask_of_the_way_there() -> None:
    x = torch.randn(6, 40, requires_grad=True)
    with CountedDropout(seeds(1, 2, 3)):
        first, second = (torch.nn.functional.dropout(x, 0.3) for _ in range(2))
    torch.autograd.backward(first.sum())
    assert x.grad is not None
    torch.testing.assert_close(first, x.detach() * x.grad)
    assert not torch.equal(first == 0, second == 0)
