"""Layers that are tall beside a few clients' stack: one shape in the same calls, the exact algebra's result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods import METHODS, spectral, tall
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Factors, Template, Update
from fedspan.methods.queries import Contribution, Sums
from fedspan.methods.spectral import Approximation, ApproximationSpec

M, N = 150, 170
WEIGHTS = (0.5, 0.3, 0.2)


def draw(rng: torch.Generator, rank: int, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(
        torch.randn(M, rank, generator=rng, dtype=torch.float64).to(dtype),
        torch.randn(rank, N, generator=rng, dtype=torch.float64).to(dtype),
    )


def sums_of(pairs: Sequence[LowRank], scalings: Sequence[float] = (1.0, 2.0, 0.5)) -> Sums:
    return Sums([Contribution(x, s) for x, s in zip(pairs, scalings, strict=False)], WEIGHTS[: len(pairs)])


def dense(pairs: Sequence[LowRank], scalings: Sequence[float] = (1.0, 2.0, 0.5)) -> np.ndarray:
    terms = zip(pairs, scalings, WEIGHTS, strict=False)
    return sum(p * s * (x.b.double() @ x.a.double()).numpy() for x, s, p in terms)


def solved(sums: Sums, spec: ApproximationSpec) -> Approximation:
    assert tall.applies(sums, (M, N), spec)
    (found,) = tall.solve([sums], spec)
    assert found is not None
    return found


def product(x: Approximation) -> np.ndarray:
    return (x.state.b.double() @ x.state.a.double()).numpy()


def oracle(pairs: Sequence[LowRank], spec: ApproximationSpec) -> np.ndarray:
    """Return U Uᵀ T in float64, from dense matrices."""
    t = dense(pairs)
    seen = t @ t.T
    if spec.basis == "projector":
        bases = [np.linalg.svd((x.b.double() @ x.a.double()).numpy())[0][:, : spec.vote or x.rank] for x in pairs]
        bases = [q[:, : x.rank] for q, x in zip(bases, pairs, strict=True)]
        seen = sum(p * q @ q.T for p, q in zip(WEIGHTS, bases, strict=False))
    values, vectors = np.linalg.eigh(seen)
    u = vectors[:, ::-1][:, : min(spec.rank, int((values > 1e-9 * values[-1]).sum()))]
    return u @ (u.T @ t)


SPECS = [
    ApproximationSpec(3, "projector"),
    ApproximationSpec(3, "energy"),
    ApproximationSpec(3, "projector", vote=1),
    ApproximationSpec(30, "projector"),
    ApproximationSpec(30, "energy"),
    ApproximationSpec(7, "projector", ordered=False),
    ApproximationSpec(max(M, N), "energy", tolerance=0.3),
]


@pytest.mark.parametrize("spec", SPECS[:6], ids=str)
@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**31), ranks=st.lists(st.integers(1, 4), min_size=2, max_size=3).filter(lambda r: sum(r) < 9)
)
def test_the_result_is_the_dense_one(spec: ApproximationSpec, seed: int, ranks: list[int]) -> None:
    """U Uᵀ T to 1e-5 against float64; U orthonormal; what is left out as measured; C ordered where it says so."""
    rng = torch.Generator().manual_seed(seed)
    pairs = [draw(rng, r) for r in ranks]
    (found,) = tall.solve([sums_of(pairs)], spec)
    if found is None:  # votes that nearly tie, which the exact algebra decides
        return
    expected, t = oracle(pairs, spec), dense(pairs)
    size = np.linalg.norm(t)
    assert np.linalg.norm(product(found) - expected) < 1e-5 * size
    u = found.state.b.double().numpy()
    np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-6)
    assert found.size_squared == pytest.approx(size**2, rel=1e-6)
    assert found.lost_squared**0.5 == pytest.approx(np.linalg.norm(t - expected), rel=1e-5, abs=1e-6 * size)
    if spec.ordered:
        gram = (found.state.a @ found.state.a.mT).double().numpy()
        np.testing.assert_allclose(gram, np.diag(gram.diagonal()), atol=1e-5 * gram.max())
        assert (np.diff(gram.diagonal()) <= 1e-5 * gram.max()).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_batch_has_the_results_of_its_modules_alone(spec: ApproximationSpec) -> None:
    """Modules share calls and nothing else: one with a client that learnt nothing does not change the others."""
    rng = torch.Generator().manual_seed(3)
    modules = [[draw(rng, 2), draw(rng, 3)] for _ in range(3)]
    modules.insert(1, [LowRank(torch.zeros(M, 2), x.a) if i == 0 else x for i, x in enumerate(modules[0])])
    together = tall.solve([sums_of(pairs) for pairs in modules], spec)
    for pairs, x in zip(modules, together, strict=True):
        (own,) = tall.solve([sums_of(pairs)], spec)
        assert (own is None) == (x is None)
        if own is not None and x is not None:
            torch.testing.assert_close((own.state.b @ own.state.a), (x.state.b @ x.state.a), rtol=1e-5, atol=1e-5)
            assert own.state.rank == x.state.rank


@pytest.mark.parametrize("basis", ["projector", "energy"])
def test_gauges_and_powers_of_two_change_nothing(basis: Literal["projector", "energy"]) -> None:
    """Every client's pair re-factored, at condition 100; and all scaled by 2^60."""
    rng = torch.Generator().manual_seed(5)
    spec = ApproximationSpec(3, basis)
    pairs = [draw(rng, 3), draw(rng, 4)]
    plain = solved(sums_of(pairs), spec)
    turned = []
    for x in pairs:
        q1, q2 = (torch.linalg.qr(torch.randn(x.rank, x.rank, generator=rng, dtype=torch.float64))[0] for _ in "ab")
        s = torch.logspace(0, 2, x.rank, dtype=torch.float64)
        g, inverse = q1 * s @ q2, q2.mT / s @ q1.mT
        turned.append(LowRank((x.b.double() @ g).float(), (inverse @ x.a.double()).float()))
    found = solved(sums_of(turned), spec)
    np.testing.assert_allclose(product(found), product(plain), atol=1e-4 * abs(product(plain)).max())
    large = solved(sums_of(pairs, [s * 2.0**60 for s in (1.0, 2.0)]), spec)
    small = solved(sums_of(pairs, (1.0, 2.0)), spec)
    assert torch.equal(large.state.b, small.state.b)
    assert torch.equal(large.state.a, small.state.a * 2.0**60)
    assert large.lost_squared == small.lost_squared * 2.0**120


