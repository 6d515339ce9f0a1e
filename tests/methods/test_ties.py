"""Clients whose votes tie: the energy of the aggregate decides, in every gauge, at every rank, on every path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from federations import Array, Federation, array, assert_same, build, gauge, received, regauged, served, weighted_sum
from hypothesis import given, settings
from hypothesis import strategies as st

from fedspan.algebra import ties
from fedspan.methods import glora, glora_sums
from fedspan.methods.base import Method, ServerState
from fedspan.methods.messages import Factors

SHAPE = (48, 40)
Pairs = Callable[[np.random.Generator], list[tuple[Array, Array]]]


def one_client(rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """A single update of rank 8, its strengths falling."""
    return [pair(rng, 8)]


def disjoint_rows(rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """Four updates of rank 3, each on twelve rows of its own."""
    pairs = []
    for k in range(4):
        b, a = pair(rng, 3)
        b[: 12 * k], b[12 * (k + 1) :] = 0.0, 0.0
        pairs.append((b, a))
    return pairs


def one_column_space(rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """Three updates in the same seven columns."""
    space = np.linalg.qr(rng.standard_normal((SHAPE[0], 7)))[0]
    return [(space @ rng.standard_normal((7, 7)), pair(rng, 7)[1]) for _ in range(3)]


def eight_and_two(rng: np.random.Generator) -> list[tuple[Array, Array]]:
    return [pair(rng, 8), pair(rng, 2)]


def pair(rng: np.random.Generator, rank: int) -> tuple[Array, Array]:
    """Strengths from 1 down to a twentieth."""
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in SHAPE)
    return left * np.geomspace(1, 0.05, rank), right.T


TIED: dict[str, Pairs] = {x.__name__: x for x in (one_client, disjoint_rows, one_column_space, eight_and_two)}
PATHS: dict[str, Callable[[int], Method]] = {
    "exact": lambda rank: glora(server_rank=rank, algebra="exact"),
    "both": lambda rank: glora(server_rank=rank, algebra="exact", sides="both"),
    "nested": lambda rank: glora(server_rank=rank, algebra="exact", readout="nested"),
    "nested-both": lambda rank: glora(server_rank=rank, algebra="exact", readout="nested", sides="both"),
    "innovation": lambda rank: glora(server_rank=rank, algebra="exact", update="innovation"),
    "state": lambda rank: glora(server_rank=rank, algebra="exact", start="state"),
    "randomized": lambda rank: glora(server_rank=rank, algebra="randomized"),
    "randomized-nested": lambda rank: glora(server_rank=rank, algebra="randomized", readout="nested"),
    "randomized-both": lambda rank: glora(server_rank=rank, algebra="randomized", sides="both"),
    "sums": lambda rank: glora_sums(server_rank=rank),
    "sums-2": lambda rank: glora_sums(server_rank=rank, passes=2),
}
tied = pytest.mark.parametrize("pairs", TIED.values(), ids=TIED)
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def federation(method: Method, pairs: Pairs, seed: int, dtype: torch.dtype = torch.float64) -> Federation:
    drawn = pairs(np.random.default_rng(seed))
    fed = build(method, seed, (SHAPE,), [b.shape[1] for b, _ in drawn], [10] * len(drawn), dtype=dtype)
    updates = []
    for update, (b, a) in zip(fed.updates, drawn, strict=True):
        s = update.factors("layer0").scaling
        modules = {"layer0": Factors(torch.from_numpy(b).to(dtype), torch.from_numpy(a / s).to(dtype), s)}
        updates.append(replace(update, modules=modules))
    return replace(fed, updates=tuple(updates))


def lexicographic(fed: Federation, rank: int, part: str = "b", vote: int | None = None) -> Array:
    """The oracle, densely: eigenspaces of the projector sum in order, each sorted by the energy of T inside it.

    `vote`: the strongest directions of each update alone, of which every client of an innovation server names R.
    """

    def projector(update: Any) -> Array:
        delta = fed.delta_of(update, "layer0")
        u, s, _ = np.linalg.svd(delta if part == "b" else delta.T, full_matrices=False)
        u = u[:, s > 1e-6 * s[0]][:, :vote]
        return u @ u.T

    values, vectors = (x[..., ::-1] for x in np.linalg.eigh(weighted_sum(fed, projector)))
    ideal = fed.ideal["layer0"] if part == "b" else fed.ideal["layer0"].T
    starts = [0, *(np.flatnonzero(-np.diff(values) > 1e-5) + 1), len(values)]
    spaces = []
    for first, last in pairwise(starts):
        w = vectors[:, first:last]
        energies, turn = np.linalg.eigh(w.T @ ideal @ ideal.T @ w)
        spaces.append(w @ turn[:, np.argsort(-energies)])
    u: Array = np.hstack(spaces)[:, :rank]
    return u


def held(state: ServerState) -> Array:
    return array(state.modules["layer0"]["u"]) @ array(state.modules["layer0"]["c"])


def close(fed: Federation, other: Federation, ranks: Sequence[int | None], tolerance: float) -> None:
    first, second = served(fed)[0], served(other)[0]
    size = float(np.linalg.norm(fed.ideal["layer0"]))
    for rank in ranks:
        assert_same(received(other, second, rank), received(fed, first, rank), tolerance, size)


@tied
@paths
@pytest.mark.parametrize("rank", [2, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_tied_votes_see_no_gauge(pairs: Pairs, path: Callable[[int], Method], rank: int, dtype: torch.dtype) -> None:
    """A gauge of condition 10 for each client, R through the middle of a tie: the same readout at every rank."""
    for seed in range(3):
        fed = federation(path(rank), pairs, seed, dtype)
        rng = np.random.default_rng(seed)
        other = regauged(fed, lambda k, r, rng=rng: gauge(rng, r, 10.0))
        close(fed, other, range(1, rank + 1), 1e-5 if dtype == torch.float64 else 0.02)


@tied
@pytest.mark.parametrize("path", [name for name in PATHS if "both" not in name])
@pytest.mark.parametrize("rank", [3, 5, 6])
def test_tied_votes_keep_the_most_of_the_update(pairs: Pairs, path: str, rank: int) -> None:
    """U·C is U Uᵀ T for the dense oracle's U, which orders every eigenspace by energy.

    Where R + 8 columns are asked about and more directions tie, a random part of them is seen.
    """
    for seed in range(3):
        fed = federation(PATHS[path](rank), pairs, seed)
        u = lexicographic(fed, rank, vote=rank if path in ("innovation", "state") else None)
        best, found = u @ u.T @ fed.ideal["layer0"], held(served(fed)[0])
        if rank + 8 < 12 and pairs is disjoint_rows and path.startswith(("randomized", "sums")):
            assert np.linalg.norm(found) > 0.8 * np.linalg.norm(best)
            continue
        assert_same({"layer0": found}, {"layer0": best}, 1e-5)


@tied
def test_nested_readouts_take_tied_directions_by_energy(pairs: Pairs) -> None:
    """Every rank below R holds the oracle's first directions: prefixes of one order."""
    for algebra in ("exact", "randomized"):
        fed = federation(glora(server_rank=6, algebra=algebra, readout="nested"), pairs, 1)
        u, ideal = lexicographic(fed, 6), fed.ideal["layer0"]
        state = served(fed)[0]
        for rank in range(1, 7):
            wanted = u[:, :rank] @ u[:, :rank].T @ ideal
            assert_same(received(fed, state, rank), {"layer0": wanted}, 2e-5, float(np.linalg.norm(ideal)))


