"""The fewest clients in a secure sum: derived from the agreed settings, and compared when a site joins."""

from __future__ import annotations

from typing import Any

import pytest

from fedspan import config as settings
from fedspan.config import Config
from fedspan.federation.requirements import chosen, least_in_sums
from fedspan.wire import agreement


def asked(privacy: dict[str, Any], **federation: Any) -> Config:
    tree = {"method": {"name": "ffa_lora"}, "privacy": {"secure_sums": True, **privacy}}
    return settings.from_mapping({**tree, "federation": {"ranks": 8, "num_clients": 10, **federation}})


@pytest.mark.parametrize(
    ("privacy", "federation", "least"),
    [
        ({}, {"participation": 1.0}, 6),
        ({}, {"participation": 0.5}, 3),
        ({}, {"participation": 0.2}, 2),
        ({"threshold": 0.51}, {"participation": 0.2}, 2),
        ({"threshold": 1.0}, {"participation": 0.5}, 5),
        ({}, {"participation": 0.2, "min_clients": 8}, 5),
        ({"min_clients": 4}, {"participation": 0.5}, 4),
        ({"min_clients": 2}, {"participation": 1.0}, 2),
    ],
)
def test_it_follows_from_the_sample_and_the_threshold(
    privacy: dict[str, Any], federation: dict[str, Any], least: int
) -> None:
    config = asked(privacy, **federation)
    chosen(config)
    assert least_in_sums(config.federation, config.privacy) == least


@pytest.mark.parametrize(("of_the_region", "least"), [(97, 59), (3, 2), (100, 60)])
def test_a_large_region_gives_up_nothing_for_a_small_one(of_the_region: int, least: int) -> None:
    config = asked({"threshold": 0.6}, num_clients=100, participation=1.0)
    assert least_in_sums(config.federation, config.privacy, of_the_region) == least


def test_more_than_can_be_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"privacy.min_clients = 6: 5 clients take part in a round; expected at most"):
        chosen(asked({"min_clients": 6}, participation=0.5))
    with pytest.raises(ValueError, match=r"privacy.min_clients"):
        asked({"min_clients": 1})


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("federation.num_clients", {"num_clients": 12}),
        ("federation.participation", {"participation": 0.4}),
        ("federation.min_clients", {"min_clients": 2}),
    ],
)
def test_what_it_is_derived_from_is_agreed_on(key: str, changes: dict[str, Any]) -> None:
    server, site = agreement.terms(asked({})), agreement.terms(asked({}, **changes))
    assert str(agreement.difference(server, site)).startswith(key)
    assert agreement.digest(server) != agreement.digest(site)
    open_sums = {"secure_sums": False}
    same = agreement.terms(asked(open_sums)), agreement.terms(asked(open_sums, **changes))
    assert agreement.difference(*same) is None


def test_where_only_one_side_has_secure_sums_that_is_the_difference_named() -> None:
    server, site = agreement.terms(asked({})), agreement.terms(asked({"secure_sums": False}))
    for one, other in ((server, site), (site, server)):
        assert str(agreement.difference(one, other)).startswith("privacy.secure_sums is ")
