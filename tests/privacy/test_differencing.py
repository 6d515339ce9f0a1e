"""Rosters that are too near to each other, and the largest part of one that is not."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspan.privacy.differencing import too_near, without_too_near

SITES = "abcdef"
ROSTERS = st.sets(st.sampled_from(SITES), min_size=2)


@pytest.mark.parametrize(
    ("roster", "earlier", "least", "sites"),
    [
        ("abc", ["abc"], 2, None),
        ("abc", ["abcd"], 2, ["d"]),
        ("abcd", ["abc"], 2, ["d"]),
        ("abd", ["abc"], 2, None),
        ("abd", ["abc"], 3, ["c", "d"]),
        ("abc", ["ad", "abcd", "ab"], 2, ["c"]),
        ("abc", [], 9, None),
    ],
)
def test_the_sites_of_a_small_difference(roster: str, earlier: list[str], least: int, sites: list[str] | None) -> None:
    assert too_near(roster, earlier, least) == sites


@given(ROSTERS, st.lists(ROSTERS, max_size=4), st.integers(2, 3), st.integers(0, 9))
def test_a_plan_is_the_largest_part_that_is_far_enough(
    roster: set[str], earlier: list[set[str]], least: int, turn: int
) -> None:
    """Held against every part of the roster."""
    plan = without_too_near(sorted(roster), [sorted(x) for x in earlier], least, 2, turn)
    sizes = range(max(2, len(roster) - least), len(roster) + 1)
    parts = chain.from_iterable(combinations(sorted(roster), size) for size in sizes)
    good = [part for part in parts if too_near(part, earlier, least) is None]
    assert (plan is None) == (not good)
    if plan is not None:
        assert tuple(plan) in good
        assert len(plan) == max(map(len, good))
