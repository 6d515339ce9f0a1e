"""Column spaces: bases, the consensus of several clients, angles. Projectors are compared, never basis vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.algebra import subspace
from fedspan.algebra.lowrank import LowRank

laws = settings(deadline=None, max_examples=30, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def tensor(x: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def orthonormal(rng: np.random.Generator, m: int, r: int) -> np.ndarray[Any, Any]:
    return np.linalg.qr(rng.standard_normal((m, r)))[0]


def projector(basis: np.ndarray[Any, Any] | torch.Tensor) -> np.ndarray[Any, Any]:
    q = basis.numpy() if isinstance(basis, torch.Tensor) else basis
    return q @ q.T


@laws
@given(seed=seeds, m=st.integers(4, 20), n=st.integers(4, 20), r=st.integers(1, 4), condition=st.sampled_from([1, 1e6]))
def test_a_column_basis_is_that_of_the_product(seed: int, m: int, n: int, r: int, condition: float) -> None:
    """Orthonormal, spans col(B A), and the same in any gauge, for A that has lost rank too."""
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
    a[-1] = a[0]
    g = orthonormal(rng, r, r) * np.logspace(0, -np.log10(condition), r) @ orthonormal(rng, r, r)
    basis = subspace.column_basis(LowRank(tensor(b @ g), tensor(np.linalg.solve(g, a))))
    rank = max(1, r - 1)
    assert basis.shape == (m, rank)
    left = np.linalg.svd(b @ a)[0][:, :rank]
    np.testing.assert_allclose(projector(basis), projector(left), atol=1e-14 * condition + 1e-10)


def test_a_column_basis_keeps_the_strongest_directions() -> None:
    """`max_rank` cuts the weak ones; a zero factor on either side leaves no direction at all."""
    rng = np.random.default_rng(0)
    u, v = orthonormal(rng, 9, 3), orthonormal(rng, 7, 3)
    x = LowRank(tensor(u * [1.0, 5.0, 3.0]), tensor(v.T))
    np.testing.assert_allclose(projector(subspace.column_basis(x, 2)), projector(u[:, 1:]), atol=1e-12)
    assert subspace.column_basis(LowRank(x.b, torch.zeros_like(x.a))).shape == (9, 0)
    assert subspace.column_basis(LowRank(torch.zeros_like(x.b), x.a)).shape == (9, 0)


@laws
@given(
    seed=seeds,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    max_rank=st.sampled_from([None, 1, 2]),
    conditions=st.lists(st.sampled_from([1.0, 1e2, 1e4, 1e6]), min_size=1, max_size=6),
)
def test_spans_of_many_are_the_column_bases_of_each(
    seed: int, dtype: torch.dtype, max_rank: int | None, conditions: list[float]
) -> None:
    """Any shapes and ranks at once, in any gauge, with a silent and a rank-deficient client among them."""
    rng = np.random.default_rng(seed)
    terms = []
    for k, condition in enumerate(conditions):
        m, n = rng.integers(5, 30, 2)
        r = int(rng.integers(1, 6)) if k else 3
        b, a = rng.standard_normal((m, r)), rng.standard_normal((r, n))
        g = orthonormal(rng, r, r) * np.logspace(0, -np.log10(condition), r) @ orthonormal(rng, r, r)
        terms.append(LowRank(tensor(b @ g).to(dtype), tensor(np.linalg.solve(g, a)).to(dtype)))
    terms.append(LowRank(torch.zeros_like(terms[0].b), terms[0].a))
    terms.append(LowRank(terms[0].b[:, [0, 0, 1]], terms[0].a))
    terms.append(LowRank(terms[0].b * 1e4, terms[0].a * 1e-4))
    # Of well-conditioned factors, once their columns have one length; a product of lower rank all the same.
    terms.append(LowRank(terms[0].b, terms[0].a * torch.tensor([[1.0], [1e-20], [1.0]], dtype=dtype)))
    eps = 2**-52 if dtype == torch.float64 else 2**-23
    for x, span, condition in zip(
        terms, subspace.column_spans(terms, max_rank), [*conditions, *conditions[:1] * 4], strict=True
    ):
        # The oracle: the same product in float64, directions above the rounding of its terms.
        product = x.b.double().numpy() @ x.a.double().numpy()
        u, s, _ = np.linalg.svd(product)
        size = float((x.b.double().norm(dim=0) * x.a.double().norm(dim=1)).norm())
        rank = int((s > 4 * x.rank * eps * max(s[0], size)).sum()) if x.rank and product.any() else 0
        keep = min(rank, max_rank or rank)
        q = span.basis
        assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if (0 < keep < len(s) and s[keep - 1] - s[keep] < 1e-2 * s[0]) or (condition > 1e2 and dtype != torch.float64):
            continue  # the cut, or the space itself, is not determined to the digits that there are
        assert q.shape == (x.shape[0], keep)
        np.testing.assert_allclose((q.mT @ q).numpy(), np.eye(keep), atol=1e3 * condition * eps)
        difference = projector(q.double()) - projector(u[:, :keep])
        assert np.linalg.norm(difference) < 1e4 * condition * eps


def test_well_conditioned_spans_cost_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The QR is what ill-conditioned, deficient and silent clients take, and nobody else does."""
    rng = np.random.default_rng(1)
    b, a = rng.standard_normal((40, 4)), rng.standard_normal((4, 30))
    taken = []
    basis = subspace.column_basis

    def counted(x: LowRank, max_rank: int | None = None) -> torch.Tensor:
        taken.append(x)
        return basis(x, max_rank)

    monkeypatch.setattr(subspace, "column_basis", counted)
    for dtype in (torch.float32, torch.float64):
        good = LowRank(tensor(b).to(dtype), tensor(a).to(dtype))
        skewed = LowRank(
            good.b * 10.0 ** torch.tensor([4, -4, 0, 2]), good.a * 10.0 ** -torch.tensor([[4], [-4], [0], [2]])
        )
        subspace.column_spans([good, skewed] * 3)
        assert taken == []
        bad = [LowRank(good.b[:, [0, 1, 2, 2]], good.a), LowRank(good.b, good.a * 0)]
        subspace.column_spans([good, *bad])
        assert [x.b.data_ptr() for x in taken] == [x.b.data_ptr() for x in bad]
        taken.clear()


