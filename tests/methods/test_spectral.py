"""The server's algebra by shape: every path is the exact one, in memory, by queries, split, batched or threaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from federations import Array, Federation, array, assert_same, build, distance, gauge, received, regauged, served
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.algebra.lowrank import LowRank
from fedspan.methods import METHODS, create, flexlora, glora
from fedspan.methods.base import Method, ServerState
from fedspan.methods.messages import Diagnostics, Factors, Request, Update
from fedspan.methods.queries import Contribution, Query, Sums, add_sums, means_of, partial_sums
from fedspan.methods.spectral import ApproximationSpec, prefers_exact, procedure_for, run_procedure, solve_exactly
from fedspan.support import parallel

laws = settings(deadline=None, max_examples=10, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
MANY: dict[str, Any] = {"shapes": ((60, 50), (48, 64)), "ranks": (4,) * 6 + (2,) * 6, "counts": tuple(range(1, 13))}
"""c = 36 beside l = 14 columns that are asked about at R = 6: nothing here is spanned by accident."""
RULES: Mapping[str, Mapping[str, Any]] = {
    "projector": {},
    "energy": {"basis": "energy"},
    "both": {"sides": "both"},
    "nested": {"readout": "nested"},
    "innovation": {"update": "innovation"},
    "innovation-energy": {"update": "innovation", "basis": "energy"},
    "state": {"start": "state"},
}
rules = pytest.mark.parametrize("options", RULES.values(), ids=RULES)


def held(state: ServerState) -> dict[str, Array]:
    """U·C of every module."""
    return {name: array(x["u"]) @ array(x["c"]) for name, x in state.modules.items()}


def shared(fed: Federation, seed: int, rank: int = 6, noise: float = 0.0, decay: float = 0.0) -> Federation:
    """The same federation with all updates in one `rank`-dimensional column and row space, plus noise."""
    rng = np.random.default_rng(seed)
    strength = np.diag(np.logspace(0, -decay, rank))
    updates = []
    frames = {
        name: [np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in shape]
        for name, shape in fed.template.modules.items()
    }
    for update in fed.updates:
        modules = {}
        for name, (left, right) in frames.items():
            f = update.factors(name)
            m, n = fed.template.modules[name]
            b = left @ strength @ rng.standard_normal((rank, f.rank)) + noise * rng.standard_normal((m, f.rank))
            a = rng.standard_normal((f.rank, rank)) @ strength @ right.T + noise * rng.standard_normal((f.rank, n))
            modules[name] = Factors(torch.from_numpy(b).to(fed.dtype), torch.from_numpy(a).to(fed.dtype), f.scaling)
        updates.append(replace(update, modules=modules))
    return replace(fed, updates=tuple(updates))


def second_round(method: Method, seed: int, **fixed: Any) -> Federation:
    """A federation whose server already holds something, so that innovations differ from updates."""
    fed = shared(build(method, seed, **{**MANY, "server_rank": 6, **fixed}), seed)
    after = served(fed)[0]
    return replace(shared(fed, seed + 1, noise=0.02, decay=1.0), state=after)


def by_queries(fed: Federation, splits: int = 1) -> tuple[dict[str, Array], Diagnostics, int]:
    """Run the query procedure over that many separate sets of clients; the last result is its number of passes."""
    assert fed.method.finish_by_queries is not None
    procedure, contribution_of = fed.method.finish_by_queries(fed.state), fed.method.contributions(fed.state)
    weight = sum(u.num_examples for u in fed.updates)
    queries, passes = next(procedure), 0
    while True:
        parts = [partial_sums(queries, fed.updates[i::splits], contribution_of) for i in range(splits)]
        passes += 1
        try:
            queries = procedure.send(means_of(reduce(add_sums, parts), weight))
        except StopIteration as stop:
            modules = {name: array(x["u"]) @ array(x["c"]) for name, x in stop.value.modules.items()}
            return modules, stop.value.diagnostics, passes


@rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_randomized_path_is_exact_where_the_server_rank_spans_the_union(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Twelve clients in a space of 6 dimensions, l = 14 of 48 columns asked about: T, and nothing but T."""

    @laws
    @given(seed=seeds)
    def law(seed: int) -> None:
        fed = shared(build(glora(algebra="randomized", **options), seed, **MANY, server_rank=6, dtype=dtype), seed)
        state, diagnostics = served(fed)
        assert_same(received(fed, state), fed.ideal, 1e-11 if dtype == torch.float64 else 2e-5)
        assert diagnostics["server_rank"] == 6
        assert diagnostics["truncation_error"] < (1e-11 if dtype == torch.float64 else 1e-5)
        assert diagnostics["truncation_error_estimated"] == 1.0

    law()


