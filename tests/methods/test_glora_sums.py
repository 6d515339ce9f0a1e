"""GLoRA in sums: the state that GLoRA makes of the clients' own factors, from two or three vector sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain, pairwise
from typing import Any

import federations
import numpy as np
import pytest
import test_laws
import torch
from federations import Array, Case, Federation, array, assert_same, build, encoded, gauge, received, regauged, served
from test_laws import evaluate, various
from test_spectral import held, shared

from fedspan.methods import glora
from fedspan.methods.base import Method, ServerState, aggregate
from fedspan.methods.folds import Partial
from fedspan.methods.glora_sums import glora_sums
from fedspan.methods.messages import Factors, Request, Update
from fedspan.wire.precision import rounded_update

FEW: dict[str, Any] = {"shapes": ((60, 50), (48, 64)), "ranks": (4, 4, 2, 1, 3), "counts": (5, 1, 20, 7, 3)}
"""Σ r_k = 14 directions, just what l = 14 columns show at R = 6."""
MANY: dict[str, Any] = {"shapes": ((60, 50), (48, 64), (9, 30)), "ranks": (4, 2) * 8, "counts": range(1, 17)}
"""Σ r_k = 48 directions beside l = 14 columns at R = 6; the third layer is narrower than that."""
passes = pytest.mark.parametrize("number", [1, 2], ids=["one pass", "two passes"])


def exchanged(fed: Federation, edit: Callable[[int, list[Update]], list[Update]] | None = None) -> list[ServerState]:
    """The states of a round, before it and after each exchange; `edit` changes what arrives."""
    states = [fed.state]
    for number in range(len(fed.method.exchanges)):
        state = replace(states[-1], exchange=number)
        answers = encoded(replace(fed, state=state))
        states.append(aggregate(fed.method, state, edit(number, answers) if edit else answers)[0])
    return states


def answers(fed: Federation) -> list[list[Update]]:
    """What leaves the sites, exchange by exchange."""
    sent: list[list[Update]] = []

    def note(number: int, updates: list[Update]) -> list[Update]:
        sent.append(updates)
        return updates

    exchanged(fed, note)
    return sent


def as_glora(fed: Federation, **options: Any) -> Federation:
    """The same clients in front of a server that has their factors."""
    return replace(fed, method=glora(**options))


def shapes(update: Update) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything in it."""
    parts = {f"{name}/{part}": tuple(t.shape) for name, p in update.modules.items() for part, t in p.tensors().items()}
    return parts | {name: tuple(t.shape) for name, t in (*update.dense.items(), *update.moments.items())}


def projectors(state: ServerState) -> dict[str, Array]:
    return {name: array(x["u"]) @ array(x["u"]).T for name, x in state.modules.items()}


def lost(fed: Federation) -> float:
    """‖T − U·C‖² / ‖T‖² over all modules."""
    found, ideal = held(served(fed)[0]), fed.ideal
    return sum(np.linalg.norm(ideal[n] - found[n]) ** 2 for n in ideal) / sum(
        np.linalg.norm(t) ** 2 for t in ideal.values()
    )


@passes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("clients", [FEW, {**FEW, "ranks": (2,) * 5}, {**FEW, "ranks": (5,), "counts": (3,)}])
def test_few_directions_give_the_state_of_glora(number: int, dtype: torch.dtype, clients: dict[str, Any]) -> None:
    """Mixed ranks, equal ranks, one client: the same consensus subspace and the same U·C as from the factors, though
    R = 6 holds only a part of T; the heads too, and in the round after as in the first."""
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    method = glora_sums(passes=number)
    first = build(method, 3, **clients, server_rank=6, dtype=dtype)
    for fed in (first, build(method, 4, **clients, server_rank=6, dtype=dtype, start=served(first)[0])):
        state, plain = served(fed)[0], served(as_glora(fed, algebra="exact"))[0]
        assert_same(projectors(state), projectors(plain), tolerance)
        assert_same(held(state), held(plain), tolerance)
        torch.testing.assert_close(dict(state.dense), dict(plain.dense))
        assert state.round_num == plain.round_num
        for rank in (1, 4, 6, None):
            assert_same(received(fed, state, rank), received(as_glora(fed), plain, rank), 2 * tolerance)


