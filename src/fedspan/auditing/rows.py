"""The rows of an audit: those that a model was trained on, site by site, and comparable rows that it was not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedspan.data import Rows
from fedspan.data.rows import concatenate
from fedspan.support.errors import FedspanError

FEWEST = 10
"""Rows of each sort without which nothing is said of a site."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One site's rows, and the non-members that they are compared with."""

    name: str
    members: np.ndarray
    """Positions in `AuditRows.members`."""
    others: np.ndarray
    """Positions in `AuditRows.others`: rows like this site's that it did not train on."""
    matched_by: str
    """Its own held-out rows, rows of the same fields, or all of them; as a sentence says it."""


@dataclass(frozen=True, slots=True, eq=False)
class AuditRows:
    """Members and non-members, after duplicates and draws."""

    members: Rows
    others: Rows
    sites: tuple[Site, ...]
    """Empty where nothing is known of sites."""
    num_members: int
    """Of the training, before the draw."""
    num_others: int
    num_duplicates: int
    """Candidates for non-members that are rows of the training too, and were left out."""
    members_from: str
    others_from: str
    notes: tuple[str, ...] = ()


def key_of(value: Any, target: Any) -> bytes:
    """Return a digest of one row's input and target, by which equal rows are found."""
    content = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode("utf-8", "surrogatepass")
    return hashlib.sha256(content + b"\0" + repr(target).encode("utf-8", "surrogatepass")).digest()


def keys_of(rows: Rows) -> list[bytes]:
    """Return the digest of every row."""
    return [key_of(value, target) for value, target in zip(rows.inputs, rows.targets, strict=True)]


def without(others: Rows, trained: Iterable[bytes]) -> tuple[np.ndarray, int]:
    """Return the positions of the rows that were not trained on, each content once, and how many were left out."""
    seen = set(trained)
    kept: list[int] = []
    for place, key in enumerate(keys_of(others)):
        if key not in seen:
            seen.add(key)
            kept.append(place)
    return np.asarray(kept, dtype=np.int64), len(others) - len(kept)


def drawn(places: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return at most that many of the places, drawn without replacement, in their order."""
    if len(places) <= most:
        return places
    return np.sort(rng.choice(places, most, replace=False))


def from_files(members: Rows, others: Rows, names: tuple[str, str], most: int, seed: int) -> AuditRows:
    """Return the rows of two sets of files; there is then one site at most, which is not named.

    Raises
    ------
    FedspanError
        When too few are left of either.
    """
    kept, duplicates = without(others, keys_of(members))
    rng = np.random.default_rng([seed, 17])
    of_members, of_others = drawn(np.arange(len(members)), most, rng), drawn(kept, most, rng)
    _check_enough(len(of_members), len(of_others), duplicates, *names)
    return AuditRows(members.take(of_members), others.take(of_others), (), len(members), len(kept), duplicates, *names)


def of_sites(
    train: Rows,
    held_out: Rows,
    trained: Mapping[str, np.ndarray],
    own_tests: Mapping[str, np.ndarray],
    most: int,
    seed: int,
    others_from: str,
    notes: Sequence[str] = (),
) -> AuditRows:
    """Return the rows of a run.

    Parameters
    ----------
    trained
        Site -> the rows of `train` that it trained on.
    own_tests
        Site -> the rows of `held_out` that are its own, for sites that have some.
    most
        Members that are drawn in all, and non-members.

    Raises
    ------
    FedspanError
        When too few are left.
    """
    rng = np.random.default_rng([seed, 17])
    used = np.concatenate(list(trained.values()))
    kept, duplicates = without(held_out, keys_of(train.take(np.unique(used))))
    chosen = drawn(kept, most, rng)
    share = max(FEWEST, most // len(trained))
    of_site = {name: drawn(rows, share, rng) for name, rows in trained.items()}
    _check_enough(sum(map(len, of_site.values())), len(chosen), duplicates, "the sites' training rows", others_from)
    members = concatenate([train.take(rows) for rows in of_site.values()])
    others = held_out.take(chosen)
    sites, start = [], 0
    for name, rows in of_site.items():
        own = np.flatnonzero(np.isin(chosen, own_tests[name])) if name in own_tests else np.zeros(0, np.int64)
        site_fields = {train.fields[i] for i in trained[name].tolist()}
        places, how = _matched(own, site_fields, others)
        sites.append(Site(name, np.arange(start, start + len(rows)), places, how))
        start += len(rows)
    return AuditRows(
        members, others, tuple(sites), len(used), len(kept), duplicates, "the sites' training rows", others_from,
        tuple(notes),
    )  # fmt: skip


def _matched(own: np.ndarray, site_fields: set[str], others: Rows) -> tuple[np.ndarray, str]:
    """Return the non-members that are most like a site's rows.

    A site's task or hospital would otherwise be told from the others', which is no knowledge about a row.
    """
    if len(own) >= FEWEST:
        return own, "its own held-out rows"
    of_fields = np.asarray([i for i, name in enumerate(others.fields) if name in site_fields], dtype=np.int64)
    if len(of_fields) < len(others) and len(of_fields) >= FEWEST:
        return of_fields, "held-out rows of the same fields"
    return np.arange(len(others)), "all held-out rows"


def _check_enough(members: int, others: int, duplicates: int, members_from: str, others_from: str) -> None:
    for count, which, source in ((members, "members", members_from), (others, "non-members", others_from)):
        if count < FEWEST:
            left = f" after {duplicates} that are training rows too" if which == "non-members" and duplicates else ""
            raise FedspanError(
                f"{count} {which} from {source}{left}: expected at least {FEWEST}, of which an attack could be judged"
            )
