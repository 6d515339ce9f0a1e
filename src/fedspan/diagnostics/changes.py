"""One round of one module, as changes of the base weight: pairs of factors, differences of weights, or both.

Shapes: B (m, r), A (r, n); c = the summed rank of all pairs that a module's round is judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.federation.rounds import Observation
from fedspan.methods.base import ServerState
from fedspan.methods.messages import Broadcast, Factors, Request, Tensors
from fedspan.methods.patches import Patch
from fedspan.methods.readout import fresh_a

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one weight: B·A, and a dense part where the method itself holds one."""

    low: LowRank
    dense: Tensor | None = None

    def matrix(self) -> Tensor:
        """Return the whole change (m, n); for pairs on common bases it is as small as they are."""
        x = self.low.b @ self.low.a
        return x if self.dense is None else x + self.dense.to(x.dtype)

    def left(self) -> Tensor:
        """Return a matrix with the left singular vectors and values of the whole change, thin where the factors are."""
        if self.dense is None and 2 * self.low.rank < min(self.low.shape):
            return lowrank.left_coordinates(self.low.b, self.low.a)
        return self.matrix()

    def plus(self, other: Change) -> Change:
        """Return the sum of both."""
        parts = [x.dense for x in (self, other) if x.dense is not None]
        return Change(lowrank.stack([self.low, other.low]), sum(parts[1:], parts[0]) if parts else None)


@dataclass(frozen=True, slots=True)
class Readouts:
    """The broadcasts that a server's state amounts to, before and after a round."""

    before: Broadcast
    after: Broadcast
    by_rank: Mapping[int, Broadcast]
    """Rank -> the broadcast to a client of that rank after the round, for every rank that took part."""
    regauged: Broadcast | None
    """After the same round with other factors; none where there is no gauge to choose."""


def readouts_of(observation: Observation, regauged: ServerState | None) -> Readouts:
    """Return the readouts of a round; of the clients, only the ranks matter.

    Parameters
    ----------
    regauged
        The state after the same round with other factors; none where there is no gauge to choose.
    """
    broadcast = observation.method.broadcast
    ranks = sorted({update.factors(name).rank for update in observation.updates for name in update.modules})
    if observation.method.info.trains != "adapter" or observation.method.info.personalised:
        ranks = []
    return Readouts(
        broadcast(observation.before, Request(None)),
        broadcast(observation.after, Request(None)),
        {rank: broadcast(observation.after, Request(rank)) for rank in ranks},
        None if regauged is None else broadcast(regauged, Request(None)),
    )


@dataclass(frozen=True, slots=True)
class ModuleRound:
    """One module's round. All changes are of the *original* base, unless stated otherwise."""

    shares: Sequence[float]
    """p_k, the clients' shares of the average."""
    trained: Callable[[], Iterator[Change]]
    """Returns each client's own ΔW: s_k B_k A_k, or W_k − W."""
    patch: Change
    """Σ p_k of the frozen patches that the clients had."""
    sent: Change
    """Σ p_k of the adapters that they started from."""
    before: Change | None
    """The server's change before the round; none where the original weight is unknown."""
    after: Change | None
    """The server's change after the round; none where the original weight is unknown."""
    landed: Change
    """The change that is compared with the ideal: `after`, or W after − W before."""
    readouts: Mapping[int, Change] = field(default_factory=dict)
    """Rank -> the change that a client of that rank receives after the round."""
    regauged: Change | None = None
    """`after` for other factors of the same updates; none where there is no gauge to choose."""
    first_rows: Tensor | None = None  # (r, n)
    """The run's first A."""


def adapter_round(observation: Observation, readouts: Readouts, name: str) -> ModuleRound:
    """Return a module's round of a method that trains adapters, all of it on common bases in float64.

    One QR of all the B side by side and one of all the A gives coordinates of at most c numbers a side in which every
    norm, angle and singular value is what it was; no m×n matrix is formed unless the method holds one, or c exceeds
    m or n.
    """
    template = observation.before.template
    shares = _shares(observation)
    shape = template.modules[name]
    trained = [Change(update.factors(name).delta()) for update in observation.updates]
    started = list(zip(observation.broadcasts, shares, strict=True))
    patch = _total(shape, [], [(sent.patch.get(name), p) for sent, p in started])
    adapter = _total(shape, [(sent.adapter.get(name), p) for sent, p in started], [])
    regauged = [] if readouts.regauged is None else [readouts.regauged]
    broadcasts = [readouts.before, readouts.after, *readouts.by_rank.values(), *regauged]
    # Patches are the same for every rank: equal changes are worked on once.
    distinct: dict[tuple[object, ...], Change] = {}
    keys = [_identity(broadcast, name) for broadcast in broadcasts]
    for key, broadcast in zip(keys, broadcasts, strict=True):
        if key not in distinct:
            distinct[key] = change_of(broadcast, name, shape)
    rows = fresh_a(template, name, template.rank)
    changes, rows = on_common_bases([*trained, patch, adapter, *distinct.values()], rows)
    num = len(trained)
    patch, adapter = changes[num : num + 2]
    by_key = dict(zip(distinct, changes[num + 2 :], strict=True))
    before, after, *rest = (by_key[key] for key in keys)
    return ModuleRound(
        shares,
        lambda: iter(changes[:num]),
        patch,
        adapter,
        before,
        after,
        after,
        dict(zip(readouts.by_rank, rest, strict=False)),  # the regauged change follows those of the ranks
        rest[-1] if regauged else None,
        rows,
    )


