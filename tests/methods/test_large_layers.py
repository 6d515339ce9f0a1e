"""The rules that are computed differently for many clients of a large layer: the same results, or honest estimates."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods import METHODS
from fedspan.methods.base import ServerState, aggregate
from fedspan.methods.distances import Total, measurable
from fedspan.methods.factor_weights import chosen_by_grams, inner_products
from fedspan.methods.messages import Diagnostics, Factors, Template, Update

K, M, N, R = 14, 430, 450, 16
SHARES = [(i + 1) / (K * (K + 1) / 2) for i in range(K)]


@pytest.fixture(scope="module")
def pairs() -> list[LowRank]:
    """Clients that share a part of their factors; Σ r_k = 224 is above the bound of the exact norms."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    b, a = draw(M, R), draw(R, N)
    return [LowRank(b + 0.7 * draw(M, R), a + 0.7 * draw(R, N)) for _ in range(K)]


def served(method: str, pairs: list[LowRank]) -> tuple[ServerState, Diagnostics]:
    template = Template({"layer": (M, N)}, R, alpha=float(R))
    updates = [Update(f"client-{i:02d}", i + 1.0, {"layer": Factors(x.b, x.a, 1.0)}, {}) for i, x in enumerate(pairs)]
    made = METHODS[method]()
    return aggregate(made, made.init(template, {}), updates)


def test_estimated_distances_are_unbiased_and_their_differences_exact(pairs: list[LowRank]) -> None:
    """Over n = 200 seeds the mean of ‖T − X‖² lies within 5σ of it; ‖T − X‖² − ‖T − Y‖² is exact for every seed."""
    assert not measurable(pairs)
    whole = lowrank.stack(pairs, SHARES)
    x, y = LowRank(pairs[0].b, pairs[0].a), LowRank(pairs[1].b * 0.5, pairs[1].a)
    exact = [lowrank.norm(whole) ** 2, lowrank.distance(whole, x) ** 2, lowrank.distance(whole, y) ** 2]
    found = []
    for seed in range(200):
        total = Total(pairs, SHARES, [x.a, y.a], seed)
        found.append([total.size**2, total.distance(x) ** 2, total.distance(y) ** 2])
    values = np.array(found)
    np.testing.assert_allclose(values[:, 1] - values[:, 2], exact[1] - exact[2], rtol=1e-4)
    np.testing.assert_allclose(values[:, 1] - values[:, 0], exact[1] - exact[0], rtol=1e-4)
    spread = values.std(axis=0)
    assert (abs(values.mean(axis=0) - exact) < 5 * spread / 200**0.5).all()
    assert (spread > 0).all()
    assert (spread < 0.01 * np.array(exact)).all()


@pytest.mark.parametrize("by", [-130, 0, 60])
def test_estimated_distances_scale_by_powers_of_two(pairs: list[LowRank], by: int) -> None:
    """Factors whose squares leave float32's range: the same figures, times that power, to the bit."""
    plain = Total(pairs, SHARES, [pairs[0].a], 5)
    moved = [LowRank(x.b * 2.0 ** (by // 2), x.a * 2.0 ** (by - by // 2)) for x in pairs]
    total = Total(moved, SHARES, [moved[0].a], 5)
    assert total.size == pytest.approx(plain.size * 2.0**by, rel=1e-6)
    assert total.distance(moved[0]) == pytest.approx(plain.distance(pairs[0]) * 2.0**by, rel=1e-6)


@pytest.mark.parametrize("method", ["lora_fair", "lora_fair_ridge", "flora_na", "fedex_lora"])
def test_large_layers_report_estimates_as_such(pairs: list[LowRank], method: str) -> None:
    """The record says so, and they are within a few hundredths of what is measured; those of few clients are exact."""
    state, diagnostics = served(method, pairs)
    whole = lowrank.stack(pairs, SHARES)
    if method == "fedex_lora":
        held = state.modules["layer"]
        lacking = lowrank.distance(whole, LowRank(held["b"], held["a"]))
        assert diagnostics["residual_norm_estimated"] == 1.0
        assert diagnostics["residual_norm"] == pytest.approx(lacking, rel=0.05)
    else:
        held = state.modules["layer"]
        error = lowrank.distance(whole, LowRank(held["b"], held["a"])) / lowrank.norm(whole)
        assert diagnostics["distances_estimated"] == 1.0
        assert diagnostics["ideal_distance"] == pytest.approx(error, rel=0.05)
        assert diagnostics["ideal_distance"] <= diagnostics["fedit_distance"]
    assert not any(name.endswith("estimated") for name in served(method, pairs[:4])[1])


@pytest.mark.parametrize("sweeps", [1, 10])
@pytest.mark.parametrize("twins", [False, True])
def test_weights_from_inner_products_are_those_from_bases(
    pairs: list[LowRank], sweeps: int, twins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ways to the same least squares; also where clients are equal, so that the solution is not unique."""
    chosen = [*pairs[:7], *pairs[:7]] if twins else pairs
    shares = torch.tensor(SHARES, dtype=torch.float64)
    rule = import_module("fedspan.methods.flora_na")
    monkeypatch.setattr(rule, "_GRAMS_FROM", 10**9)
    p, q = rule._chosen(chosen, shares, sweeps)
    monkeypatch.undo()
    found = rule._chosen(chosen, shares, sweeps)
    assert torch.equal(found[0], chosen_by_grams([x.b for x in chosen], [x.a.mT for x in chosen], shares, sweeps)[0])
    torch.testing.assert_close(found, (p, q), rtol=1e-9, atol=1e-10)


def test_inner_products_are_those_of_the_stack() -> None:
    """One half is multiplied, panel by panel, and stands on both sides of the diagonal."""
    rng = torch.Generator().manual_seed(0)
    factors = [torch.randn(30, 7, generator=rng) for _ in range(80)]
    stacked = torch.cat(factors, dim=1).double()
    torch.testing.assert_close(inner_products(factors), stacked.mT @ stacked, rtol=1e-12, atol=1e-12)
