"""Bugs found in published federated LoRA code, one named test each.

Those of whole methods are laws of their own: heads left out of the aggregation, counts ignored, and ranks refused
are in `test_laws.py`; A₀ kept for ever in `test_factor_rules.py`; the optimizer's in `tests/algebra/test_galore.py`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import ADAPTER, FEDERATED, Case, array, assert_same, build, distance, received, served, weighted_sum

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import METHODS
from fedspan.methods.messages import Factors, Request, Template, Vector
from fedspan.methods.readout import fresh_a

EXACT = [case for case in ADAPTER if case.info.exact]


def by_id(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


@by_id([case for case in EXACT if case.info.hetero_rank])
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha/r", "rslora"])
def test_scaling_is_not_ignored_under_mixed_ranks(case: Case, rslora: bool) -> None:
    """B A of rank 2 and rank 8 stand for updates whose scalings differ by 4 (rsLoRA: 2)."""
    fed = build(case, 0, ranks=(2, 8), counts=(1, 1), rslora=rslora)
    result = received(fed, served(fed)[0])
    assert_same(result, fed.ideal, 1e-11)
    unscaled = {
        name: weighted_sum(fed, lambda u, n=name: array(u.factors(n).b) @ array(u.factors(n).a)) for name in result
    }
    for factor in (1.0, 2.0, 8.0, 16.0):  # nor is it one common factor
        assert distance(result, {name: factor * value for name, value in unscaled.items()}) > 0.1


@by_id(ADAPTER)
def test_a_scaling_of_the_clients_own_travels_with_its_factors(case: Case) -> None:
    """Equal ranks with another alpha each: (B, A, 3s) means what (3B, A, s) means."""
    fed = build(case, 1, ranks=(3, 3, 3), counts=(1, 2, 3))
    folded, other = [], []
    for k, update in enumerate(fed.updates):
        pairs = {name: update.factors(name) for name in update.modules}
        folded.append(replace(update, modules={n: Factors(f.b * 3.0**k, f.a, f.scaling) for n, f in pairs.items()}))
        other.append(replace(update, modules={n: Factors(f.b, f.a, f.scaling * 3.0**k) for n, f in pairs.items()}))
    expected = received(fed, served(fed, folded)[0])
    assert_same(received(fed, served(fed, other)[0]), expected, 1e-11)
    assert distance(received(fed, served(fed)[0]), expected) > 0.1


@by_id(EXACT)
def test_a_and_b_are_not_told_apart_by_shape(case: Case) -> None:
    """Rank 5 on a 5×5 layer: every factor is 5×5, and B·A is neither A·B nor its own transpose."""
    fed = build(case, 2, shapes=[(5, 5)], ranks=(5, 5), counts=(1, 3))
    result = received(fed, served(fed)[0])
    assert_same(result, fed.ideal, 1e-11)
    swapped = weighted_sum(fed, lambda u: 16 / 5 * array(u.factors("layer0").a) @ array(u.factors("layer0").b))
    assert distance(result, {"layer0": swapped}) > 0.1
    assert distance(result, {"layer0": fed.ideal["layer0"].T}) > 0.1


def test_the_fedex_residual_is_not_transposed() -> None:
    """On a square layer T − s B̄Ā has the orientation of the weight (m, n); a transposed one would fit silently."""
    fed = build(METHODS["fedex_lora"](), 3, shapes=[(6, 6)], ranks=(2, 2), counts=(1, 2))
    sent = fed.method.broadcast(served(fed)[0], Request(2))
    f, patch = sent.adapter["layer0"], sent.patch["layer0"]
    held = array(patch.b) @ array(patch.a) if isinstance(patch, LowRank) else array(patch)
    residual = fed.ideal["layer0"] - f.scaling * array(f.b) @ array(f.a)
    np.testing.assert_allclose(held, residual, atol=1e-12)
    assert np.linalg.norm(held.T - residual) > 0.1 * np.linalg.norm(residual)


def test_the_fedit_baseline_is_not_one_clients_share() -> None:
    """Every client's factors enter the means: leaving any one out, or keeping p₀ times the first, shows."""
    fed = build(METHODS["fedit"](), 4, ranks=(3, 3, 3), counts=(1, 2, 3))
    result = received(fed, served(fed)[0])
    f = fed.updates[0].factors("layer0")
    first = {"layer0": f.scaling * (array(f.b) / 6) @ (array(f.a) / 6)}
    assert distance({"layer0": result["layer0"]}, first) > 1
    for k in range(3):
        others = [u for i, u in enumerate(fed.updates) if i != k]
        assert distance(received(fed, served(fed, others)[0]), result) > 0.1


def test_every_client_holds_the_same_frozen_a() -> None:
    """FFA-LoRA's A₀ is one matrix for all ranks, rounds and processes; averaging Bs of different As would be noise."""
    fed = build(METHODS["ffa_lora"](), 5, ranks=(1, 3, 8), counts=(1, 1, 1))
    whole = fed.method.broadcast(fed.state, Request(8)).adapter
    for state in (fed.state, served(fed)[0], build(METHODS["ffa_lora"](), 5, ranks=(1, 3, 8), counts=(1, 1, 1)).state):
        for rank in (1, 3, 8):
            for name, f in fed.method.broadcast(state, Request(rank)).adapter.items():
                assert torch.equal(f.a, whole[name].a[:rank])
    assert not torch.equal(whole["layer0"].a[:, :5], whole["layer1"].a)  # but one for each module


