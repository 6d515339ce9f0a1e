"""The difference of two sums over nearly the same sites, which is that of the few sites in which they differ.

Two sums of one exchange over rosters R and S differ by Σ of the updates in R minus S, less those in S minus R, and by
how far the common sites' updates have moved. It is exact where these have not moved: the same model was sent, and the
same examples were drawn. Between the rounds of an honest run they have, and the difference is an estimate that is the
better the less the model moves. A server that lies chooses what it sends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import combinations

Roster = Collection[str]


def too_near(roster: Roster, earlier: Iterable[Roster], least: int) -> list[str] | None:
    """Return the sites by which a sum differs from an earlier one, where these are some and fewer than `least`.

    Of several earlier sums the nearest counts; None where there is no such sum.
    """
    found = [sorted(set(roster) ^ set(other)) for other in earlier]
    near = [sites for sites in found if 0 < len(sites) < least]
    return min(near, key=lambda sites: (len(sites), sites), default=None)


def without_too_near(
    roster: Sequence[str], earlier: Sequence[Roster], least: int, fewest: int, turn: int = 0
) -> list[str] | None:
    """Return the largest part of a roster, of at least `fewest` sites, that is not too near to any earlier one.

    None where there is none that leaves out at most `least` sites. Of several the choice depends on nothing that a site
    could influence: the order of the ids, and the turn, so that it is not always the same site that is left out.
    """
    ordered = sorted(roster)
    first = turn % max(1, len(ordered))
    order = [*ordered[first:], *ordered[:first]]
    for count in range(min(least, max(0, len(ordered) - fewest)) + 1):
        for left_out in combinations(order, count):
            rest = [site for site in ordered if site not in left_out]
            if too_near(rest, earlier, least) is None:
                return rest
    return None
