"""Factors in float32 whose terms cancel, as an ill-conditioned gauge makes them: what a server loses of the product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import CASES, Array, Case, Federation, array, assert_same, build, gauge, received, regauged, served
from test_glora_sums import FEW
from test_spectral import held

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.bench.server_suite import draw_factors
from fedspan.methods.base import aggregate
from fedspan.methods.glora import glora
from fedspan.methods.glora_sums import glora_sums
from fedspan.methods.messages import Factors, Template, Update

PAIRS = [
    case
    for case in CASES
    if case.info.exact and case.info.gauge_invariant and case.info.trains == "adapter" and not case.frozen_a
]
PAIRS = [case for case in PAIRS if not case.id.startswith(("fedprox", "fedex", "fed_sb", "ravan", "centr"))]
"""The methods that promise T itself of any two factors. FedEx-LoRA's residual is made of factors as they come, and the
cores of Fed-SB and Ravan, under FedProx too, have no gauge."""
PAIRS.append(Case("glora_sums-2", lambda: glora_sums(passes=2)))


def ill(fed: Federation, condition: float, seed: int) -> Federation:
    rng = np.random.default_rng(seed)
    return regauged(fed, lambda k, rank: gauge(rng, rank, condition))


@pytest.mark.parametrize("case", PAIRS, ids=[case.id for case in PAIRS])
def test_a_gauge_of_condition_2000_costs_no_accuracy(case: Case) -> None:
    """Measured against the product of the factors as they came: within 1e-5, as without a gauge; and at 1e5 too."""
    ranks = FEW["ranks"] if case.info.hetero_rank else (3,) * 5
    server_rank = 16 if case.info.hetero_rank else None
    for condition in (2e3, 1e5):
        fed = build(case.make(), 1, FEW["shapes"], ranks, FEW["counts"], server_rank=server_rank, dtype=torch.float32)
        fed = ill(fed, condition, 2)
        assert_same(received(fed, served(fed)[0]), fed.ideal, 1e-5)


@pytest.mark.parametrize("condition", [1.0, 2.0, 30.0])
def test_a_large_layer_of_ill_conditioned_clients_is_that_of_float64(condition: float) -> None:
    """In sums over 13 clients of 1,100 rows, whose B have a condition of about 80 before any gauge: on both sides of
    the bound up to which a basis is multiplied in float32."""
    rng = np.random.default_rng(9)
    method = glora(algebra="randomized")
    state = method.init(Template({"layer0": (1100, 1100)}, 16, alpha=16.0), {})
    single, double = [], []
    for k, f in enumerate(draw_factors(1100, 16, 13, torch.device("cpu"))):
        g = gauge(rng, 16, condition)
        b, a = torch.from_numpy(array(f.b) @ g).float(), torch.from_numpy(np.linalg.solve(g, array(f.a))).float()
        single.append(Update(f"client{k:02d}", k + 1.0, {"layer0": Factors(b, a, f.scaling)}, {}))
        double.append(replace(single[-1], modules={"layer0": Factors(b.double(), a.double(), f.scaling)}))
    found, exact = (held(aggregate(method, state, updates)[0])["layer0"] for updates in (single, double))
    assert np.linalg.norm(found - exact) < 1e-5 * np.linalg.norm(exact)


def product(x: LowRank) -> Array:
    return array(x.b) @ array(x.a)


@pytest.mark.parametrize("by", [0, 40, -90])
def test_terms_that_cancel_are_collected_without_losing_the_product(by: int) -> None:
    """Also where the factors are far from ordinary size; the terms of the result are of the product's own size."""
    fed = ill(build(glora_sums(), 3, **FEW, server_rank=14, dtype=torch.float32), 1e5, 4)
    f = fed.updates[0].factors("layer0")
    x = LowRank(f.b * 2.0**by, f.a)
    y = lowrank.collected(x)
    assert lowrank.term_size(x) > 100 * np.linalg.norm(product(x))
    assert lowrank.term_size(y) < 1.01 * np.linalg.norm(product(x))
    assert np.linalg.norm(product(y) - product(x)) < 5e-7 * np.linalg.norm(product(x))


def test_pairs_of_ordinary_condition_keep_their_bits() -> None:
    """They are the very same object; so are zeros, and float64, whose rounding is far away."""
    fed = build(glora_sums(), 5, **FEW, server_rank=14, dtype=torch.float32)
    for update in ill(fed, 5.0, 6).updates:
        x = update.factors("layer0").delta()
        assert lowrank.collected(x) is x
    f = ill(fed, 1e5, 7).updates[0].factors("layer0")
    for x in (LowRank(0 * f.b, f.a), LowRank(f.b.double(), f.a.double()), lowrank.zeros(3, 4)):
        assert lowrank.collected(x) is x


def edge(passes: Any, seed: int, rank: int = 14) -> Federation:
    """A client with a share of 1e-4 whose update is 1e4 times as large as the others'."""
    shares = (1e-4, 0.3, 0.3, 0.2, 0.2)
    method = glora_sums(passes=passes, server_rank=rank)
    fed = build(method, 15, [(60, 50)], FEW["ranks"], shares, dtype=torch.float32)
    first = fed.updates[0]
    f = first.factors("layer0")
    loud = replace(first, modules={"layer0": Factors(f.b * 1e4, f.a, f.scaling)})
    template = replace(fed.template, seed=seed)
    return replace(fed, updates=(loud, *fed.updates[1:]), state=replace(fed.state, template=template))


def lost(fed: Federation) -> tuple[float, float]:
    """‖T − U·C‖² as the server says, and as it is, both over ‖T‖²."""
    state, measured = served(fed)
    kept, ideal = held(state)["layer0"], fed.ideal["layer0"]
    share, size = measured["truncation_error"] ** 2, np.linalg.norm(kept) ** 2
    whole = np.linalg.norm(ideal) ** 2
    return size * share / (1 - share) / whole, np.linalg.norm(ideal - kept) ** 2 / whole


@pytest.mark.parametrize("passes", [1, 2])
def test_a_share_of_a_ten_thousandth_is_not_lost(passes: int) -> None:
    """R = 14 holds all that the clients name: whatever the draw of Ω, what is lost is of the rounding of a sketch in
    float32, magnified by 1e4; and the server says so."""
    said, was = np.array([lost(edge(passes, seed)) for seed in range(40)]).T
    assert max(was) < 1e-6
    assert max(said) < 1e-6


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_small_share_is_not_lost_in_any_gauge(passes: int, condition: float) -> None:
    for seed in range(10):
        assert lost(ill(edge(passes, seed), condition, seed))[1] < 1e-6


def test_the_certificate_says_without_bias_what_one_pass_loses() -> None:
    """At an R that leaves out directions of the small share; over 80 draws of Ω and of the probes."""
    said, was = np.array([lost(edge(1, seed, rank=12)) for seed in range(80)]).T
    assert min(was) > 1e-4
    assert abs(np.mean(said - was)) < 5 * np.std(said - was) / len(was) ** 0.5
