"""The division of examples among the clients, and the clients' ranks.

Every partition returns one sorted index array per client; together the arrays are a disjoint cover of the
examples (of a preset: of the rows it names). A client's array may be empty: the caller decides what that means.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from fedspan.support.errors import FedspanError

Generator = np.random.Generator


PRESETS: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "dolly-ftg-2": (
        {"open_qa": 3742, "creative_writing": 10},
        {"closed_qa": 1773, "brainstorming": 1766, "creative_writing": 213},
        {"classification": 2078, "summarization": 1188, "creative_writing": 486},
        {"general_qa": 2188, "information_extraction": 1506, "classification": 58},
    ),
}
"""Rows of each category on each client. dolly-ftg-2: Dolly-15k as FedFTG splits it (arXiv:2410.23111)."""


def iid(num_examples: int, num_clients: int, rng: Generator) -> list[np.ndarray]:
    """Return equal random shares: sizes differ by one at most.

    Raises
    ------
    FedspanError
        If there are more clients than examples.
    """
    _check(num_examples, num_clients)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_examples), num_clients)]


def dirichlet(labels: Sequence[int] | np.ndarray, num_clients: int, alpha: float, rng: Generator) -> list[np.ndarray]:
    """Return a label skew: the examples of each class are divided by proportions drawn from Dir(alpha, …, alpha).

    Small `alpha` gives each class to few clients, large `alpha` to all equally. Source: Hsu et al. 2019
    (arXiv:1909.06335). Difference: proportions are drawn per class over clients, so that all examples
    are used.

    Raises
    ------
    FedspanError
        If `alpha` is not positive and finite, or there are more clients than examples.
    """
    labels = np.asarray(labels)
    _check(len(labels), num_clients)
    if not 0 < alpha < np.inf:
        raise FedspanError(f"alpha = {alpha}: expected a positive number")
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def by_field(values: Sequence[str] | np.ndarray, num_clients: int, rng: Generator) -> list[np.ndarray]:
    """Return whole tasks, categories or sources per client.

    With as many values as clients, client i has the i-th value in sorted order. With more values, each goes
    whole to the client that has fewest examples so far, largest values first (equal ones in random order).
    With fewer values, each is split at random over several clients, their number in proportion to its
    examples.

    Raises
    ------
    FedspanError
        If there are more clients than examples.
    """
    values = np.asarray(values)
    _check(len(values), num_clients)
    groups = _groups(values)
    if len(groups) == num_clients:
        return groups
    if len(groups) > num_clients:
        return _grouped(groups, num_clients, rng)
    sizes = np.array([len(group) for group in groups])
    counts = np.ones(len(groups), dtype=np.int64)
    largest = [(-float(size), group) for group, size in enumerate(sizes)]  # of equal shares the first
    heapq.heapify(largest)
    for _ in range(num_clients - len(groups)):
        # Some value has more examples than clients as long as the total has, so that no share is empty.
        group = largest[0][1]
        counts[group] += 1
        heapq.heapreplace(largest, (-float(sizes[group] / counts[group]), group))
    return [
        np.sort(part)
        for group, count in zip(groups, counts, strict=True)
        for part in np.array_split(rng.permutation(group), count)
    ]


def rows_by_number(numbers: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Return the sorted rows of every number below `count`, at the cost of one sort."""
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[order], np.arange(count + 1))
    return tuple(order[start:end] for start, end in pairwise(ends.tolist()))


