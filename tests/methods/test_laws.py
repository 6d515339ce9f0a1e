"""The laws of every method, driven by the tags of its `MethodInfo`, against a dense float64 oracle."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import (
    ADAPTER,
    CASES,
    FEDERATED,
    TOLERANCE,
    Case,
    Federation,
    array,
    assert_same,
    build,
    distance,
    encoded,
    federations,
    gauge,
    numel,
    received,
    regauged,
    served,
    traffic,
    weighted_sum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peaks import LargestTensor

from fedspan.algebra.lowrank import LowRank
from fedspan.methods.base import aggregate
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Factors, Payload, Request, Update, Vector
from fedspan.methods.patches import patch_numel

laws = settings(deadline=None, max_examples=12, derandomize=True)
EXACT = [case for case in FEDERATED if case.info.exact]
GAUGED = [case for case in ADAPTER if not case.frozen_a]
"""With A fixed for everybody there is no gauge to change."""
PLAIN = [case for case in FEDERATED if case.id not in ("fedadagrad", "fedadam", "fedyogi")]
"""Methods that average; an adaptive server optimizer's step has a size of its own."""
SUMS = [case for case in CASES if case.make().secure_sum]


def by_id(cases: list[Case], **tags: bool) -> pytest.MarkDecorator:
    chosen = [case for case in cases if all(getattr(case.info, tag) is value for tag, value in tags.items())]
    return pytest.mark.parametrize("case", chosen, ids=[case.id for case in chosen])


def various(case: Case) -> tuple[int, ...]:
    """Three ranks, different ones where the method takes them."""
    return (1, 3, 5) if case.info.hetero_rank and case.info.trains == "adapter" else (3, 3, 3)


def same_received(fed: Federation, other: Federation, tolerance: float | None = None) -> None:
    """Both federations give a client of full rank the same update."""
    first, second = served(fed)[0], served(other)[0]
    assert_same(received(other, second), received(fed, first), tolerance or TOLERANCE[fed.dtype])
    for name in fed.state.dense:
        torch.testing.assert_close(second.dense[name], first.dense[name])


