"""The seeds of rows, federation and training: apart where they are set, one where they are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedspan import config as settings
from fedspan.config import Config
from fedspan.data import load as load_data
from fedspan.federation.clients import make_clients
from fedspan.federation.sampling import create_sampler
from fedspan.wire import agreement


def drawn(config: Config) -> tuple[Any, Any, Any]:
    """The rows of each split, the clients' rows and ranks, and the clients of three rounds."""
    corpus = load_data(config.data, config.data_seed)
    clients = make_clients(corpus, config.federation, config.federation_seed, config.data.client_holdout)
    sampler = create_sampler(config.federation, config.federation_seed, config.privacy.dp)
    rows = [corpus.train.inputs, corpus.test.inputs]
    split = [(client.rank, client.indices.tolist()) for client in clients]
    return np.concatenate(rows).tolist(), split, [list(sampler.draw(len(clients), i)) for i in range(3)]


def config(**changes: Any) -> Config:
    return settings.from_mapping({"data": {"task": "builtin:digits"}, "federation": {"num_clients": 4}} | changes)


def test_by_default_one_seed_draws_everything() -> None:
    first, second = config(seed=3), config(seed=4)
    assert (first.data_seed, first.federation_seed) == (3, 3)
    for one, other in zip(drawn(first), drawn(second), strict=True):
        assert one != other


def test_a_fixed_seed_holds_its_part_fixed() -> None:
    parts: dict[str, Any] = {"data": {"task": "builtin:digits", "seed": 7}, "federation": {"num_clients": 4, "seed": 9}}
    assert drawn(config(seed=3, **parts)) == drawn(config(seed=4, **parts))
    rows = {"data": parts["data"]}
    one, other = drawn(config(seed=3, **rows)), drawn(config(seed=4, **rows))
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert one[2] != other[2]
    with_federation = {"federation": {"num_clients": 4, "seed": 3}}
    assert drawn(config(seed=3)) == drawn(config(seed=3, **with_federation)), "set or not, 3 is 3"


@pytest.mark.parametrize("key", ["data.seed", "federation.seed"])
def test_sites_agree_on_what_is_drawn(key: str) -> None:
    own = agreement.terms(settings.load(None, ["seed=2"]))
    assert agreement.difference(own, agreement.terms(settings.load(None, ["seed=2", f"{key}=2"]))) is None
    other = agreement.terms(settings.load(None, ["seed=2", f"{key}=5"]))
    assert agreement.difference(own, other) == f"{key} is 5 on the site and 2 on the server: expected one value"