@passes
def test_a_narrow_layer_is_asked_for_its_whole_projector_sum(number: int) -> None:
    """m ≤ l: however many clients, the sum of their projectors itself, so that nothing is approximated."""
    fed = build(glora_sums(passes=number), 5, **{**MANY, "shapes": ((14, 30), (9, 8))}, server_rank=6)
    assert_same(held(served(fed)[0]), held(served(as_glora(fed, algebra="exact"))[0]), 1e-12)
    for update in answers(fed)[0]:
        assert shapes(update)["layer0/sketch"] == (14, 14)


def test_two_passes_ask_what_randomized_glora_asks() -> None:
    """However many directions: the very basis that GLoRA finds by queries about factors."""
    fed = build(glora_sums(passes=2), 6, **MANY, server_rank=6)
    plain = held(served(as_glora(fed, algebra="randomized"))[0])
    assert_same(held(served(fed)[0]), plain, 1e-7)  # Ω is orthonormal to float32
    once = held(served(replace(fed, method=glora_sums()))[0])
    assert np.linalg.norm(once["layer0"] - plain["layer0"]) > 0.05 * np.linalg.norm(plain["layer0"])


STRENGTHS = {"flat": np.ones(200), "decaying": 1 / np.arange(1, 201)}


def crowd(method: Method, clients: int, spectrum: str, seed: int) -> Federation:
    """Clients who saw one target L D² Rᵀ through eight random directions each: X_k = L D Z_k Z_kᵀ D Rᵀ."""
    m, n, strengths = 256, 224, STRENGTHS[spectrum]
    fed = build(method, seed, [(m, n)], [8] * clients, [1] * clients, server_rank=16)
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, len(strengths))))[0] * strengths for size in (m, n))
    updates = []
    for update in fed.updates:
        seen = rng.standard_normal((len(strengths), 8))
        pair = (torch.from_numpy(x) for x in (left @ seen, seen.T @ right.T))
        updates.append(replace(update, modules={"layer0": Factors(*pair, update.factors("layer0").scaling)}))
    return replace(fed, updates=tuple(updates))


@pytest.mark.parametrize(
    ("spectrum", "clients", "once", "twice"),
    [
        ("flat", 10, 0.36, 0.08),
        ("flat", 50, 0.21, 0.08),
        ("flat", 100, 0.16, 0.07),
        ("decaying", 10, 0.01, 3e-5),
        ("decaying", 50, 0.01, 3e-5),
        ("decaying", 100, 0.01, 3e-5),
    ],
)
def test_many_directions_cost_a_pass_or_a_little(spectrum: str, clients: int, once: float, twice: float) -> None:
    """Σ r_k = 80 … 800 directions at l = 24: what is lost of T beyond GLoRA's own loss, as a share of that where the
    spectrum is flat (GLoRA itself then loses most of T), of ‖T‖² where it decays."""
    plain, *sums = (
        np.mean([lost(crowd(method, clients, spectrum, seed)) for seed in range(2)])
        for method in (glora(algebra="exact"), glora_sums(), glora_sums(passes=2))
    )
    scale = plain if spectrum == "flat" else 1.0
    for found, most in zip(sums, (once, twice), strict=True):
        assert plain * (1 - 1e-2) < found < plain + most * scale
    assert sums[1] < sums[0]


@passes
def test_what_leaves_a_site_says_nothing_of_its_rank_or_data_by_its_shape(number: int) -> None:
    """The same names and shapes from every client, (m, l) and (l, n), be its rank 1 or 7, or did it learn nothing; and
    the same from one client as from many, W being padded."""
    at = {"shapes": ((60, 50), (48, 64), (9, 30)), "server_rank": 6}
    mixed = build(glora_sums(passes=number), 7, ranks=(1, 7, 3, 5), counts=(1, 2, 3, 4), silent=(3,), **at)
    idle = build(glora_sums(passes=number), 8, ranks=(1, 1), counts=(1, 1), silent=(0, 1), **at)
    seen = [[shapes(u) for u in sent] for fed in (mixed, idle) for sent in answers(fed)]
    half = len(seen) // 2
    for exchange in range(half):
        measured = [*seen[exchange], *seen[exchange + half]]
        assert all(one == measured[0] for one in measured)
    first, *_, last = seen
    assert first[0]["layer0/sketch"] == (60, 14)
    width = 14 * number
    assert last[0] == {"layer0/core": (width, 50), "layer1/core": (width, 64), "layer2/core": (9, 30)}
    assert number == 1 or seen[1][0] == {"layer0/sketch": (60, 14), "layer1/sketch": (48, 14)}


