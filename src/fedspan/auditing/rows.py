"""The rows of an audit: those that a model was trained on, site by site, and comparable rows that it was not."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
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
    whole: Site
    """All of them together, without a name."""
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


def once(rows: Rows, places: np.ndarray, left_out: Collection[bytes]) -> np.ndarray:
    """Return the places of rows, each content once, without those that are left out."""
    seen, kept = set(left_out), []
    for place, key in zip(places.tolist(), keys_of(rows.take(places)), strict=True):
        if key not in seen:
            seen.add(key)
            kept.append(place)
    return np.asarray(kept, dtype=np.int64)


def drawn(places: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return at most that many of the places, drawn without replacement, in their order."""
    if len(places) <= most:
        return places
    return np.sort(rng.choice(places, most, replace=False))


def from_files(
    members: Rows, others: Rows, names: tuple[str, str], most: int, seed: int, planted: Collection[bytes] = ()
) -> AuditRows:
    """Return the rows of two sets of files; there is then one site at most, which is not named.

    Parameters
    ----------
    planted
        Digests of canaries, which count as neither: they were made to be remembered.

    Raises
    ------
    FedspanError
        When too few are left of either.
    """
    kept, duplicates = without(others, keys_of(members))
    rng = np.random.default_rng([seed, 17])
    ours = once(members, np.arange(len(members)), planted)
    of_members, of_others = drawn(ours, most, rng), drawn(kept, most, rng)
    _check_enough(len(of_members), len(of_others), duplicates, *names)
    taken, compared = members.take(of_members), others.take(of_others)
    whole = _whole(taken, compared, names[1], rng)
    return AuditRows(taken, compared, whole, (), len(ours), len(kept), duplicates, *names)


def of_sites(
    train: Rows,
    held_out: Rows,
    trained: Mapping[str, np.ndarray],
    own_tests: Mapping[str, np.ndarray],
    most: int,
    seed: int,
    others_from: str,
    notes: Sequence[str] = (),
    planted: Collection[bytes] = (),
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
    planted
        As of `from_files`.

    Raises
    ------
    FedspanError
        When too few are left.
    """
    rng = np.random.default_rng([seed, 17])
    used = np.concatenate(list(trained.values()))
    single = {name: once(train, rows, planted) for name, rows in trained.items()}
    kept, duplicates = without(held_out, keys_of(train.take(np.unique(used))))
    chosen = drawn(kept, most, rng)
    share = max(FEWEST, most // len(trained))
    of_site = {name: drawn(rows, share, rng) for name, rows in single.items()}
    _check_enough(sum(map(len, of_site.values())), len(chosen), duplicates, "the sites' training rows", others_from)
    members = concatenate([train.take(rows) for rows in of_site.values()])
    others = held_out.take(chosen)
    sites, start = [], 0
    for name, rows in of_site.items():
        own = np.flatnonzero(np.isin(chosen, own_tests[name])) if name in own_tests else np.zeros(0, np.int64)
        sites.append(_site(name, np.arange(start, start + len(rows)), own, members, others, rng))
        start += len(rows)
    count, source = sum(map(len, single.values())), "the sites' training rows"
    whole = _whole(members, others, others_from, rng)
    return AuditRows(
        members, others, whole, tuple(sites), count, len(kept), duplicates, source, others_from, tuple(notes)
    )


def _site(name: str, ours: np.ndarray, own: np.ndarray, members: Rows, others: Rows, rng: np.random.Generator) -> Site:
    """Return a site with non-members that are most like its rows.

    Parameters
    ----------
    own
        The non-members that are its own held-out rows.
    """
    pool, how = np.arange(len(others)), "held-out rows"
    if len(own) >= FEWEST:
        pool, how = own, "its own held-out rows"
    return _alike(name, ours, pool, members, others, how, rng)


def _whole(members: Rows, others: Rows, how: str, rng: np.random.Generator) -> Site:
    """Return all members with the non-members that are most like them."""
    return _alike("", np.arange(len(members)), np.arange(len(others)), members, others, how, rng)


def _alike(
    name: str,
    ours: np.ndarray,
    pool: np.ndarray,
    members: Rows,
    others: Rows,
    how: str,
    rng: np.random.Generator,
) -> Site:
    """Return members and non-members with the same shares of fields and classes.

    A task, a hospital or a mixture of classes would otherwise be told from another, by a model that has only learnt
    which of them there are, and what shows that says nothing about a row.
    """
    by_field = _share_known({members.fields[i] for i in ours.tolist()}, {others.fields[i] for i in pool.tolist()})
    by_class = _has_classes(members)
    kept, compared = _matched(
        _strata(members, ours, by_field, by_class), _strata(others, pool, by_field, by_class), rng
    )
    same = [word for word, on in (("fields", by_field), ("classes", by_class)) if on]
    return Site(name, kept, compared, how + (f", with the same shares of {' and '.join(same)}" if same else ""))


def _share_known(ours: set[str], theirs: set[str]) -> bool:
    """Return whether fields divide the non-members too: at least half of the site's are among theirs, and others."""
    return len(ours & theirs) * 2 >= len(ours) and len(theirs) > 1


def _has_classes(rows: Rows) -> bool:
    return rows.kind != "instruction" and all(isinstance(x, int | np.integer) for x in rows.targets)


def _strata(rows: Rows, places: np.ndarray, by_field: bool, by_class: bool) -> dict[tuple[Any, ...], list[int]]:
    """Return the places of rows of each field and class."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i in places.tolist():
        key = (rows.fields[i] if by_field else "", int(rows.targets[i]) if by_class else 0)
        found.setdefault(key, []).append(i)
    return found


def _matched(
    ours: Mapping[tuple[Any, ...], list[int]], theirs: Mapping[tuple[Any, ...], list[int]], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return members and non-members with the same shares of all strata: k non-members for every member, k ≥ 1.

    k is as large as the strata allow that hold most of the members, and need not be a whole number; members without a
    counterpart are left out.
    """
    sizes = sorted((len(theirs.get(key, ())) / len(rows), len(rows)) for key, rows in ours.items())
    total, passed, ratio = sum(size for _, size in sizes), 0, 0.0
    for quotient, size in sizes:
        ratio, passed = quotient, passed + size
        if passed > 0.1 * total:
            break
    k = max(1.0, ratio)
    members: list[int] = []
    others: list[int] = []
    for key, rows in sorted(ours.items(), key=repr):
        pool = theirs.get(key, [])
        count = min(len(rows), int(len(pool) / k))
        members += rng.choice(rows, count, replace=False).tolist() if count else []
        others += rng.choice(pool, int(k * count), replace=False).tolist() if count else []
    return np.sort(np.asarray(members, np.int64)), np.sort(np.asarray(others, np.int64))


def _check_enough(members: int, others: int, duplicates: int, members_from: str, others_from: str) -> None:
    for count, which, source in ((members, "members", members_from), (others, "non-members", others_from)):
        if count < FEWEST:
            left = f" after {duplicates} that are training rows too" if which == "non-members" and duplicates else ""
            raise FedspanError(
                f"{count} {which} from {source}{left}: expected at least {FEWEST}, of which an attack could be judged"
            )
