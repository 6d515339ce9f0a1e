"""Scale: factors far from 1, powers of two, directions of size zero. No NaN leaves a server, and no digit is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import CASES, Case, Federation, array, assert_same, build, received, served
from test_laws import GAUGED, by_id, various

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import create, glora
from fedspan.methods.messages import Factors, Request
from fedspan.methods.readout import leading_adapter

CHOSEN = [case for case in CASES if case.id.startswith("glora") or case.id in ("flexlora", "raflora", "flora")]
KEPT = [case for case in GAUGED if case.info.gauge_invariant and case.id != "fedex_lora"]
"""FedEx-LoRA averages factors as they are, so its adapter (not its update) follows each client's scale."""


def scaled_factors(fed: Federation, left: Callable[[int], float], right: Callable[[int], float]) -> Federation:
    """Every client's B and A times factors of its own, in float32."""
    updates = []
    for k, update in enumerate(fed.updates):
        modules = {}
        for name in update.modules:
            f = update.factors(name)
            modules[name] = Factors((f.b.double() * left(k)).float(), (f.a.double() * right(k)).float(), f.scaling)
        updates.append(replace(update, modules=modules))
    return replace(fed, updates=tuple(updates))


def readouts(fed: Federation) -> list[torch.Tensor]:
    """Everything that clients of several ranks receive after the round: the products of the adapters, and patches."""
    state, found = served(fed)[0], []
    for rank in (None, 1, 2) if fed.method.info.hetero_rank else (None,):
        sent = fed.method.broadcast(state, Request(rank))
        found += [f.scaling * (f.b @ f.a) for f in sent.adapter.values()]
        found += [p.dense() if isinstance(p, LowRank) else p for p in sent.patch.values()]
    return found


@by_id(KEPT)
@pytest.mark.parametrize("spread", [1, 11, 13, 40, 100, 115])
def test_powers_of_two_between_the_factors_change_no_bit(case: Case, spread: int) -> None:
    """B·2^k with A·2^−k for a k of each client's own, up to what float32 holds: the same bits at every rank."""
    kept = 4 if case.info.hetero_rank else None
    fed = build(case, 3, ranks=various(case), counts=(1, 5, 2), dtype=torch.float32, server_rank=kept)
    fed = scaled_factors(fed, lambda k: 1.0, lambda k: 1.0)
    powers = (spread, -spread, spread // 2)
    other = scaled_factors(fed, lambda k: 2.0 ** powers[k], lambda k: 2.0 ** -powers[k])
    found = readouts(other)
    assert all(bool(x.isfinite().all()) for x in found)
    assert any(bool(x.any()) for x in found)
    for mine, theirs in zip(readouts(fed), found, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0)


@by_id([case for case in GAUGED if case.id == "fedex_lora"])
def test_a_common_power_of_two_changes_no_bit_of_fedex(case: Case) -> None:
    fed = build(case, 3, ranks=(3, 3, 3), counts=(1, 5, 2), dtype=torch.float32)
    for power in (20, -60, 90):
        other = scaled_factors(fed, lambda k, p=power: 2.0**p, lambda k, p=power: 2.0**-p)
        for mine, theirs in zip(readouts(fed), readouts(other), strict=True):
            torch.testing.assert_close(theirs, mine, rtol=0, atol=0)
        assert_same(received(other, served(other)[0]), fed.ideal, 4e-5)


@by_id(CHOSEN)
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1e-24, 1.0),
        (1.0, 1e-24),
        (1e-39, 1.0),
        (1e-24, 1e-10),
        (1e19, 1e-19),
        (1e-19, 1e19),
        (1e30, 1e-35),
        (1e18, 1.0),
    ],
)
def test_factors_far_from_one_are_served_as_others_are(case: Case, left: float, right: float) -> None:
    """Where norms underflow in float32, reciprocals overflow, or squares of B do: the method's own result, scaled."""
    fed = build(case, 5, ranks=various(case), counts=(1, 5, 2), dtype=torch.float32, server_rank=9)
    far = scaled_factors(fed, lambda k: left, lambda k: right)
    state = served(far)[0]
    found = received(far, state)
    wanted = {name: x * left * right for name, x in received(fed, served(fed)[0]).items()}
    assert all(np.isfinite(x).all() and x.any() for x in found.values())
    # Below 1e-38 float32 has fewer digits than seven.
    size = max(float(np.linalg.norm(x)) for x in wanted.values())
    denormal = 1e-45 * 1e3 / size
    assert_same(found, wanted, 1e-5 + denormal + (1e-4 if left == 1e-39 else 0.0))
    for rank in (1, 2):
        sent = far.method.broadcast(state, Request(rank))
        assert all(bool(t.isfinite().all()) for f in sent.adapter.values() for t in (f.a, f.b))