@passes
def test_sums_may_be_taken_in_any_grouping(number: int) -> None:
    """Every exchange folded as a tree of three servers ends in the state of one server, to rounding."""
    fed = build(glora_sums(passes=number), 9, **FEW, server_rank=6)
    one = exchanged(fed)[-1]
    state = fed.state
    for exchange in range(len(fed.method.exchanges)):
        state = replace(state, exchange=exchange)
        fold, sent = fed.method.exchanges[exchange].fold, encoded(replace(fed, state=state))
        groups = [reduce(fold.add, part, Partial()) for part in (sent[3:], sent[:1], [], sent[1:3])]
        state, _ = fed.method.finish(state, reduce(fold.merge, reversed(groups)))
    assert_same(held(state), held(one), 1e-9)
    torch.testing.assert_close(dict(state.dense), dict(one.dense))


@passes
def test_clients_who_learnt_nothing_name_no_direction(number: int) -> None:
    """B = 0: a zero sketch and a zero core. All of them: the server stays at the base, and the next round works."""
    fed = build(glora_sums(passes=number), 10, **FEW, server_rank=6, silent=range(5))
    for update in (u for sent in answers(fed) for u in sent):
        assert not any(bool(t.any()) for p in update.modules.values() for t in p.tensors().values())
    state, measured = served(fed)
    assert not any(x["u"].shape[1] for x in state.modules.values())
    assert measured["truncation_error"] == 0.0
    after = build(fed.method, 11, **FEW, server_rank=6, start=state)
    assert_same(held(served(after)[0]), held(served(as_glora(after, algebra="exact"))[0]), 1e-9)
    some = build(fed.method, 12, **FEW, server_rank=6, silent=(0, 2))
    assert_same(held(served(some)[0]), held(served(as_glora(some, algebra="exact"))[0]), 1e-9)


@passes
def test_every_message_is_the_same_in_every_gauge(number: int) -> None:
    """Not only what the server makes of them: the sketch and the core are of the product."""
    fed = build(glora_sums(passes=number), 13, **FEW, server_rank=6)
    rng = np.random.default_rng(0)
    other = regauged(fed, lambda k, rank: gauge(rng, rank, 1e3))
    for mine, theirs in zip(chain(*answers(fed)), chain(*answers(other)), strict=True):
        for name, payload in mine.modules.items():
            for (part, x), (_, y) in zip(
                payload.tensors().items(), theirs.modules[name].tensors().items(), strict=True
            ):
                torch.testing.assert_close(
                    x.abs() if part == "core" else x, y.abs() if part == "core" else y, rtol=0, atol=1e-8
                )


@passes
def test_nothing_of_a_round_is_left_after_it(number: int) -> None:
    """What lives between the exchanges is gone at the end, Ω is new every round, and of it nothing is sent."""
    fed = build(glora_sums(passes=number), 14, **MANY, server_rank=6)
    *between, last = exchanged(fed)[1:]
    assert all(state.extra for state in between)
    assert not last.extra
    assert (last.exchange, last.round_num) == (0, 1)
    drawn = [fed.method.broadcast(state, Request(2)) for state in (fed.state, last)]
    for sent in drawn:
        assert sent.seeded == {"subspaces"}
    for name, space in drawn[0].subspaces.items():
        other = drawn[1].subspaces[name].basis
        square = space.basis.shape[0] == space.basis.shape[1]
        assert torch.equal(space.basis, other) == square
    later = fed.method.broadcast(replace(between[0], exchange=1), Request(2))
    assert not any((later.adapter, later.dense, later.patch, later.seeded))


@passes
def test_what_is_lost_is_estimated_without_bias(number: int) -> None:
    """Over 100 draws of Ω and probes: the mean of (estimate − measured) within 5 standard errors of zero, and a spread
    that makes the estimate of use."""
    errors = []
    for seed in range(100):
        fed = build(glora_sums(passes=number), 15, [(40, 36)], (4,) * 8, range(1, 9), server_rank=4)
        fed = replace(fed, state=replace(fed.state, template=replace(fed.template, seed=seed)))
        state, measured = served(fed)
        size = np.linalg.norm(held(state)["layer0"]) ** 2
        assert measured["truncation_error_estimated"] == 1.0
        share = measured["truncation_error"] ** 2
        estimated = size * share / (1 - share)
        errors.append(estimated / np.linalg.norm(fed.ideal["layer0"] - held(state)["layer0"]) ** 2 - 1)
    assert abs(np.mean(errors)) < 5 * np.std(errors) / len(errors) ** 0.5
    assert 0.05 < np.std(errors) < 0.5