def _groups(values: np.ndarray) -> list[np.ndarray]:
    """Return the sorted rows of every value, in sorted order of the values, at the cost of one sort."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)


def _grouped(groups: Sequence[np.ndarray], num_clients: int, rng: Generator) -> list[np.ndarray]:
    """Give the largest group first, to the least loaded client: within 4/3 of the best balance (Graham 1969)."""
    shuffled = rng.permutation(len(groups))
    order = sorted(shuffled.tolist(), key=lambda group: -len(groups[group]))
    loads = [(0, client) for client in range(num_clients)]  # of equal loads the first client
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for group in order:
        load, client = loads[0]
        parts[client].append(groups[group])
        heapq.heapreplace(loads, (load + len(groups[group]), client))
    return [np.sort(np.concatenate(part)) for part in parts]


def preset(name: str, values: Sequence[str] | np.ndarray, rng: Generator) -> list[np.ndarray]:
    """Return a published split by category (see :data:`PRESETS`); it sets the number of clients.

    The rows of a category that a client gets are drawn at random. Where the data has more rows of a category than the
    preset counts, the rest is left out; where it has fewer, the clients' counts of that category are scaled
    down in proportion (largest remainders first), and all its rows are used. Other categories are left out.

    Raises
    ------
    FedspanError
        For an unknown preset, or a category without a single row.
    """
    if name not in PRESETS:
        raise FedspanError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    clients = PRESETS[name]
    values = np.asarray(values, dtype=str)
    parts: list[list[np.ndarray]] = [[] for _ in clients]
    for category in dict.fromkeys(category for client in clients for category in client):
        members = rng.permutation(np.flatnonzero(values == category))
        if not len(members):
            raise FedspanError(
                f"preset {name!r} needs rows of {category!r}: the fields of the data are {_some(values)}"
            )
        counts = _scaled([client.get(category, 0) for client in clients], len(members))
        pieces = np.split(members[: counts.sum()], np.cumsum(counts)[:-1])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _some(values: np.ndarray) -> str:
    return ", ".join(repr(str(value)) for value in np.unique(values)[:8]) or "none"


def _scaled(counts: Sequence[int], available: int) -> np.ndarray:
    """Return `counts`, or whole numbers in proportion to them that add up to `available` if that is less."""
    wanted = np.asarray(counts, dtype=np.int64)
    total = int(wanted.sum())
    if available >= total:
        return wanted
    shares, remainders = np.divmod(wanted * available, total)
    missing = available - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return shares


def draw_ranks(
    spec: int | Sequence[int] | str, values: Sequence[int], num_clients: int, rng: Generator
) -> tuple[int, ...]:
    """Return the adapter rank of each client.

    Parameters
    ----------
    spec
        One rank for all; a list with one per client; or a distribution over the n sorted `values`, drawn
        independently per client: ``uniform``; ``normal``, in proportion to a Gaussian density over their
        positions centred in the middle with standard deviation n/4; ``heavy_tail``, in proportion to
        1/position² with position 1 the smallest: many small ranks and few large ones.
    values
        Ranks to draw from; unused otherwise.
    num_clients
        Number of clients, and of ranks.

    Raises
    ------
    FedspanError
        For a list of another length, a rank below 1, no values, or an unknown distribution.
    """
    if isinstance(spec, int):
        ranks: Sequence[int] = [spec] * num_clients
    elif not isinstance(spec, str):
        ranks = list(spec)
        if len(ranks) != num_clients:
            raise FedspanError(
                f"federation.ranks lists {len(ranks)} ranks for {num_clients} clients: expected one per client"
            )
    else:
        choices = np.unique(np.asarray(values, dtype=np.int64))
        if not len(choices):
            raise FedspanError(f"ranks = {spec!r} draws from rank_values, which is empty: expected at least one rank")
        if choices[0] < 1:
            raise FedspanError(f"rank_values holds {choices[0]}: expected ranks of 1 or more")
        ranks = rng.choice(choices, size=num_clients, p=_probabilities(spec, len(choices))).tolist()
    if min(ranks, default=1) < 1:
        raise FedspanError(f"rank {min(ranks)}: expected 1 or more")
    return tuple(ranks)


def _probabilities(name: str, num: int) -> np.ndarray:
    positions = np.arange(1.0, num + 1.0)
    weights: np.ndarray
    if name == "uniform":
        weights = np.ones(num)
    elif name == "normal":
        weights = np.exp(-0.5 * ((positions - (num + 1) / 2) / (num / 4)) ** 2)
    elif name == "heavy_tail":
        weights = 1.0 / positions**2
    else:
        raise FedspanError(f"ranks = {name!r}: expected a number, a list, uniform, normal or heavy_tail")
    probabilities: np.ndarray = weights / weights.sum()
    return probabilities


def _check(num_examples: int, num_clients: int) -> None:
    if num_clients < 1:
        raise FedspanError(f"num_clients = {num_clients}: expected 1 or more")
    if num_clients > num_examples:
        raise FedspanError(f"{num_clients} clients for {num_examples} examples: expected at most as many clients")