def test_both_sides_break_their_ties() -> None:
    for seed in range(3):
        fed = federation(glora(server_rank=5, algebra="exact", sides="both"), one_client, seed)
        u, v = lexicographic(fed, 5), lexicographic(fed, 5, "a")
        wanted = u @ u.T @ fed.ideal["layer0"] @ v @ v.T
        assert_same(received(fed, served(fed)[0], 5), {"layer0": wanted}, 2e-5)


@given(seed=st.integers(0, 2**32 - 1), log_gap=st.floats(-16, -1))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_the_choice_is_smooth_in_the_votes(seed: int, log_gap: float) -> None:
    """Two directions whose votes differ by any gap: a change of the votes by h moves the projector by O(h/δ)."""
    rng = np.random.default_rng(seed)
    g = torch.from_numpy(rng.standard_normal((4, 9)) * [[1.0], [2.0], [1.5], [0.5]])
    values = torch.tensor([0.9, 0.5, 0.5, 0.1], dtype=torch.float64)
    values[2] -= 10**log_gap
    eps = 2.0**-52
    width, h = ties.tie_width(eps), 1e-3 * ties.tie_width(eps)
    moved = values - torch.tensor([0.0, h, 0.0, 0.0], dtype=torch.float64)
    first, second = (ties.settled(x, g, 2, eps) for x in (values, moved))
    change = torch.linalg.matrix_norm(first @ first.mT - second @ second.mT)
    tied = g[1:3] @ g[1:3].mT / g.square().sum()
    weak, strong = torch.linalg.eigvalsh(tied).sqrt().tolist()
    assert float(change) < 5 * h / (width * (strong - weak))


def test_votes_that_do_not_tie_are_left_alone() -> None:
    """Eigenvalues a hundred widths apart keep their order whatever the energies: the published rule."""
    g = torch.diag(torch.tensor([0.0, 1.0, 10.0, 100.0], dtype=torch.float64))
    eps = 2.0**-52
    values = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    assert not ties.undecided(values, 2, True, eps)
    torch.testing.assert_close(ties.settled(values, g, 2, eps).abs(), torch.eye(4).double()[:, :2], rtol=0, atol=1e-12)
    # All four in one tie: the energies alone.
    assert ties.undecided(values * 0 + 0.4, 2, False, eps)
    torch.testing.assert_close(
        ties.settled(values * 0 + 0.4, g, 2, eps).abs(), torch.eye(4).double()[:, [3, 2]], rtol=0, atol=1e-12
    )