@passes
def test_a_client_lost_between_the_exchanges_counts_as_far_as_it_came(number: int) -> None:
    """Its projector and its head have been summed; its core is not, and the others' weights sum to one without it. The
    loss cannot be estimated then."""
    fed = build(glora_sums(passes=number), 16, **FEW, server_rank=14)
    *_, after = exchanged(fed, lambda exchange, sent: sent if exchange == 0 else sent[1:])
    rest = replace(fed, updates=fed.updates[1:])
    assert_same(held(after), rest.ideal, 1e-9)
    torch.testing.assert_close(after.dense["head"], served(fed)[0].dense["head"])
    state = replace(exchanged(fed)[-2], exchange=number)
    _, measured = aggregate(fed.method, state, encoded(replace(fed, state=state))[1:])
    assert set(measured) == {"server_rank"}


@pytest.mark.parametrize(("kind", "worse"), [("bfloat16", 0.006), ("int8", 0.03)])
@passes
def test_narrow_sums_lose_no_more_than_their_rounding(
    number: int, kind: Any, worse: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sketches and cores in 8 bits: the small noise in Ωᵀ S Ω is not blown up into directions of its own."""
    fed = shared(build(glora_sums(passes=number), 17, **{**MANY, "dtype": torch.float32}, server_rank=6), 17)
    exact = held(served(fed)[0])
    assert_same(exact, fed.ideal, 1e-4)
    monkeypatch.setattr(
        federations, "encoded", lambda fed, updates=None: [rounded_update(u, kind)[0] for u in encoded(fed, updates)]
    )
    assert_same(held(served(fed)[0]), fed.ideal, worse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_laws_hold_with_two_passes(dtype: torch.dtype) -> None:
    """`METHODS` has the method with one pass; these are the laws that a basis can break."""
    case = Case("glora_sums", lambda: glora_sums(passes=2))
    test_laws.test_exact_methods_deliver_the_ideal_update(case, dtype)
    if dtype == torch.float64:
        test_laws.test_gauge_invariant_methods_do_not_see_the_gauge(case, 1e6)
        test_laws.test_weights_are_shares_of_the_examples(case)
        test_laws.test_functions_are_pure(case)
        test_laws.test_no_server_forms_the_dense_matrix(case)
        assert various(case) == (1, 3, 5)


@pytest.mark.parametrize("options", [{}, {"passes": 2}, {"server_rank": "double"}, {"server_rank": 5, "passes": 2}])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (12, 12), (10, 30)])
def test_traffic_is_the_formula_at_every_option(options: dict[str, Any], shape: tuple[int, int]) -> None:
    """m less than l, between l and 2l, and more."""
    method, rank = glora_sums(**options), 3
    kept = {"double": 2 * rank, None: rank}.get(options.get("server_rank"), options.get("server_rank"))
    found = federations.traffic(method, rank, shapes=[shape], ranks=[rank] * 4, counts=range(1, 5), server_rank=rank)
    symbols = {"m": shape[0], "n": shape[1], "r": rank, "R": kept}
    for numbers, formula in zip(found, (method.info.traffic_up, method.info.traffic_down), strict=True):
        assert numbers == evaluate(formula, **symbols)


def test_a_larger_server_keeps_more() -> None:
    """`server_rank` is what it is in GLoRA: the rank of the state, whatever clients can train."""
    errors: list[float] = []
    for server_rank, rank in ((2, 2), (None, 6), (9, 9), ("double", 12)):
        fed = build(glora_sums(server_rank, passes=2), 18, **FEW, server_rank=6)
        state, measured = served(fed)
        assert measured["server_rank"] == rank == state.modules["layer0"]["u"].shape[1]
        errors.append(lost(fed))
    assert all(x > y for x, y in pairwise(errors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 3}, r"method\.passes = 3: expected 1 or 2"),
        ({"server_rank": 0}, r"method\.server_rank = 0: expected"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glora_sums(**options)


def test_every_exchange_is_a_sum() -> None:
    for number in (1, 2):
        method = glora_sums(passes=number)
        assert method.secure_sum
        asked: Sequence[str] = [exchange.ask for exchange in method.exchanges]
        assert asked == ["train", *["again"] * number]
