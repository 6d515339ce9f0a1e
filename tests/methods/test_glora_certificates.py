"""GLoRA's automatic rank: it keeps the tolerance, and its certificate says what was discarded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from federations import (
    Array,
    Federation,
    array,
    build,
    served,
    weighted_sum,
)
from glora_rounds import BASES, MIXED, added, held, laws, next_round, returned
from hypothesis import given
from hypothesis import strategies as st

from fedspan.methods import glora
from fedspan.methods.messages import Request, Update


@pytest.mark.parametrize("basis", BASES)
@given(seed=st.integers(0, 2**32 - 1), tolerance=st.sampled_from([1e-6, 0.01, 0.1, 0.5]))
@laws
def test_auto_rank_keeps_the_tolerance_and_no_more(basis: str, seed: int, tolerance: float) -> None:
    """The smallest R with ‖T − U·C‖ ≤ tolerance·‖T‖, per module, and never above the dense oracle's."""
    fed = build(glora(server_rank="auto", tolerance=tolerance, basis=basis), seed, **MIXED)
    state, diagnostics = served(fed)
    for name, ideal in fed.ideal.items():
        s = np.linalg.svd(ideal, compute_uv=False)
        tails = np.array([np.linalg.norm(s[r:]) for r in range(len(s) + 1)]) / np.linalg.norm(s)
        rank = state.modules[name]["u"].shape[1]
        assert rank == int((tails <= tolerance).argmax())
        assert np.linalg.norm(held(state, name) - ideal) <= tolerance * np.linalg.norm(ideal) * (1 + 1e-9)
    assert diagnostics["truncation_error"] <= tolerance


@pytest.mark.parametrize("basis", BASES)
def test_an_automatic_rank_comes_with_a_certificate_for_every_module(basis: Any) -> None:
    """Its rank, and the share of ‖T‖_F² that is not in the state: measured densely, they are so."""
    fed = build(glora(server_rank="auto", tolerance=0.4, basis=basis), 3, **MIXED)
    state, measured = served(fed)
    assert measured["certificate"].keys() == fed.template.modules.keys()
    for name, said in measured["certificate"].items():
        ideal = fed.ideal[name]
        lost = np.linalg.norm(ideal - held(state, name)) ** 2 / np.linalg.norm(ideal) ** 2
        assert said["discarded"] == pytest.approx(lost, rel=1e-9)
        assert said["discarded"] <= 0.4**2
        assert said["rank"] == state.modules[name]["u"].shape[1]
    assert "certificate" not in served(build(glora(), 3, **MIXED))[1]


AUTO: dict[str, dict[str, Any]] = {
    "replace": {},
    "innovation": {"update": "innovation"},
    "state": {"start": "state"},
    "split": {"start": "split"},
    "both-innovation": {"update": "innovation", "sides": "both"},
    "nested-split": {"start": "split", "readout": "nested"},
    "energy-state": {"start": "state", "basis": "energy"},
}


def whole_model(fed: Federation, update: Update, name: str) -> Array:
    """Everything that the client adds to its base: what it was sent, with its own adapter in place of the one sent."""
    sent = fed.method.broadcast(fed.state, Request(update.factors(name).rank))
    patch = sent.patch.get(name)
    return fed.delta_of(update, name) + (0.0 if patch is None else array(patch.b) @ array(patch.a))


@pytest.mark.parametrize("options", AUTO.values(), ids=AUTO)
@pytest.mark.parametrize("idle", [1, 3])
def test_an_automatic_rank_keeps_what_the_state_holds(options: dict[str, Any], idle: int) -> None:
    """Three clients of rank 4 make a state of rank 12. A round in which one of them, or all, learn nothing leaves it:
    the clients' votes are no wider than an adapter, and the state is."""
    method = glora(server_rank="auto", tolerance=1e-5, **options)
    fed = build(method, 1, [(64, 48)], [4] * 3, [1] * 3, server_rank=4, dtype=torch.float32)
    state, diagnostics = served(fed)
    assert diagnostics["server_rank"] == 12
    updates = [returned(fed, state, 4, f"client{k}") for k in range(idle)]
    after = next_round(fed, state, updates)
    if method.broadcast(state, Request(4)).patch or options.get("update") == "innovation":
        assert after.modules["layer0"]["u"].shape[1] == 12
        np.testing.assert_allclose(held(after, "layer0"), held(state, "layer0"), atol=1e-4)
    else:
        assert after.modules["layer0"]["u"].shape[1] == 4  # the whole of what came back


@pytest.mark.parametrize("options", AUTO.values(), ids=AUTO)
@pytest.mark.parametrize("tolerance", [0.01, 0.3])
def test_the_certificate_holds_in_every_round(options: dict[str, Any], tolerance: float) -> None:
    """Four rounds of mixed ranks: ‖T − U·C‖ ≤ tolerance·‖T‖ densely, T being the mean of what the clients ran, and the
    share that was discarded is the one that is certified."""
    fed = build(glora(server_rank="auto", tolerance=tolerance, **options), 0, **MIXED, server_rank=7)
    for number in range(4):
        fed = replace(build(fed.method, number, **MIXED, server_rank=7), state=fed.state)
        for name in fed.template.modules:
            if options.get("update") == "innovation":
                target = held(fed.state, name) + added(fed, name)
            else:
                target = weighted_sum(fed, lambda u, n=name, f=fed: whole_model(f, u, n))
            after, diagnostics = served(fed)
            lost = np.linalg.norm(target - held(after, name)) / np.linalg.norm(target)
            said = diagnostics["certificate"][name]
            assert lost <= tolerance * (1 + 1e-9)
            assert said["discarded"] == pytest.approx(lost**2, rel=1e-6, abs=1e-20)
            assert said["rank"] == after.modules[name]["u"].shape[1]
        fed = replace(fed, state=after)


def test_with_momentum_the_certificate_is_about_the_state_that_is_kept() -> None:
    fed = build(glora(server_rank="auto", tolerance=0.2, start="split", momentum=0.7), 0, **MIXED)
    for number in range(3):
        fed = replace(build(fed.method, number, **MIXED), state=fed.state)
        state, diagnostics = served(fed)
        for name, said in diagnostics["certificate"].items():
            assert said["rank"] == state.modules[name]["u"].shape[1]
            assert 0 <= said["momentum_discarded"] <= 0.2**2
            assert (said["momentum_discarded"] > 0) == (number > 0)
        fed = replace(fed, state=state)
