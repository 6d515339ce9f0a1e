"""The clients of a run: a partition of the training data, the same for every method and on every machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from fedspan import config as settings
from fedspan.config import Config
from fedspan.data import Corpus, Rows
from fedspan.data.partition import PRESETS
from fedspan.federation.clients import Client, make_clients, partition_note, pooled
from fedspan.federation.sampling import create_sampler


def corpus(
    num_rows: int = 40, fields: list[str] | None = None, files: tuple[int, ...] = (), kind: str = "classification"
) -> Corpus:
    """Rows of two labels; `files` are how many come from each file."""
    named = fields or [f"f{i % 5}" for i in range(num_rows)]
    targets: list[Any] = (
        [i % 2 for i in range(num_rows)] if kind == "classification" else [str(i) for i in range(num_rows)]
    )
    rows = Rows(kind, [(str(i),) for i in range(num_rows)], targets, named)
    ends = np.cumsum(files)
    parts = tuple(np.arange(end - size, end) for size, end in zip(files, ends, strict=True)) if files else None
    return Corpus(rows.kind, rows, rows, None, parts, None, 2, ("accuracy",))


def config(seed: int = 0, holdout: float = 0.0, **federation: Any) -> Config:
    return settings.from_mapping(
        {
            "seed": seed,
            "data": {"client_holdout": holdout},
            "federation": {"num_clients": 4, "partition": "iid", "ranks": 4, **federation},
        }
    )


def made(config: Config, corpus: Corpus) -> list[Client]:
    return make_clients(corpus, config.federation, config.seed, config.data.client_holdout)


def all_rows(clients: list[Client]) -> list[int]:
    return sorted(int(i) for c in clients for i in (*c.indices, *c.holdout))


@given(
    seed=st.integers(0, 2**31),
    num=st.integers(1, 12),
    rows=st.integers(24, 60),
    holdout=st.sampled_from([0.0, 0.2, 0.4]),
    partition=st.sampled_from(["iid", "dirichlet", "by_field"]),
)
def test_clients_and_their_holdouts_are_a_partition(
    seed: int, num: int, rows: int, holdout: float, partition: str
) -> None:
    options = {"dirichlet_alpha": 0.5, "drop_empty": True, "ranks": "uniform"}
    c = config(seed, holdout, num_clients=num, partition=partition, **options)
    clients = made(c, corpus(rows))
    assert all_rows(clients) == list(range(rows))
    for client in clients:
        total = len(client.indices) + len(client.holdout)
        assert len(client.indices) > 0
        assert len(client.holdout) == round(total * holdout)
        assert list(client.indices) == sorted(client.indices)
        assert client.rank in (2, 4, 8, 16)
    ids = [client.client_id for client in clients]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert [x.indices.tolist() for x in made(c, corpus(rows))] == [x.indices.tolist() for x in clients]


def test_ids_sort_like_numbers() -> None:
    clients = made(config(num_clients=12), corpus())
    assert [c.client_id for c in clients][:3] == ["client-00", "client-01", "client-02"]
    assert clients[11].client_id == "client-11"


def test_ranks_do_not_depend_on_the_partition_nor_the_method() -> None:
    one, other = (made(config(ranks="uniform", partition=partition), corpus()) for partition in ("iid", "by_field"))
    assert [c.rank for c in one] == [c.rank for c in other]
    assert [c.rank for c in made(config(ranks=[1, 2, 3, 4]), corpus())] == [1, 2, 3, 4]


def test_weights_are_counts_or_equal() -> None:
    clients = made(config(partition="files", num_clients=2), corpus(files=(30, 10)))
    assert [c.weight("examples") for c in clients] == [30.0, 10.0]
    assert [c.weight("equal") for c in clients] == [1.0, 1.0]


def test_a_client_without_data_is_named_or_dropped() -> None:
    """By its place in the list, and ids and ranks stay with the clients that remain."""
    data = corpus(files=(20, 0, 20, 0))
    with pytest.raises(ValueError, match=r"client-1, client-3 got no data from the files partition.*drop_empty"):
        made(config(partition="files"), data)
    kept = made(config(partition="files", drop_empty=True, ranks=[1, 2, 3, 4]), data)
    assert [(c.client_id, c.rank) for c in kept] == [("client-0", 1), ("client-2", 3)]


def test_a_client_left_without_training_data_by_its_own_holdout_is_named() -> None:
    with pytest.raises(ValueError, match="client-1 got no data"):
        made(config(partition="files", num_clients=2, seed=0, holdout=0.9), corpus(files=(30, 1)))


@pytest.mark.parametrize(
    ("federation", "message"),
    [
        ({"num_clients": 41}, "41 clients"),
        ({"num_clients": 41, "partition": "dirichlet"}, "41 clients"),
        ({"ranks": [2, 4]}, "2 ranks for 4 clients"),
        ({"ranks": 0}, "rank 0"),
        ({"partition": "files", "num_clients": 3}, "num_clients = 3, but data.train has 2 files"),
        ({"partition": "preset", "num_clients": 3}, "num_clients = 3: the preset dolly-ftg-2 has 4 clients"),
        ({"partition": "preset", "preset": "dolly"}, "unknown preset 'dolly'"),
    ],
)
def test_a_federation_that_cannot_be_is_refused(federation: dict[str, Any], message: str) -> None:
    categories = sorted({category for client in PRESETS["dolly-ftg-2"] for category in client})
    data = corpus(fields=[categories[i % len(categories)] for i in range(40)], files=(20, 20))
    with pytest.raises(ValueError, match=message) as caught:
        made(config(**federation), data)
    assert "\n" not in str(caught.value)


def test_fields_that_say_nothing_are_refused() -> None:
    for fields in ([""] * 40, ["one"] * 40):
        with pytest.raises(ValueError, match=r"by_field.*needs data\.field_column"):
            made(config(partition="by_field"), corpus(fields=fields))


def test_a_division_is_by_the_field_where_there_is_one_and_otherwise_at_random() -> None:
    """The same clients as with the division named, and one line where nobody named it."""
    fields = ["a", "b", "c", "d"] * 10
    for values, name in ((fields, "by_field"), ([""] * 40, "iid"), (["one"] * 40, "iid")):
        auto, named = config(partition="auto"), config(partition=name)
        given = corpus(fields=values)
        assert [c.indices.tolist() for c in made(auto, given)] == [c.indices.tolist() for c in made(named, given)]
        assert bool(partition_note(given, auto.federation)) == (name == "iid")
        assert partition_note(given, named.federation) == ()
    (line,) = partition_note(corpus(fields=[""] * 40), config(partition="auto").federation)
    assert "federation.partition = 'iid'" in line
    assert "data.field_column" in line


def test_label_skew_of_instructions_is_by_their_field() -> None:
    data = corpus(kind="instruction", fields=["a"] * 20 + ["b"] * 20)
    clients = made(config(partition="dirichlet", dirichlet_alpha=0.001, num_clients=2, drop_empty=True), data)
    for client in clients:
        fields = {data.train.fields[i] for i in client.indices}
        assert len(fields) == 1 or len(clients) == 1


def test_the_preset_gives_each_client_its_categories() -> None:
    spec = PRESETS["dolly-ftg-2"]
    categories = sorted({category for client in spec for category in client})
    data = corpus(400, fields=[categories[i % len(categories)] for i in range(400)])
    clients = made(config(partition="preset"), data)
    for client, counts in zip(clients, spec, strict=True):
        assert {data.train.fields[i] for i in client.indices} <= set(counts)


def test_the_pooled_client_trains_on_everybody_s_data_and_no_holdout() -> None:
    clients = made(config(holdout=0.25, ranks=[1, 8, 2, 4]), corpus())
    (one,) = pooled(clients)
    assert one.indices.tolist() == sorted(int(i) for c in clients for i in c.indices)
    assert not {*one.indices.tolist()} & {int(i) for c in clients for i in c.holdout}
    assert (one.rank, len(one.holdout)) == (8, 0)


def drawn_ids(config: Config, people: list[Client], round_num: int) -> list[str]:
    sampler = create_sampler(config.federation, config.seed, config.privacy.dp)
    return [people[i].client_id for i in sampler.draw(len(people), round_num)]


def test_who_takes_part_depends_on_seed_and_round_alone() -> None:
    people = tiny.clients(*[2] * 10)
    c = config(seed=4, participation=0.3)
    drawn = [drawn_ids(c, people, r) for r in range(20)]
    assert all(len(d) == 3 and d == sorted(d) for d in drawn)
    assert len({tuple(d) for d in drawn}) > 10
    other = [replace(p, rank=7, indices=np.arange(3)) for p in people]
    glora = c.model_copy(update={"method": {"name": "fedit"}})
    assert [drawn_ids(glora, other, r) for r in range(20)] == drawn
    again = config(seed=5, participation=0.3)
    assert [drawn_ids(again, people, r) for r in range(20)] != drawn


def test_a_minimum_of_clients_is_kept_or_refused() -> None:
    people = tiny.clients(2, 2, 2, 2)
    assert len(drawn_ids(config(participation=0.01), people, 0)) == 1
    assert len(drawn_ids(config(participation=0.01, min_clients=3), people, 0)) == 3
    with pytest.raises(ValueError, match="min_clients = 5 with 4 clients"):
        drawn_ids(config(min_clients=5), people, 0)