@rules
@pytest.mark.parametrize(("decay", "worse"), [(2.0, 0.02), (0.3, 0.1)])
def test_the_randomized_path_loses_little_more_than_the_exact_one(
    options: dict[str, Any], decay: float, worse: float
) -> None:
    """Truncating at R = 4 of c = 36 directions: at most 2 % above the exact rule's loss where strengths decay, 10 %
    where they are nearly equal."""
    for seed in range(5):
        losses = []
        for algebra in ("exact", "randomized"):
            method = glora(server_rank=4, algebra=algebra, **options)
            fed = shared(build(method, seed, **MANY, server_rank=4), seed, rank=12, noise=0.01, decay=decay)
            losses.append(distance(held(served(fed)[0]), fed.ideal))
        assert losses[0] > 0.001
        assert losses[1] < losses[0] * (1 + worse)


@pytest.mark.parametrize("options", [RULES["projector"], RULES["energy"], RULES["both"]], ids=str)
def test_the_estimated_truncation_error_is_unbiased(options: dict[str, Any]) -> None:
    """Over n = 60 seeds of the probes the mean of the estimated share is the mean of the measured one, within 5σ."""
    differences = []
    base = build(glora(server_rank=4, algebra="randomized", **options), 0, **MANY, server_rank=4)
    for seed in range(60):
        fed = replace(base, template=replace(base.template, seed=seed))
        fed = replace(fed, state=replace(base.state, template=fed.template))
        state, diagnostics = served(fed)
        measured = distance(held(state), fed.ideal)
        differences.append(diagnostics["truncation_error"] ** 2 - measured**2)
    error = np.std(differences) / np.sqrt(len(differences))
    assert abs(np.mean(differences)) < 5 * error
    assert error < 0.02 * measured**2


@pytest.mark.parametrize("options", [RULES["projector"], RULES["energy"], RULES["both"], RULES["innovation"]], ids=str)
def test_the_randomized_path_sees_no_gauge(options: dict[str, Any]) -> None:
    """Condition 1e6, truncated or not: the same U·C, and never a direction made of rounding."""

    @laws
    @given(seed=seeds, server_rank=st.integers(2, 9))
    def law(seed: int, server_rank: int) -> None:
        fed = build(glora(server_rank=server_rank, algebra="randomized", **options), seed, **MANY)
        fed = shared(fed, seed)
        rng = np.random.default_rng(seed)
        other = regauged(fed, lambda k, rank: gauge(rng, rank, 1e6))
        (first, measured), (second, measured_other) = served(fed), served(other)
        size = max(float(np.linalg.norm(x)) for x in fed.ideal.values())
        assert_same(held(second), held(first), 1e-6, size)
        assert measured["server_rank"] == measured_other["server_rank"] == min(server_rank, 6)

    law()


@rules
def test_the_conversation_is_the_servers_own_step(options: dict[str, Any]) -> None:
    """Queries about one, two or five separate sets of clients lead to the state that `finish` computes."""

    @laws
    @given(seed=seeds, splits=st.sampled_from([1, 2, 5]))
    def law(seed: int, splits: int) -> None:
        fed = second_round(glora(server_rank=6, algebra="randomized", **options), seed)
        state, diagnostics = served(fed)
        modules, measured, passes = by_queries(fed, splits)
        assert_same(modules, held(state), 1e-7)
        assert measured == pytest.approx(diagnostics, rel=1e-7)
        assert passes <= 4

    law()


def test_a_silent_conversation_ends_with_nothing() -> None:
    for options in RULES.values():
        fed = build(glora(algebra="randomized", **options), 0, **MANY, server_rank=6, silent=range(12))
        modules, measured, _ = by_queries(fed, 2)
        assert measured == {"server_rank": 0, "truncation_error": 0, "truncation_error_estimated": 1}
        assert not any(x.any() for x in modules.values())
        assert not any(x.any() for x in received(fed, served(fed)[0]).values())


def test_a_conversation_that_cannot_be_held_is_refused_when_it_is_asked_for() -> None:
    fed = build(glora(algebra="exact"), 0)
    for method in (glora(algebra="exact"), glora(server_rank="auto"), flexlora("exact")):
        assert method.finish_by_queries is not None
        with pytest.raises(ValueError, match="needs all updates at once"):
            method.finish_by_queries(fed.state)
    with pytest.raises(ValueError, match="algebra = 'randomized': expected 'auto' or 'exact'"):
        glora(server_rank="auto", algebra="randomized")