@by_id(CHOSEN)
def test_factors_whose_product_vanishes_are_no_update(case: Case) -> None:
    """1e-30 times 1e-30 is zero in float32: the next adapter is finite, and can learn."""
    fed = build(case, 5, ranks=various(case), counts=(1, 5, 2), dtype=torch.float32, server_rank=9)
    far = scaled_factors(fed, lambda k: 1e-30, lambda k: 1e-30)
    state = served(far)[0]
    assert all(not np.any(x) or np.abs(x).max() < 1e-38 for x in received(far, state).values())
    for f in far.method.broadcast(state, Request(3)).adapter.values():
        assert bool(f.a.isfinite().all() and f.b.isfinite().all() and f.a.any(dim=1).all())


@pytest.mark.parametrize("options", [{"basis": "energy"}, {}, {"start": "split"}, {"algebra": "randomized"}], ids=str)
def test_one_client_far_smaller_than_the_rest_is_heard_as_far_as_float32_goes(options: dict[str, Any]) -> None:
    """1e-20 beside 1: the mean is the larger client's; the subspace of either is finite."""
    fed = build(glora(server_rank=8, **options), 5, ranks=(3, 3), counts=(1, 1), dtype=torch.float32)
    far = scaled_factors(fed, lambda k: 1.0 if k else 1e-20, lambda k: 1.0 if k else 1e-15)
    assert_same(received(far, served(far)[0]), far.ideal, 1e-5)


@pytest.mark.parametrize("balance", ["init", "even", "root"])
@pytest.mark.parametrize("start", ["readout", "split"])
def test_a_direction_that_cancels_exactly_is_spare(start: Any, balance: Any) -> None:
    """Two clients with opposite updates in one direction of a nested state: Uᵀ T has a row of zeros; α/0 is NaN."""
    options: dict[str, Any] = {"readout": "nested", "balance": balance, "server_rank": 3, "start": start}
    fed = build(glora(**options), 0, ((8, 6),), (2, 2), (1, 1))
    e, f = torch.eye(8).double(), torch.eye(6).double()
    pairs = [(e[:, [0, 1]], f[[0, 1]]), (e[:, [0, 2]], torch.stack([-f[0], f[2]]))]
    updates = [
        replace(u, modules={"layer0": Factors(b, a, u.factors("layer0").scaling)})
        for u, (b, a) in zip(fed.updates, pairs, strict=True)
    ]
    fed = replace(fed, updates=tuple(updates))
    state = served(fed)[0]
    for rank in (1, 2, 3):
        sent = fed.method.broadcast(state, Request(rank)).adapter["layer0"]
        assert bool(sent.a.isfinite().all() and sent.b.isfinite().all())
        spare = ~sent.b.any(dim=0)
        assert bool((sent.a[spare].norm(dim=1) > 0.1).all())
    assert_same(received(fed, state), fed.ideal, 1e-12)


@pytest.mark.parametrize("balance", ["init", "even", "root"])
@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_a_readout_of_any_size_is_the_state(size: float, balance: Any) -> None:
    """U·C with rows of C between the least and the largest that float32 holds, in every balance."""
    fed = build(create("glora"), 0, ((8, 6),), (2,), (1,))
    u, c = torch.eye(8)[:, :3], torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * size
    f = leading_adapter(fed.template, "layer0", LowRank(u, c), 3, 0, balance)
    assert bool(f.a.isfinite().all() and f.b.isfinite().all())
    found, wanted = f.scaling * array(f.b) @ array(f.a), array(u) @ array(c)
    rest = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert rest < (1e-6 if size > 1e-36 else 0.5)


def test_a_product_that_no_type_holds_is_refused() -> None:
    fed = build(glora(), 5, ranks=(3, 3), counts=(1, 1), dtype=torch.float32)
    far = scaled_factors(fed, lambda k: 1e30, lambda k: 1e30)
    with pytest.raises(ValueError, match=r"expected a product that torch\.float32 holds"):
        served(far)