@by_id(EXACT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_exact_methods_deliver_the_ideal_update(case: Case, dtype: torch.dtype) -> None:
    """Readout and patches are T = Σ p_k s_k B_k A_k for any shapes, ranks, scalings, counts and silent clients."""

    @laws
    @given(fed=federations(case, dtype=dtype))
    def law(fed: Federation) -> None:
        assert_same(received(fed, served(fed)[0]), fed.ideal, TOLERANCE[dtype])

    law()


@by_id(FEDERATED, exact=False)
@pytest.mark.parametrize("seed", range(5))
def test_the_others_visibly_do_not(case: Case, seed: int) -> None:
    """A method not tagged exact differs from T on generic inputs by more than any rounding, in its second round.

    In its first a heavy ball has no speed yet, and the ranks are mixed where that is what makes the difference.
    """
    drawn = {"ranks": various(case), "counts": (1, 2, 3)}
    first = build(case, seed, **drawn)
    fed = build(case, seed + 100, **drawn, start=served(first)[0])
    assert distance(received(fed, served(fed)[0]), fed.ideal) > 0.05


@by_id(GAUGED, gauge_invariant=True)
@pytest.mark.parametrize("condition", [1e1, 1e6])
def test_gauge_invariant_methods_do_not_see_the_gauge(case: Case, condition: float) -> None:
    """(B G, G⁻¹ A) for a G of each client's own, as ill-conditioned as 1e6, gives the same update."""

    @laws
    @given(fed=federations(case), seed=st.integers(0, 1000))
    def law(fed: Federation, seed: int) -> None:
        rng = np.random.default_rng(seed)
        other = regauged(fed, lambda k, rank: gauge(rng, rank, condition))
        # Rounding a product of condition κ moves it by κ·eps, whatever the server does with it.
        assert_same(received(other, served(other)[0]), received(fed, served(fed)[0]), 1e-13 * condition + 1e-11)

    law()


@by_id(GAUGED, gauge_invariant=True)
def test_adversarial_scalings_of_the_factors_cancel(case: Case) -> None:
    """B·1e8 with A·1e-8 at every other client changes nothing, in float32 as well."""
    for dtype, power in ((torch.float64, 8.0), (torch.float32, 4.0)):
        fed = build(case, 3, ranks=(2, 2, 2, 2), counts=(1, 5, 2, 9), dtype=dtype)
        other = regauged(fed, lambda k, rank, power=power: np.eye(rank) * 10.0 ** (power * (k % 2)))
        size = 0.0
        if case.id == "fedex_lora":
            # Adapter and patch are then both of the size of s·B̄Ā, and their sum rounds as they do.
            means = [weighted_sum(other, lambda u, p=part: array(getattr(u.factors("layer0"), p))) for part in "ba"]
            size = float(np.prod([np.linalg.norm(mean) for mean in means])) * 8
        assert_same(received(other, served(other)[0]), fed.ideal, 4 * TOLERANCE[dtype], size)


@by_id(ADAPTER, gauge_invariant=False)
@pytest.mark.parametrize("seed", range(5))
def test_averages_of_factors_visibly_move_under_a_gauge(case: Case, seed: int) -> None:
    """A method not tagged gauge-invariant changes when the clients merely re-factor the same updates."""
    fed = build(case, seed, ranks=various(case), counts=(1, 2, 3))
    rng = np.random.default_rng(seed)
    other = regauged(fed, lambda k, rank: gauge(rng, rank, 10.0))
    assert_same(other.ideal, fed.ideal, 1e-12)
    assert distance(received(other, served(other)[0]), received(fed, served(fed)[0])) > 0.05


@by_id([case for case in ADAPTER if case.id in ("fedit", "hetlora", "flora_na")])
def test_a_gauge_common_to_all_clients_is_another_matter(case: Case) -> None:
    """FedIT's B̄Ā survives a G that all clients share; what breaks it is that each has its own."""
    fed = build(case, 1, ranks=(3, 3, 3), counts=(1, 2, 3))
    g = gauge(np.random.default_rng(0), 3, 10.0)
    other = regauged(fed, lambda k, rank: g)
    same_received(fed, other, 1e-11)


@by_id(FEDERATED)
def test_weights_are_shares_of_the_examples(case: Case) -> None:
    """Renaming the clients, splitting one in two, and scaling every count change nothing."""

    @laws
    @given(fed=federations(case, min_clients=2), factor=st.sampled_from([1e-3, 7.0, 1e6]), seed=st.integers(0, 99))
    def law(fed: Federation, factor: float, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(fed.updates))
        renamed = tuple(replace(u, client_id=f"client{i}") for u, i in zip(fed.updates, order, strict=True))
        same_received(fed, replace(fed, updates=renamed))
        first = fed.updates[0]
        half = replace(first, num_examples=first.num_examples / 2)
        halves = (half, replace(half, client_id="twin"), *fed.updates[1:])
        same_received(fed, replace(fed, updates=halves))
        more = tuple(replace(u, num_examples=u.num_examples * factor) for u in fed.updates)
        same_received(fed, replace(fed, updates=more))

    law()


@by_id(FEDERATED)
def test_unequal_counts_count(case: Case) -> None:
    """The weights are not merely accepted: exchanging two clients' counts visibly changes the result."""
    fed = build(case, 2, ranks=(3, 3), counts=(1, 20))
    swapped = tuple(replace(u, num_examples=21 - u.num_examples) for u in fed.updates)
    other = replace(fed, updates=swapped)
    assert distance(received(other, served(other)[0]), received(fed, served(fed)[0])) > 0.1


@by_id(FEDERATED)
def test_two_partial_servers_merge_into_one(case: Case) -> None:
    """merge(fold(first half), fold(second half)) finishes as the fold of all, and an empty fold changes nothing."""

    @laws
    @given(fed=federations(case, min_clients=2), cut=st.integers(0, 4))
    def law(fed: Federation, cut: int) -> None:
        fold = fed.method.exchanges[0].fold
        sent = encoded(fed)
        parts = [Partial(), Partial()]
        for i, update in enumerate(sent):
            parts[i >= cut] = fold.add(parts[i >= cut], update)
        merged = fold.merge(fold.merge(parts[1], Partial()), parts[0])
        assert merged.num_clients == len(sent)
        one = aggregate(fed.method, fed.state, sent)[0]
        tree = fed.method.finish(fed.state, merged)[0]
        assert_same(received(fed, tree), received(fed, one), TOLERANCE[fed.dtype])
        torch.testing.assert_close(dict(tree.dense), dict(one.dense))

    law()


@by_id([case for case in CASES if case in PLAIN or case not in FEDERATED])
def test_one_client_reproduces_its_own_update(case: Case) -> None:
    """With a single participant every method, control and baseline gives back what that client learned."""

    @laws
    @given(fed=federations(case, max_clients=1))
    def law(fed: Federation) -> None:
        if fed.method.info.personalised:
            sent = fed.method.broadcast(fed.state, Request(None))
            kept = fed.method.encode(fed.updates[0], sent, None)[1]
            again = fed.method.start(fed.method.broadcast(served(fed)[0], Request(None)), kept)
            own = {name: f.scaling * array(f.b) @ array(f.a) for name, f in again.adapter.items()}
            assert_same(own, fed.ideal, TOLERANCE[fed.dtype])
            torch.testing.assert_close(again.dense["head"], fed.updates[0].dense["head"])
            return
        state = served(fed)[0]
        assert_same(received(fed, state), fed.ideal, TOLERANCE[fed.dtype])
        torch.testing.assert_close(state.dense["head"], fed.updates[0].dense["head"])

    law()


@by_id(PLAIN)
def test_identical_clients_reproduce_their_update(case: Case) -> None:
    """Where all agree, averaging anything in any way gives that."""

    @laws
    @given(fed=federations(case, max_clients=1), counts=st.lists(st.integers(1, 99), min_size=2, max_size=5))
    def law(fed: Federation, counts: list[int]) -> None:
        first = fed.updates[0]
        copies = tuple(replace(first, client_id=f"c{i}", num_examples=n) for i, n in enumerate(counts))
        assert_same(received(fed, served(fed, copies)[0]), fed.ideal, TOLERANCE[fed.dtype])

    law()


@by_id(PLAIN)
def test_heads_are_averaged_under_every_method(case: Case) -> None:
    """A new classification head is dense and averaged by the counts, whatever is done with the adapters."""
    fed = build(case, 4, ranks=(2, 2, 2), counts=(1, 10, 100))
    mean = weighted_sum(fed, lambda u: array(u.dense["head"]))
    np.testing.assert_allclose(array(served(fed)[0].dense["head"]), mean, rtol=1e-12)


@by_id(FEDERATED, exact=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_accumulates_in_float32(case: Case, dtype: torch.dtype) -> None:
    """The mean of half-precision updates is that of their values: no sum, product or count is rounded to half."""
    fed = build(case, 5, ranks=(4, 4, 4), counts=(40000, 50000, 60001), dtype=dtype)
    assert_same(received(fed, served(fed)[0]), fed.ideal, TOLERANCE[dtype])


@by_id(ADAPTER, hetero_rank=False)
def test_methods_of_one_rank_refuse_another(case: Case) -> None:
    """Both when a client of another rank asks, and when an adapter of another rank comes back."""
    fed = build(case, ranks=(4, 4), counts=(1, 1))
    with pytest.raises(ValueError, match="rank 2: expected rank 4"):
        fed.method.broadcast(fed.state, Request(2))
    f = fed.updates[0].factors("layer0")
    modules = {name: Factors(f.b[:, :2], f.a[:2], f.scaling) for name in fed.updates[0].modules}
    smaller = replace(fed.updates[0], modules=modules)
    sent = fed.method.broadcast(fed.state, Request(4))
    with pytest.raises((ValueError, RuntimeError), match=r"rank 2: expected rank 4|equal size"):
        aggregate(fed.method, fed.state, [fed.method.encode(u, sent, None)[0] for u in (smaller, fed.updates[1])])


@by_id(ADAPTER, hetero_rank=True)
def test_each_client_gets_its_own_rank(case: Case) -> None:
    """A client of rank r is sent adapters of rank r with the scaling α/r, before and after a round."""
    fed = build(case, ranks=(1, 2, 5), counts=(1, 2, 3))
    for state in (fed.state, served(fed)[0]):
        for rank in (1, 2, 5):
            for name, f in fed.method.broadcast(state, Request(rank)).adapter.items():
                m, n = fed.template.modules[name]
                assert (f.b.shape, f.a.shape) == ((m, rank), (rank, n))
                assert f.scaling == pytest.approx(16 / rank)


@by_id(CASES)
def test_the_start_is_the_base_itself(case: Case) -> None:
    """Before the first round every adapter is ΔW = 0, so nobody moves the base; one factor is not, so it can learn."""
    fed = build(case, ranks=(3,), counts=(1,))
    for rank in (None, 3):
        sent = fed.method.start(fed.method.broadcast(fed.state, Request(rank)), None)
        assert not sum(map(patch_numel, (sent.patch, *sent.news)))
        for f in sent.adapter.values():
            assert not (f.b @ f.a).any()
            assert bool(f.b.any()) != bool(f.a.any())


@by_id(SUMS)
def test_sums_hold_no_individual_update(case: Case) -> None:
    """What a secure sum reveals: as many numbers from thirty clients as from one, and none of a client's own."""
    one, many = (build(case, 6, ranks=[3] * k, counts=range(1, k + 1), server_rank=3) for k in (1, 30))
    sizes = []
    for fed in (one, many):
        partial = Partial()
        for update in encoded(fed):
            partial = fed.method.exchanges[0].fold.add(partial, update)
        assert partial.collected == ()
        sizes.append(numel(partial.dense) + sum(numel(t) for t in partial.sums.values()))
    assert sizes[0] == sizes[1]
    for update in encoded(many):
        for name, payload in update.modules.items():
            for part, value in payload_tensors(payload).items():
                assert not torch.allclose(partial.sums[name][part], value * update.num_examples)


@by_id([case for case in CASES if case not in SUMS])
def test_the_other_folds_keep_every_update(case: Case) -> None:
    """A method without the tag does need each client's factors, so the tag is not withheld for nothing."""
    fed = build(case, ranks=(2, 2, 2), counts=(1, 2, 3))
    partial = Partial()
    for update in encoded(fed):
        partial = fed.method.exchanges[0].fold.add(partial, update)
    assert [u.client_id for u in partial.collected] == ["client0", "client1", "client2"]


def payload_tensors(payload: Payload) -> dict[str, torch.Tensor]:
    return dict(payload.values) if isinstance(payload, Vector) else {"a": payload.a, "b": payload.b}


def evaluate(formula: str, **symbols: int) -> int:
    """A traffic formula such as r(m+n) + min((K-1)r(m+n), mn), juxtaposition being a product."""
    tokens = re.findall(r"min|max|\d+|[a-zA-Z]|[-+(),/]", formula)
    assert "".join(tokens) == formula.replace(" ", "")
    text = ""
    for before, token in zip(["", *tokens], tokens, strict=False):
        joined = re.fullmatch(r"\d+|[a-zA-Z]|\)", before) and re.fullmatch(r"min|max|\d+|[a-zA-Z]|\(", token)
        text += "*" * bool(joined) + (str(symbols[token]) if re.fullmatch(r"[a-zA-Z]", token) else token)
    number = eval(text, {"__builtins__": {}, "min": min, "max": max})
    assert number == int(number)
    return int(number)


def test_formulas_are_read_as_products() -> None:
    symbols = {"r": 2, "m": 10, "n": 20, "K": 3, "c": 6}
    assert evaluate("r(m+n) + min((K-1)r(m+n), mn)", **symbols) == 60 + 120
    assert evaluate("min(c(m+n), mn)", **symbols) == 180
    assert evaluate("rr/4", **symbols) == 1
    assert evaluate("0", **symbols) == 0


@by_id(FEDERATED)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (12, 12)])
def test_traffic_is_the_formula(case: Case, shape: tuple[int, int]) -> None:
    """Numbers that a client sends and is sent in a round after one that it took part in, as `MethodInfo` says.

    What the seed gives, scalars (scalings, HetLoRA's norm) and heads are not counted.
    """
    (m, n), r, clients = shape, 3, 4
    found = traffic(case, r, shapes=[shape], ranks=[r] * clients, counts=range(1, clients + 1), server_rank=r)
    kept = 2 * r if case.id == "glora_plus" else r
    symbols = {"m": m, "n": n, "r": r, "K": clients, "c": clients * r, "R": kept}
    info = case.info
    for numbers, formula in zip(found, (info.traffic_up, info.traffic_down), strict=True):
        assert numbers in [evaluate(one, **symbols) for one in formula.split(" or ")]