@pytest.mark.parametrize("worst", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("max_rank", [None, 2])
def test_a_span_of_many_rows_is_that_of_float64_to_the_rounding_of_float32(worst: float, max_rank: int | None) -> None:
    """On both sides of the bounds up to which B·Z is multiplied in float32; Grams that are known change no bit."""
    rng = np.random.default_rng(2)
    terms = []
    for _ in range(3):
        turn = orthonormal(rng, 6, 6) * np.r_[np.ones(5), worst**-0.5] @ orthonormal(rng, 6, 6)
        terms.append(LowRank(tensor(rng.standard_normal((1500, 6)) @ turn).float(), torch.randn(6, 40)))
    grams = [(x.b.mT @ x.b, x.a @ x.a.mT) for x in terms]
    spans = subspace.column_spans(terms, max_rank)
    for x, span, known in zip(terms, spans, subspace.column_spans(terms, max_rank, grams), strict=True):
        product = x.b.double().numpy() @ x.a.double().numpy()
        left = np.linalg.svd(product, full_matrices=False)[0][:, : max_rank or 6]
        q = span.basis.double().numpy()
        np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=1e-5)
        assert np.linalg.norm(q - left @ (left.T @ q)) < 1e-5
        assert torch.equal(span.b, known.b)
        assert torch.equal(span.z, known.z)


@laws
@given(seed=seeds, m=st.integers(6, 20), clients=st.integers(1, 5), rank=st.integers(1, 12))
def test_consensus_is_the_top_of_the_dense_projector_sum(seed: int, m: int, clients: int, rank: int) -> None:
    """U spans the top eigenvectors of Σ p_k Q_k Q_kᵀ, and the eigenvalues are the dense ones."""
    rng = np.random.default_rng(seed)
    bases = [orthonormal(rng, m, int(rng.integers(1, 4))) for _ in range(clients)]
    weights = rng.dirichlet(np.ones(clients))
    total = sum(w * projector(q) for w, q in zip(weights, bases, strict=True))
    values, vectors = (x[..., ::-1] for x in np.linalg.eigh(total))
    u, eigenvalues = subspace.consensus([tensor(q) for q in bases], weights.tolist(), rank)
    np.testing.assert_allclose(eigenvalues.numpy(), values[: len(eigenvalues)], atol=1e-12)
    union = int((values > 1e-12).sum())
    assert u.shape[1] == min(rank, union)
    if rank >= union or values[rank - 1] - values[rank] > 1e-4:  # else the cut is not determined
        np.testing.assert_allclose(projector(u), projector(vectors[:, : u.shape[1]]), atol=1e-10)


def test_consensus_prefers_what_clients_share() -> None:
    """A direction of all clients has eigenvalue 1 and comes first, one of a single client its weight."""
    e = np.eye(6)
    bases = [tensor(e[:, [0, 1]]), tensor(e[:, [0, 2]]), tensor(e[:, [0, 3]])]
    u, eigenvalues = subspace.consensus(bases, [0.5, 0.3, 0.2], 2)
    np.testing.assert_allclose(projector(u), projector(e[:, [0, 1]]), atol=1e-12)
    np.testing.assert_allclose(eigenvalues.numpy(), [1, 0.5, 0.3, 0.2, 0, 0], atol=1e-12)


def test_consensus_of_clients_without_directions_is_empty() -> None:
    u, eigenvalues = subspace.consensus([torch.zeros(5, 0), torch.zeros(5, 0)], [0.5, 0.5], 3)
    assert u.shape == (5, 0)
    assert len(eigenvalues) == 0
    alone = subspace.consensus([torch.zeros(5, 0), torch.eye(5)[:, :2]], [0.5, 0.5], 3)[0]
    np.testing.assert_allclose(projector(alone), np.diag([1.0, 1, 0, 0, 0]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("angles", [[0.0, 0.3, 1.2], [1e-4, 0.7853, 0.7855], [1e-3, 1.5, 1.5707]])
def test_principal_angles_are_those_that_were_built_in(angles: list[float], dtype: torch.dtype) -> None:
    """Pairs of directions at known angles, in random bases of both spaces; small ones are not lost in float32."""
    rng = np.random.default_rng(4)
    frame = orthonormal(rng, 12, 7)
    u, away = frame[:, :3], frame[:, 3:6]
    v = u * np.cos(angles) + away * np.sin(angles)
    first, second = (tensor(x @ orthonormal(rng, 3, 3)).to(dtype) for x in (u, v))
    found = subspace.principal_angles(first, second)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(found.numpy(), angles, atol=tolerance)
    np.testing.assert_allclose(subspace.principal_angles(second, first).numpy(), angles, atol=tolerance)
    # Against a larger space that contains u, or is orthogonal to it.
    larger = tensor(np.hstack([u, frame[:, 6:]])).to(dtype)
    np.testing.assert_allclose(subspace.principal_angles(first, larger).numpy(), 0, atol=tolerance)
    np.testing.assert_allclose(
        subspace.principal_angles(tensor(away).to(dtype), larger).numpy(), np.pi / 2, atol=tolerance
    )