@pytest.mark.parametrize("n", [1, 3, 7, 16, 33])
def test_fresh_rows_do_not_depend_on_the_rank(n: int) -> None:
    """Row j of a new A is the same in an adapter of any rank, is U(−1/√n, 1/√n), and differs by round and seed."""
    template = Template({"x": (4, n), "y": (4, n)}, 9)
    whole = fresh_a(template, "x", 9)
    assert all(torch.equal(fresh_a(template, "x", r), whole[:r]) for r in range(10))
    assert float(whole.abs().max()) <= n**-0.5
    others = [fresh_a(template, "y", 9), fresh_a(template, "x", 9, 1), fresh_a(replace(template, seed=1), "x", 9)]
    assert all(not torch.equal(whole, other) for other in others)


def test_fresh_a_has_the_spread_of_pefts() -> None:
    """Over N = 40 000 entries the variance is 1/(3n); 5σ of a uniform's sample variance is 5·√(4/5)/√N of it."""
    n = 400
    values = fresh_a(Template({"x": (4, n)}, 100), "x", 100).double()
    assert float(values.var()) == pytest.approx(1 / (3 * n), rel=5 * 0.8**0.5 / 200)
    assert abs(float(values.mean())) < 5 * (1 / (3 * n)) ** 0.5 / 200


@by_id(FEDERATED)
def test_updates_are_cleared_between_rounds(case: Case) -> None:
    """The second round's result is a function of the state and that round's updates, whatever came before.

    The method object that served a round gives, bit for bit, what one that never did gives.
    """
    fed = build(case, 6, ranks=(2, 2, 2), counts=(1, 2, 3))
    after = served(fed)[0]
    second = build(case, 7, ranks=(2, 2), counts=(9, 1), server_rank=fed.template.rank, start=after)
    used = served(replace(second, method=fed.method))[0]
    unused = served(replace(second, method=case.make()))[0]
    for name, value in received(second, used).items():
        np.testing.assert_array_equal(value, received(second, unused)[name])
    # An adapter that is replaced each round holds nothing of the first round at all.
    if case.id in ("fedit", "hetlora", "flexlora", "glora", "fedavg", "fedftg"):
        fresh = served(replace(second, state=replace(fed.state, round_num=1)))[0]
        assert_same(received(second, used), received(second, fresh), 1e-12)


@by_id(FEDERATED)
def test_the_server_keeps_no_view_of_a_clients_tensors(case: Case) -> None:
    """A client whose model trains on in place, after its update was folded, does not change the server's state."""
    fed = build(case, 8, ranks=(2, 2), counts=(1, 3))
    state = served(fed)[0]
    before = received(fed, state)
    for update in fed.updates:
        for value in update.dense.values():
            value.fill_(7.0)
        for name in update.modules:
            if not case.frozen_a:
                update.factors(name).a.fill_(7.0)
            update.factors(name).b.fill_(7.0)
    for name, value in received(fed, state).items():
        np.testing.assert_array_equal(value, before[name])


@by_id([case for case in ADAPTER if case.id in ("flora", "fedex_lora", "glora-state")])
def test_low_precision_updates_do_not_make_the_base_drift(case: Case) -> None:
    """Thirty rounds of bfloat16 updates: the patch is float32 and still the sum of all, to float32's tolerance."""
    shapes, ranks, counts, kept = [(16, 12)], (2, 2), (1, 2), case.id == "fedex_lora"
    fed = build(case, 0, shapes, ranks, counts, dtype=torch.bfloat16, server_rank=2 if kept else 16)
    base = np.zeros((16, 12))
    for seed in range(30):
        new = build(case, seed, shapes, ranks, counts, dtype=torch.bfloat16, server_rank=fed.template.rank)
        fed = replace(new, state=fed.state)
        expected = {"layer0": base + fed.ideal["layer0"]}
        means = [weighted_sum(fed, lambda u, p=part: array(getattr(u.factors("layer0"), p))) for part in "ba"]
        base = expected["layer0"] - kept * 8 * means[0] @ means[1]  # FedEx-LoRA's adapter is no part of the base
        fed = replace(fed, state=served(fed)[0])
    sent = fed.method.broadcast(fed.state, Request(2)).patch["layer0"]
    assert (sent.b if isinstance(sent, LowRank) else sent).dtype == torch.float32
    assert_same(received(fed, fed.state), expected, 1e-5)


@by_id(FEDERATED)
def test_client_ids_are_names_and_no_indices(case: Case) -> None:
    """Any ids, in any order, with gaps: nothing looks a client up by position."""
    fed = build(case, 9, ranks=(2, 2, 2), counts=(1, 2, 3))
    named = [replace(u, client_id=c) for u, c in zip(fed.updates, ("site 100", "9", "alice"), strict=True)]
    assert_same(received(fed, served(fed, named)[0]), received(fed, served(fed)[0]), 1e-11)


def test_a_payload_of_the_wrong_type_is_refused() -> None:
    """A method that needs factor pairs does not take a vector for one."""
    fed = build(METHODS["glora"](), ranks=(2,), counts=(1,))
    wrong = replace(fed.updates[0], modules={name: Vector({"z": torch.zeros(2, 2)}) for name in fed.template.modules})
    with pytest.raises(TypeError, match="layer0 holds a Vector, not a factor pair"):
        served(fed, [replace(wrong)])