def projector(x: Array, vote: int | None) -> Array:
    u, s, _ = np.linalg.svd(x)
    rank = int((s > 1e-9 * s[0]).sum())
    q = u[:, : min(rank, vote or rank)]
    return q @ q.T


@laws
@given(seed=seeds, rest_rank=st.integers(0, 3), vote=st.sampled_from([None, 1, 3]), cut=st.integers(0, 4))
def test_partial_sums_are_the_dense_sums_and_add_up(seed: int, rest_rank: int, vote: int | None, cut: int) -> None:
    """Every kind of question about any split of the clients, against dense matrices."""
    rng = np.random.default_rng(seed)
    ranks, (m, n) = (1, 2, 3, 3), (12, 9)

    def pair(rank: int) -> LowRank:
        return LowRank(
            torch.from_numpy(rng.standard_normal((m, rank))), torch.from_numpy(rng.standard_normal((rank, n)))
        )

    rest = pair(rest_rank) if rest_rank else None
    own = {f"c{k}": Factors(x.b, x.a, 0.5 + k) for k, x in enumerate(map(pair, ranks))}
    updates = [Update(name, 1.0 + 3 * k, {"layer": f}, {}) for k, (name, f) in enumerate(own.items())]
    dense = {
        name: f.scaling * array(f.b) @ array(f.a) + (array(rest.dense()) if rest else 0) for name, f in own.items()
    }
    x, y = rng.standard_normal((n, 5)), rng.standard_normal((m, 5))
    expected = {
        "times": sum(u.num_examples * dense[u.client_id] @ x for u in updates),
        "adjoint": sum(u.num_examples * dense[u.client_id].T @ y for u in updates),
        "columns": sum(u.num_examples * projector(dense[u.client_id], vote) @ y for u in updates),
        "rows": sum(u.num_examples * projector(dense[u.client_id].T, vote) @ x for u in updates),
    }
    asked = tuple(Query(kind, torch.from_numpy(x if kind in ("times", "rows") else y), vote) for kind in expected)

    def terms(update: Update, module: str) -> Contribution:
        f = update.factors(module)
        return Contribution(LowRank(f.b, f.a), f.scaling, rest)

    queries = {"layer": asked}
    whole = partial_sums(queries, updates, terms)
    for value, wanted in zip(whole["layer"], expected.values(), strict=True):
        np.testing.assert_allclose(array(value), wanted, atol=1e-10 * np.linalg.norm(wanted))
    if 0 < cut < len(updates):
        parts = add_sums(partial_sums(queries, updates[:cut], terms), partial_sums(queries, updates[cut:], terms))
        for value, wanted in zip(parts["layer"], whole["layer"], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


def test_queries_about_half_precision_are_answered_in_float32() -> None:
    fed = build(glora(), 0, **MANY, dtype=torch.bfloat16)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    queries = {"layer0": (Query("times", x), Query("rows", x))}
    times, rows = partial_sums(queries, fed.updates)["layer0"]
    assert times.dtype == rows.dtype == torch.float32
    wanted = sum(u.num_examples * fed.delta_of(u, "layer0") for u in fed.updates) @ array(x)
    assert np.linalg.norm(array(times) - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["glora", "flexlora", "flora", "fedex_lora"])
@pytest.mark.parametrize("algebra", ["exact", "randomized"])
def test_twice_and_with_three_threads_the_bits_are_the_same(method: str, algebra: str) -> None:
    """And no draw comes from the global generator, or moves it."""
    options = {"algebra": algebra} if method in ("glora", "flexlora") else {}
    made = create(method, **options)
    ranks = MANY["ranks"] if made.info.hetero_rank else (3,) * 12
    fed = build(made, 1, shapes=((60, 50),) * 3 + ((48, 64),) * 2, ranks=ranks, counts=MANY["counts"])

    def bits() -> list[torch.Tensor]:
        state = served(fed)[0]
        sent = made.broadcast(state, Request(ranks[0]))
        patches = state.patches.total.values() if state.patches else ()
        halves = [t for p in patches for t in ((p.b, p.a) if isinstance(p, LowRank) else (p,))]
        return [t for x in state.modules.values() for t in x.values()] + [f.b for f in sent.adapter.values()] + halves

    torch.manual_seed(0)
    first = bits()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with parallel.threads(3):
        second = bits()
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), before)