def weights_round(observation: Observation, base: Tensors | None, name: str) -> ModuleRound:
    """Return a module's round of a method that trains the weights themselves.

    A client's difference is as large as the weight, so it is made only when it is asked for.

    Parameters
    ----------
    base
        The weights that the run started from; none: unknown.
    """
    old, new = (lowrank.promote(state.dense[name]) for state in (observation.before, observation.after))
    zero = Change(lowrank.zeros(old.shape[0], old.shape[1], like=old))

    def difference(x: Tensor, y: Tensor) -> Change:
        return Change(zero.low, lowrank.promote(x) - y)

    original = None if base is None else lowrank.promote(base[name])
    return ModuleRound(
        _shares(observation),
        lambda: (difference(update.dense[name], old) for update in observation.updates),
        zero,
        zero,
        None if original is None else difference(old, original),
        None if original is None else difference(new, original),
        difference(new, old),
    )


def _identity(broadcast: Broadcast, name: str) -> tuple[object, ...]:
    """Return a key that differs for broadcasts of different changes; an adapter with B = 0 is no change."""
    f = broadcast.adapter.get(name)
    live = (id(f.b), id(f.a), f.scaling) if f is not None and bool(f.b.any()) else ()
    return id(broadcast.patch.get(name)), *live


def change_of(broadcast: Broadcast, name: str, shape: tuple[int, int]) -> Change:
    """Return all that a client with this broadcast adds to its base in one module."""
    return _total(shape, [(broadcast.adapter.get(name), 1.0)], [(broadcast.patch.get(name), 1.0)])


def on_common_bases(changes: Sequence[Change], rows: Tensor) -> tuple[list[Change], Tensor]:
    """Return the changes and rows in coordinates of orthonormal bases of all columns and of all rows, in float64.

    Nothing is compressed where a change has a dense part, nor a side that is shorter than the factors together.
    """
    b = torch.cat([change.low.b for change in changes], dim=1).double()  # (m, c)
    a = torch.cat([*(change.low.a for change in changes), rows.to(changes[0].low.a)]).double()  # (c + r, n)
    if all(change.dense is None for change in changes):
        b = torch.linalg.qr(b, mode="r")[1] if b.shape[1] < b.shape[0] else b
        a = torch.linalg.qr(a.mT, mode="r")[1].mT if a.shape[0] < a.shape[1] else a
    ranks = [change.low.rank for change in changes]
    cut = [0, *accumulate(ranks)]
    pairs = [LowRank(b[:, i:j], a[i:j]) for i, j in pairwise(cut)]
    return [Change(x, change.dense) for x, change in zip(pairs, changes, strict=True)], a[cut[-1] :]


def _shares(observation: Observation) -> list[float]:
    """Return p_k, the clients' shares of the average."""
    counts = [update.num_examples for update in observation.updates]
    return [count / sum(counts) for count in counts]


def _live(x: LowRank) -> LowRank:
    """Return the product without its zero terms: fresh rows of A meet zero columns of B, and only cost time."""
    live = (x.b != 0).any(dim=0) & (x.a != 0).any(dim=1)
    return LowRank(x.b[:, live], x.a[live])


def _merged(items: Iterable[tuple[Item, float]]) -> list[tuple[Item, float]]:
    """Return one entry for each object that several clients share, with the sum of their weights."""
    weights: dict[int, tuple[Item, float]] = {}
    for item, weight in items:
        weights[id(item)] = item, weight + weights.get(id(item), (item, 0.0))[1]
    return list(weights.values())


def _total(
    shape: tuple[int, int],
    adapters: Sequence[tuple[Factors | None, float]],
    patches: Sequence[tuple[Patch | None, float]],
) -> Change:
    """Return Σ weight · (s B A) + Σ weight · patch."""
    terms = [lowrank.scaled(f.delta(), weight) for f, weight in _merged(adapters) if f is not None]
    dense: Tensor | None = None
    for patch, weight in _merged(patches):
        if isinstance(patch, LowRank):
            terms.append(lowrank.scaled(patch, weight))
        elif patch is not None:
            dense = patch * weight if dense is None else dense + patch * weight
    return Change(lowrank.stack([lowrank.zeros(*shape), *map(_live, terms)]), dense)