@pytest.mark.parametrize("case", ["tied", "dependent", "cancelled", "deficient"])
def test_the_undecided_and_inaccurate_are_given_back(case: str) -> None:
    """Votes that tie, columns that nearly depend, terms that cancel, a rank that is lost: the exact algebra's work."""
    rng = torch.Generator().manual_seed(7)
    x, y = draw(rng, 3), draw(rng, 3)
    pairs, spec, scalings = [x, y], ApproximationSpec(3, "projector"), (1.0, 1.0)
    if case == "tied":  # one client above the server's rank
        pairs, spec = [x], ApproximationSpec(2, "projector")
    elif case == "dependent":
        b = x.b.clone()
        b[:, 1] = b[:, 0] + 1e-5 * b[:, 1]
        pairs = [LowRank(b, x.a), y]
    elif case == "cancelled":
        pairs, scalings = [x, LowRank(x.b * (0.5 / 0.3), x.a)], (1.0, -1.0)
    else:
        pairs = [LowRank(torch.cat([x.b[:, :2], x.b[:, :1]], dim=1), x.a), y]
    assert tall.solve([sums_of(pairs, scalings)], spec) == [None]


@pytest.mark.parametrize(
    ("case", "applies"),
    [("plain", True), ("float64", False), ("wide", False), ("both sides", False), ("rest", False)],
)
def test_it_applies_where_it_pays_and_is_accurate(case: str, applies: bool) -> None:
    """float32 alone leaves float64 room for squares; c up to a sixteenth of m and n; no part that clients share."""
    rng = torch.Generator().manual_seed(0)
    x = draw(rng, 10 if case == "wide" else 4, torch.float64 if case == "float64" else torch.float32)
    rest = x if case == "rest" else None
    sums = Sums([Contribution(x, 1.0, rest)], [1.0])
    spec = ApproximationSpec(2, "energy", both_sides=case == "both sides")
    assert tall.applies(sums, (M, N), spec) is applies


@pytest.mark.parametrize("method", ["glora", "flexlora"])
def test_a_server_step_is_that_of_the_exact_algebra(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps over modules of two shapes, one with votes that tie, with and without the short way."""
    rng = torch.Generator().manual_seed(9)
    shared = draw(rng, 3)
    template = Template({"a": (M, N), "b": (M, N), "tied": (M, N), "c": (40, 30)}, 3, alpha=3.0)

    def factors(name: str) -> Factors:
        x = shared if name == "tied" else draw(rng, 3)
        return Factors(x.b[: template.modules[name][0]], x.a[:, : template.modules[name][1]], 1.0)

    updates = [Update(f"client-{i}", i + 1.0, {n: factors(n) for n in template.modules}, {}) for i in range(2)]
    made = METHODS[method]()
    state, diagnostics = aggregate(made, made.init(template, {}), updates)
    monkeypatch.setattr(tall, "_TALL", 10**6)
    other, measured = aggregate(made, made.init(template, {}), updates)
    for name in template.modules:
        x, y = (LowRank(s.modules[name]["u"], s.modules[name]["c"]) for s in (state, other))
        assert x.rank == y.rank
        assert lowrank.distance(x, y) < 1e-5 * lowrank.norm(y)
    assert diagnostics["truncation_error"] == pytest.approx(measured["truncation_error"], rel=1e-4)
    assert spectral.prefers_exact((M, N), 6, 3)