@rules
def test_layers_in_a_batch_are_the_layers_alone(options: dict[str, Any]) -> None:
    """Seven layers of one shape, two of another, one of them silent: each as if it were the only one."""
    shapes = ((20, 16),) * 7 + ((12, 24),) * 2
    fed = build(glora(algebra="exact", **options), 3, shapes=shapes, ranks=(2, 3, 3), counts=(1, 2, 3), server_rank=4)
    quiet = tuple(replace(u, modules={**u.modules, "layer2": zeroed(u.factors("layer2"))}) for u in fed.updates)
    fed = replace(fed, updates=quiet)
    together = served(fed)[0]
    for name, shape in fed.template.modules.items():
        template = replace(fed.template, modules={name: shape})
        state = replace(fed.state, template=template, modules={name: fed.state.modules[name]})
        updates = tuple(replace(u, modules={name: u.modules[name]}) for u in fed.updates)
        alone = served(replace(fed, template=template, state=state, updates=updates))[0]
        assert_same(held(alone), {name: held(together)[name]}, 1e-11)
        assert alone.modules[name]["u"].shape == together.modules[name]["u"].shape


def zeroed(f: Factors) -> Factors:
    return replace(f, b=torch.zeros_like(f.b))


def test_a_state_has_the_form_of_its_own_svd() -> None:
    """U orthonormal and the rows of C orthogonal, the longest first: so a readout is a slice. Nested states keep the
    order of the consensus instead."""
    for algebra in ("exact", "randomized"):
        for options in ({}, {"basis": "energy"}, {"sides": "both"}):
            fed = shared(build(glora(server_rank=5, algebra=algebra, **options), 2, **MANY), 2, noise=0.1)
            for x in served(fed)[0].modules.values():
                u, c = array(x["u"]), array(x["c"])
                s = np.linalg.svd(u @ c, compute_uv=False)[:5]
                np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-12)
                np.testing.assert_allclose(c @ c.T, np.diag(s**2), atol=1e-11 * s[0] ** 2)


@pytest.mark.parametrize(
    ("shape", "total_rank", "rank", "exact"),
    [
        ((4096, 4096), 160, 16, True),
        ((4096, 4096), 1600, 16, False),
        ((4096, 4096), 160000, 16, False),
        ((128, 128), 16000, 8, True),
        ((64, 4096), 16000, 8, True),
        ((4096, 11008), 1600, 600, True),
    ],
)
def test_the_rule_goes_by_shape(shape: tuple[int, int], total_rank: int, rank: int, exact: bool) -> None:
    assert prefers_exact(shape, total_rank, rank) is exact


@pytest.mark.parametrize("basis", ["projector", "energy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_both_algebras_agree_on_a_large_stack(basis: Any, dtype: torch.dtype) -> None:
    """c = 800 beside 400×300: the same leading part to a hundredth of T, in the precision of the factors."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 10)))[0] for size in (400, 300))
    terms = []
    votes = np.logspace(0, -2, 10)  # the consensus is determined: clients differ most in its last directions
    for _ in range(80):
        b = u + 0.3 * rng.standard_normal((400, 10)) / 20 / votes**0.5
        a = np.diag(np.logspace(0, -1, 10)) @ v.T + 0.002 * rng.standard_normal((10, 300))
        terms.append(Contribution(LowRank(torch.from_numpy(b).to(dtype), torch.from_numpy(a).to(dtype))))
    sums = Sums(terms, [1 / 80] * 80)
    wanted = ApproximationSpec(6, basis)
    (exact,) = solve_exactly([sums], wanted)
    found = run_procedure(procedure_for((400, 300), wanted, "key"), sums)
    assert found.state.b.dtype == exact.state.b.dtype == dtype
    difference = np.linalg.norm(array(found.state.dense()) - array(exact.state.dense()))
    assert difference < 1e-2 * exact.size_squared**0.5
    target = sum(array(x.own.dense()) for x in terms) / 80
    lost = np.linalg.norm(array(found.state.dense()) - target) ** 2
    # Eight probes of a loss that one direction may dominate: σ = (2/8)^½.
    assert found.lost_squared == pytest.approx(lost, rel=2.5)
    assert lost == pytest.approx(exact.lost_squared, rel=0.05)
    assert found.size_squared == pytest.approx(exact.size_squared, rel=0.01)


def test_methods_with_a_query_procedure_are_those_that_need_one() -> None:
    """Methods that need each client's factors and have a result that does not grow with them."""
    assert [name for name, make in METHODS.items() if make().finish_by_queries] == ["glora", "glora_plus", "flexlora"]