def test_the_recorder_sees_a_dense_product() -> None:
    with LargestTensor() as largest:
        LowRank(torch.zeros(300, 2), torch.zeros(2, 200)).dense()
    assert largest.numel == 300 * 200


@by_id(ADAPTER)
def test_no_server_forms_the_dense_matrix(case: Case) -> None:
    """Folding, finishing and reading out make nothing larger than a few stacks of factors: O(c(m+n)), never m·n."""
    size, r, clients = 2048, 4, 3
    fed = build(case, shapes=[(size, size)], ranks=[r] * clients, counts=[1, 2, 3], dtype=torch.float32, server_rank=r)
    with LargestTensor() as largest:
        for _ in range(2):
            state, _ = served(fed)
            fed.method.broadcast(state, Request(r))
            fed = replace(fed, state=state)
    c = clients * r
    assert r * size <= largest.numel <= 4 * c * size
    assert largest.numel < size * size / 8


@by_id(CASES)
def test_functions_are_pure(case: Case) -> None:
    """Serving the same updates twice from the same state gives the same bits: nothing is kept or written in place."""
    fed = build(
        case, 8, ranks=(2,) * 3 if not case.info.pooled else (2,), counts=(3, 1, 2)[: 1 if case.info.pooled else 3]
    )
    before = [t.clone() for t in all_tensors(fed.updates)]
    first, second = served(fed)[0], served(fed)[0]
    for name in first.modules:
        for part, value in first.modules[name].items():
            assert torch.equal(value, second.modules[name][part])
    assert all(torch.equal(x, y) for x, y in zip(before, all_tensors(fed.updates), strict=True))


