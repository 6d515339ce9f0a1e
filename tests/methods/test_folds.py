"""Sums over many clients: as exact at 100,000 as at ten, in one type, in place or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, reduce
from typing import Any

import numpy as np
import pytest
import torch
from federations import Case, array, build, encoded, served

from fedspan.methods import METHODS, folds, glora
from fedspan.methods.base import aggregate
from fedspan.methods.folds import COLLECT, SUM, Fold, Partial, weighted_mean
from fedspan.methods.messages import Factors, Update, Vector
from fedspan.methods.queries import Contribution, Query, Sums, own_contribution
from fedspan.streaming import aggregate_stream

MANY = 100_000
LONG = partial(pytest.param, marks=pytest.mark.long)
SMALL: dict[str, Any] = {"shapes": ((3, 2),), "ranks": (2,), "counts": (7,), "dtype": torch.float32}


class Copies:
    """The same update from many clients, none of them held."""

    def __init__(self, update: Update, number: int) -> None:
        self.update, self.number = update, number

    def __iter__(self) -> Any:
        return (replace(self.update, client_id=f"{k:06d}") for k in range(self.number))


def tensors(partial: Partial) -> dict[str, torch.Tensor]:
    means = {f"/{name}": x for name, x in partial.mean_dense().items()}
    return means | {f"{name}/{part}": x for name in partial.sums for part, x in partial.mean(name).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedit", LONG("glora_sums")])
def test_the_mean_of_100_000_identical_clients_is_that_client(name: str) -> None:
    """To the last digit of float32; accumulated in float32 it would be off by 1e-3."""
    fed = build(Case(name, METHODS[name]), 1, **SMALL)
    (update,) = encoded(fed)
    total = reduce(SUM.add_in_place, Copies(update, MANY), Partial())
    one = SUM.add(Partial(), update)
    assert total.num_clients == MANY
    for key, wanted in tensors(one).items():
        found = tensors(total)[key]
        assert found.dtype == wanted.dtype == torch.float32
        np.testing.assert_allclose(array(found), array(wanted), rtol=2**-23)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedit", LONG("glora"), LONG("flexlora")])
def test_a_stream_of_100_000_identical_clients_ends_where_one_does(name: str) -> None:
    options = {} if name == "fedit" else {"algebra": "randomized"}
    fed = build(METHODS[name](**options), 1, **SMALL)
    number = MANY if name == "fedit" else MANY // 10
    (update,) = encoded(fed)
    found = aggregate_stream(fed.method, fed.state, Copies(update, number), block=64)[0]
    wanted = served(fed)[0]
    for part in ("a", "b") if name == "fedit" else ():
        np.testing.assert_allclose(
            array(found.modules["layer0"][part]), array(wanted.modules["layer0"][part]), rtol=1e-6
        )
    if name != "fedit":
        x, y = (array(s.modules["layer0"]["u"]) @ array(s.modules["layer0"]["c"]) for s in (found, wanted))
        assert np.linalg.norm(x - y) < 3e-6 * np.linalg.norm(y)
    np.testing.assert_allclose(array(found.dense["head"]), array(wanted.dense["head"]), rtol=2**-23)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["times", "columns", LONG("adjoint"), LONG("rows")])
def test_queries_about_100_000_clients_in_memory_are_as_exact(kind: Any) -> None:
    fed = build(glora(), 1, **SMALL)
    own = own_contribution(fed.updates[0], "layer0")
    x = torch.ones({"times": 2, "adjoint": 3, "columns": 3, "rows": 2}[kind], 1)
    (one,) = Sums([own], [1.0])((Query(kind, x),))
    (many,) = Sums([Contribution(own.own, own.scaling)] * MANY, [1 / MANY] * MANY)((Query(kind, x),))
    assert many.dtype == one.dtype
    np.testing.assert_allclose(array(many), array(one), rtol=3e-6)


def test_a_weighted_mean_of_many_is_exact() -> None:
    x = torch.rand((5, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted_mean([x] * 30_000, [1 / 30_000] * 30_000), x)
    assert weighted_mean([x.bfloat16()], [1.0]).dtype == torch.float32
    with pytest.raises(ValueError, match="mean of no tensors"):
        weighted_mean([], [])


@pytest.mark.parametrize("name", ["lora_fair", "flora_na", "raflora", "fedex_lora"])
def test_rules_on_collected_factors_average_many_as_exactly(name: str) -> None:
    """3,000 equal clients: adapter and patch of one, where float32 would be off by 4e-5."""
    options = {"weighting": "rb"} if name == "raflora" else {}
    fed = build(METHODS[name](**options), 1, **SMALL)
    (update,) = encoded(fed)
    many = aggregate(fed.method, fed.state, list(Copies(update, 3000)))[0]
    one = aggregate(fed.method, fed.state, [update])[0]
    for part, wanted in one.modules["layer0"].items():
        if part in ("a", "b"):
            np.testing.assert_allclose(array(many.modules["layer0"][part]), array(wanted), rtol=5e-6, atol=1e-6)


@pytest.mark.parametrize("fold", [SUM, COLLECT], ids=["sum", "collect"])
def test_in_place_is_the_same_to_the_bit(fold: Fold) -> None:
    """Mixed shapes, large tensors in pieces, half precision: as the pure fold, whose argument stays as it is."""
    rng = torch.Generator().manual_seed(3)

    def update(k: int, rank: int, kind: torch.dtype) -> Update:
        payload = Vector({"x": torch.randn((300, rank), generator=rng).to(kind), "y": torch.randn((7,), generator=rng)})
        head = torch.randn((200, 300), generator=rng).to(kind).mT
        return Update(f"c{k}", 3.0 + k, {"layer": payload}, {"head": head, "bias": torch.randn((), generator=rng)})

    kinds = (torch.float32, torch.bfloat16, torch.float32, torch.float32)
    updates = [update(k, rank, kind) for k, (rank, kind) in enumerate(zip((200, 200, 150, 200), kinds, strict=True))]
    pure, owned = Partial(), Partial()
    for x in updates:
        before = {key: value.clone() for key, value in pure.places().items()}
        next_one = fold.add(pure, x)
        assert all(torch.equal(before[key], value) for key, value in pure.places().items())
        pure, owned = next_one, fold.add_in_place(owned, x)
        assert (pure.num_clients, pure.weight, pure.kinds) == (owned.num_clients, owned.weight, owned.kinds)
        assert all(torch.equal(value, owned.places()[key]) for key, value in pure.places().items())
    assert all(value.dtype == torch.float32 for value in tensors(owned).values())
    assert len(owned.collected) == (0 if fold is SUM else 4)


def test_small_sums_are_joined_without_a_change_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ n_k x_k of many small tensors is one vector, added to in few calls: the bits are those of tensor by tensor."""
    rng = torch.Generator().manual_seed(0)

    def update(i: int) -> Update:
        drawn = [(torch.randn(9, 2, generator=rng), torch.randn(2, 7 + j, generator=rng)) for j in range(5)]
        modules = {f"m{j}": Factors(b, a, 1.0) for j, (b, a) in enumerate(drawn)}
        head = torch.randn(3, 4, generator=rng).to(torch.bfloat16)
        return Update(f"c{i}", 1.5 + i, modules, {"head": head})

    updates = [update(i) for i in range(4)]

    def folded() -> Partial:
        partial = Partial()
        for one in updates:
            partial = SUM.add_in_place(partial, one)
        return partial

    joined = folded()
    assert joined.joined is not None
    monkeypatch.setattr(folds, "_RUN", {"cpu": 30})  # some tensors a call, some alone
    pieces = folded()
    monkeypatch.setattr(folds, "_JOINED_BELOW", 0)
    plain = folded()
    assert plain.joined is None
    for other in (joined, pieces):
        assert other.kinds == plain.kinds
        assert all(torch.equal(x, plain.places()[place]) for place, x in other.places().items())
    # The sum of two servers belongs to neither of them.
    both = SUM.merge(joined, pieces)
    assert both.joined is None
    before = joined.places()[("", "head")].clone()
    SUM.add_in_place(both, updates[0])
    assert torch.equal(joined.places()[("", "head")], before)
