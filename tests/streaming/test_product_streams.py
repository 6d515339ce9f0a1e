"""FLoRA and FedEx-LoRA as streams: the factors while they are smaller than the matrix, then the matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from methods.federations import array, assert_same, build, encoded, served

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import METHODS
from fedspan.methods.base import ServerState
from fedspan.methods.messages import Update
from fedspan.methods.patches import patch_dense
from fedspan.methods.products import add_products, product_of
from fedspan.streaming import Tree, aggregate_passes, aggregate_stream, merge, sum_pass

NAMES = ["flora", "fedex_lora"]


def patches(state: ServerState) -> dict[str, np.ndarray]:
    assert state.patches is not None
    return {name: array(patch_dense(patch)) for name, patch in state.patches.total.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_small_stream_has_the_bits_of_memory(name: str) -> None:
    """While c(m+n) < mn nothing is added up, so nothing is rounded: the same patch, for any blocks and tree."""
    fed = build(METHODS[name](), 1, shapes=[(60, 70)], ranks=(2, 2, 2, 2), counts=(5, 1, 3, 1))
    updates = encoded(fed)
    expected, measured = served(fed)
    for source, block in ((updates, 1), (updates, 3), (Tree([updates[:1], updates[1:]]), 2)):
        state, diagnostics = aggregate_stream(fed.method, fed.state, source, block=block)
        patch, wanted = state.patches.total["layer0"], expected.patches.total["layer0"]
        assert isinstance(patch, LowRank)
        assert torch.equal(patch.b, wanted.b)
        assert torch.equal(patch.a, wanted.a)
        assert diagnostics == measured


@pytest.mark.parametrize("name", NAMES)
def test_a_large_stream_holds_the_matrix_and_no_more(name: str) -> None:
    """Above, the sum is the matrix in float64, merged as it is; the result is that of memory to rounding."""
    fed = build(METHODS[name](), 2, shapes=[(9, 11)], ranks=(2,) * 7, counts=(5, 1, 3, 1, 2, 2, 4))
    updates = encoded(fed)
    parts = [sum_pass(fed.method, fed.state, some) for some in (updates[:4], updates[4:])]
    total = merge(*parts).product_sums["layer0"]
    assert {n: tuple(x.shape) for n, x in total.items()} == {"w": (9, 11), "like": (0,)}
    state, diagnostics = aggregate_passes(fed.method, fed.state, lambda queries, heads: merge(*parts))
    expected, measured = served(fed)
    assert_same(patches(state), patches(expected), 1e-12)
    assert diagnostics == pytest.approx(measured)


def test_a_single_client_leaves_no_residual() -> None:
    fed = build(METHODS["fedex_lora"](), 0, shapes=[(3, 4)], ranks=(2,), counts=(7,))
    state, diagnostics = aggregate_stream(fed.method, fed.state, encoded(fed))
    assert diagnostics == {"residual_norm": 0.0}
    assert state.patches.version == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_resumes_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Killed after any block, in either form of the sum."""
    fed = build(METHODS[name](), 3, shapes=[(9, 11), (60, 70)], ranks=(2,) * 5, counts=(5, 1, 3, 1, 2))
    updates = encoded(fed)
    expected, _ = aggregate_stream(fed.method, fed.state, updates, block=1)

    class Killed(Exception):
        pass

    for stop in (2, 4):
        path = tmp_path / f"{stop}.safetensors"

        def kill(progress: object, stop: int = stop) -> None:
            if progress.num_clients > stop:
                raise Killed

        options = {"block": 1, "checkpoint": path, "checkpoint_seconds": 0}
        with pytest.raises(Killed):
            aggregate_stream(fed.method, fed.state, updates, on_progress=kill, **options)
        state, _ = aggregate_stream(fed.method, fed.state, updates, **options)
        for module, patch in patches(expected).items():
            assert (patches(state)[module] == patch).all()


def test_a_wrapper_that_changes_the_rule_does_not_stream_the_old_one() -> None:
    """`product_sums` is a second form of one `finish`: under another it is not used."""
    fed = build(METHODS["flora"](), 0, ranks=(2, 2), counts=(1, 1))
    other = replace(fed.method, finish=lambda state, partial: fed.method.finish(state, partial))
    with pytest.raises(ValueError, match="needs all updates at once"):
        aggregate_stream(other, fed.state, encoded(fed))


def test_a_sum_of_many_equal_products_is_accurate() -> None:
    """20,000 equal float32 updates: the mean is one of them to 1e-6, where a float32 sum would be off by more."""
    rng = torch.Generator().manual_seed(0)
    x = LowRank(torch.randn(3, 2, generator=rng), torch.randn(2, 4, generator=rng))
    update = Update("c", 3.0, {}, {})
    total = product_of(x, update.num_examples)
    one = product_of(x, 3.0)
    for _ in range(14):
        total = add_products(total, total)
    for _ in range(3000):
        total = add_products(total, one)
    mean = total["w"] / (3.0 * (2**14 + 3000))
    torch.testing.assert_close(mean, x.b.double() @ x.a.double(), rtol=1e-6, atol=1e-6)
