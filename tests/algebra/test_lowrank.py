"""The algebra of B·A pairs against dense float64 matrices. Products and singular values are compared, never factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank

laws = settings(deadline=None, max_examples=40, derandomize=True)
size = st.integers(1, 25)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
dtypes = st.sampled_from(list(TOLERANCE))


@st.composite
def pairs(draw: st.DrawFn, dtype: torch.dtype | None = None, **fixed: int) -> LowRank:
    m, n, r = (fixed.get(k) or draw(size) for k in "mnr")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = dtype or draw(dtypes)
    return gaussian(rng, m, n, r, kind)


def gaussian(rng: np.random.Generator, m: int, n: int, r: int, dtype: torch.dtype = torch.float64) -> LowRank:
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    return LowRank(torch.from_numpy(b).to(dtype), torch.from_numpy(a).to(dtype))


def dense(x: LowRank) -> np.ndarray[Any, Any]:
    return x.b.double().numpy() @ x.a.double().numpy()


def close(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], tolerance: float, scale: float = 0.0) -> None:
    error, allowed = np.linalg.norm(actual - expected), tolerance * max(np.linalg.norm(expected), scale)
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


@laws
@given(x=pairs())
def test_svd_is_the_dense_one(x: LowRank) -> None:
    """U diag(σ) Vᵀ = B·A, σ the dense singular values, U and V orthonormal to 10·√c·eps."""
    f = lowrank.svd(x)
    q = len(f.s)
    m, n = x.shape
    assert q == min(m, n, x.rank)
    close((f.u * f.s @ f.vh).double().numpy(), dense(x), TOLERANCE[x.b.dtype])
    close(f.s.double().numpy(), np.linalg.svd(dense(x), compute_uv=False)[:q], TOLERANCE[x.b.dtype])
    for basis in (f.u, f.vh.mT):
        gap = torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(q, dtype=basis.dtype))
        assert float(gap) <= 10 * q**0.5 * torch.finfo(basis.dtype).eps
    q_b, k, q_a = lowrank.core(x)
    close((q_b @ k @ q_a.mT).double().numpy(), dense(x), TOLERANCE[x.b.dtype])
    assert k.shape == (min(m, x.rank), min(n, x.rank))


@laws
@given(x=pairs(), layers=st.integers(1, 3), rank=size)
def test_left_coordinates_keep_everything_on_the_left(x: LowRank, layers: int, rank: int) -> None:
    """Y Yᵀ = B A Aᵀ Bᵀ for a batch of layers, Y no larger than the factors; its singular vectors are those of B A."""
    b, a = (torch.stack([t * (j + 1) for j in range(layers)]) for t in (x.b, x.a))
    y = lowrank.left_coordinates(b, a)
    (m, n), c = x.shape, x.rank
    assert y.shape == (layers, m, c if c < min(m, n) else n)
    assert y[0].numel() <= c * (m + n)
    u, s = lowrank.left_singular(y, rank)
    q = min(y.shape[1:])
    assert u.shape == (layers, m, min(rank, q))
    eps = torch.finfo(b.dtype).eps
    for j in range(layers):
        whole = dense(x) * (j + 1) ** 2
        wide = y[j].double().numpy()
        close(wide @ wide.T, whole @ whole.T, 10 * TOLERANCE[b.dtype])
        expected = np.linalg.svd(whole, compute_uv=False)[:q]
        close(s[j].double().numpy()[: len(expected)], expected, TOLERANCE[b.dtype])
        basis = u[j].double().numpy()
        close(basis.T @ basis, np.eye(basis.shape[1]), 10 * eps * basis.shape[1] ** 0.5)
        lost = np.linalg.norm(whole - basis @ (basis.T @ whole))
        tail = np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[rank:])
        assert lost == pytest.approx(tail, abs=100 * eps * np.linalg.norm(whole))


@laws
@given(x=pairs(torch.float64), rank=st.integers(0, 25))
def test_truncation_loses_the_tail_and_nothing_else(x: LowRank, rank: int) -> None:
    """Eckart and Young: the distance to the best rank-r approximation is (Σ_{j>r} σ_j²)^½."""
    best = lowrank.truncate(x, rank)
    s = np.linalg.svd(dense(x), compute_uv=False)
    assert best.rank <= rank
    error = np.linalg.norm(dense(best) - dense(x))
    assert error == pytest.approx(np.linalg.norm(s[rank:]), rel=1e-9, abs=1e-12 * s[0])


@laws
@given(x=pairs(), rank=size, weight=st.sampled_from([-3.0, -1.0, 0.0, 0.3, 10.0]))
def test_linear_operations_are_the_dense_ones(x: LowRank, rank: int, weight: float) -> None:
    """stack, scaled, norm, inner and distance."""
    y = gaussian(np.random.default_rng(rank), *x.shape, rank, x.b.dtype)
    tolerance = TOLERANCE[x.b.dtype]
    both = lowrank.stack([x, y], [1.0, weight])
    assert both.rank == x.rank + y.rank
    scale = float(np.linalg.norm(dense(x)) + (1 + abs(weight)) * np.linalg.norm(dense(y)))
    close(dense(both), dense(x) + weight * dense(y), tolerance, scale)
    close(dense(lowrank.stack([x, y])), dense(x) + dense(y), tolerance, scale)
    close(dense(lowrank.scaled(x, weight)), weight * dense(x), tolerance)
    assert lowrank.norm(x) == pytest.approx(np.linalg.norm(dense(x)), rel=tolerance)
    assert lowrank.distance(x, y) == pytest.approx(np.linalg.norm(dense(x) - dense(y)), abs=tolerance * scale)
    bound = float(np.linalg.norm(dense(x)) * np.linalg.norm(dense(y)))
    assert lowrank.inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), abs=10 * tolerance * bound)
    assert lowrank.term_size(x) == pytest.approx(
        (sum(np.linalg.norm(np.outer(x.b[:, j], x.a[j])) ** 2 for j in range(x.rank))) ** 0.5, rel=tolerance
    )


@laws
@given(x=pairs(torch.float32, m=12, n=9), power=st.integers(-8, 8))
def test_factors_of_wildly_different_scale_lose_nothing(x: LowRank, power: int) -> None:
    """B·10^p with A·10^-p, and each column at its own scale: singular values stay exact (Grams would not)."""
    scale = 10.0 ** (power * torch.linspace(-1, 1, x.rank)) if x.rank > 1 else torch.tensor([10.0**power])
    skewed = LowRank(x.b * scale, x.a / scale[:, None])
    close(lowrank.svd(skewed).s.double().numpy(), lowrank.svd(x).s.double().numpy(), 1e-5)
    assert lowrank.norm(skewed) == pytest.approx(lowrank.norm(x), rel=1e-5)


def test_a_small_difference_is_not_lost_and_never_negative() -> None:
    """‖X − (1+1e-5)X‖ in float32 to 1 %: through ‖X‖² − 2⟨X,Y⟩ + ‖Y‖² it would be noise of either sign."""
    x = gaussian(np.random.default_rng(0), 200, 100, 8, torch.float32)
    assert lowrank.distance(x, LowRank(x.b * (1 + 1e-5), x.a)) == pytest.approx(1e-5 * lowrank.norm(x), rel=0.02)
    assert 0 <= lowrank.distance(x, x) < 1e-6 * lowrank.norm(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted_and_full_precision_kept(dtype: torch.dtype) -> None:
    """Sums of half-precision factors are float32 and exact for what the factors hold; float64 stays float64."""
    x = gaussian(np.random.default_rng(1), 30, 20, 6, dtype)
    for result in (lowrank.stack([x] * 3, [1 / 3] * 3), lowrank.scaled(x, 1 / 3), lowrank.truncate(x, 6)):
        assert result.b.dtype == result.a.dtype == torch.float32
    close(dense(lowrank.stack([x] * 3, [0.1] * 3)), 0.3 * dense(x), 1e-6)
    assert lowrank.norm(x) == pytest.approx(np.linalg.norm(dense(x)), rel=1e-6)
    assert lowrank.svd(gaussian(np.random.default_rng(1), 3, 2, 1)).s.dtype == torch.float64


@laws
@given(
    shape=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    rank=st.integers(1, 8),
    copies=st.integers(1, 4),
    condition=st.sampled_from([1.0, 1e3, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_numerical_rank_sees_through_copies_and_gauges(
    shape: tuple[int, int], rank: int, copies: int, condition: float, seed: int
) -> None:
    """`copies` equal updates in an ill-conditioned gauge have the rank of one: rounding is not taken for directions."""
    rng = np.random.default_rng(seed)
    x = gaussian(rng, *shape, rank)
    b, a = np.hstack([x.b.numpy()] * copies), np.vstack([x.a.numpy()] * copies)
    left, right = (np.linalg.qr(rng.standard_normal((rank * copies,) * 2))[0] for _ in range(2))
    g = left * np.logspace(0, -np.log10(condition), rank * copies) @ right
    skewed = LowRank(torch.from_numpy(b @ g), torch.from_numpy(np.linalg.solve(g, a)))
    assert lowrank.numerical_rank(lowrank.svd(skewed).s, lowrank.term_size(skewed)) == rank


def test_numerical_rank_keeps_weak_directions() -> None:
    """A direction at 1e-10 of the largest (float32: 1e-4) is real; zeros and nothing have rank 0."""
    for weakest, dtype in ((1e-10, torch.float64), (1e-4, torch.float32)):
        x = gaussian(np.random.default_rng(2), 20, 15, 3, dtype)
        f = lowrank.svd(x)
        weak = LowRank(f.u * torch.tensor([1.0, 0.5, weakest], dtype=dtype), f.vh)
        assert lowrank.numerical_rank(lowrank.svd(weak).s, lowrank.term_size(weak)) == 3
    assert lowrank.numerical_rank(torch.zeros(4)) == 0
    assert lowrank.numerical_rank(torch.zeros(0)) == 0


def test_the_zero_matrix_has_rank_zero_and_takes_part_in_everything() -> None:
    x, zero = gaussian(np.random.default_rng(3), 6, 4, 2), lowrank.zeros(6, 4)
    assert zero.shape == (6, 4)
    assert zero.rank == 0
    assert lowrank.norm(zero) == 0
    assert len(lowrank.svd(zero).s) == 0
    assert lowrank.truncate(zero, 3).shape == (6, 4)
    close(dense(lowrank.stack([zero, x])), dense(x), 0)
    assert lowrank.zeros(6, 4, like=x.b).b.dtype == torch.float64


def test_mismatched_factors_are_named() -> None:
    b, a = torch.zeros(4, 2), torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(3, 5\): expected \(m, r\) and \(r, n\)"):
        LowRank(b, a)
    with pytest.raises(ValueError, match="expected"):
        LowRank(torch.zeros(4), a)
    with pytest.raises(ValueError, match="at least one term"):
        lowrank.stack([])
    with pytest.raises(ValueError, match=r"different shapes \[\(4, 5\), \(5, 4\)\]"):
        lowrank.stack([lowrank.zeros(5, 4), lowrank.zeros(4, 5)])


@pytest.mark.parametrize(("i", "j"), [(0, 30), (40, 0), (-60, 20)])
def test_inner_products_of_any_size_are_those_of_ordinary_ones(i: int, j: int) -> None:
    """Powers of two come out as they went in, to the bit."""
    rng = torch.Generator().manual_seed(0)
    x, y = (LowRank(torch.randn(9, 3, generator=rng), torch.randn(3, 7, generator=rng)) for _ in range(2))
    far = lowrank.inner(LowRank(x.b * 2.0**i, x.a), LowRank(y.b, y.a * 2.0**j))
    assert far == lowrank.inner(x, y) * 2.0 ** (i + j)
    assert far == pytest.approx(float((x.dense() * y.dense()).sum()) * 2.0 ** (i + j), rel=1e-4)