def all_tensors(updates: tuple[Update, ...]) -> list[torch.Tensor]:
    tensors = [t for u in updates for p in u.modules.values() for t in payload_tensors(p).values()]
    return tensors + [t for u in updates for t in u.dense.values()]


@by_id(FEDERATED)
def test_the_order_of_arrival_does_not_matter(case: Case) -> None:
    """Clients are folded in sorted id order, so the result is the same bit for bit whichever answered first."""
    fed = build(case, 9, ranks=(2, 2, 2), counts=(3, 1, 2))
    forward, backward = served(fed)[0], served(fed, fed.updates[::-1])[0]
    for name, value in received(fed, forward).items():
        np.testing.assert_array_equal(value, received(fed, backward)[name])


@by_id(FEDERATED)
def test_a_fold_refuses_what_it_cannot_average(case: Case) -> None:
    """No clients, one client twice, one without examples, one that lacks a weight or a module."""
    fed = build(case, ranks=(2, 2), counts=(1, 1))
    first, second = encoded(fed)
    with pytest.raises(ValueError, match="at least one client"):
        aggregate(fed.method, fed.state, [])
    with pytest.raises(ValueError, match="two updates of one client"):
        aggregate(fed.method, fed.state, [first, first])
    for count in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"client0 has .* examples"):
            aggregate(fed.method, fed.state, [replace(first, num_examples=count), second])
    for lacking in ([replace(first, dense={}), second], [first, replace(second, dense={})]):
        with pytest.raises(ValueError, match="different tensors"):
            aggregate(fed.method, fed.state, lacking)
    other_head = {**second.dense, "head": torch.zeros(5, 4, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"head in shapes \(3, 4\) and \(5, 4\)"):
        aggregate(fed.method, fed.state, [first, replace(second, dense=other_head)])
    if case.info.trains == "adapter":
        fewer = replace(second, modules={"layer0": second.modules["layer0"]})
        with pytest.raises((ValueError, KeyError), match=r"layer1|different modules"):
            aggregate(fed.method, fed.state, [first, fewer])
