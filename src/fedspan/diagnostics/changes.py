"""What one round did to one module, as changes of the base weight: pairs of factors, differences of weights, or both.

Shapes: B (m, r), A (r, n); c = the summed rank of all pairs of the module that a round is judged by.
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

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change:
    """B·A, and a dense part where the method itself holds one."""

    low: LowRank
    dense: Tensor | None = None

    def matrix(self) -> Tensor:
        """The whole change; for pairs on common bases it is as small as they are."""
        x = self.low.b @ self.low.a
        return x if self.dense is None else x + self.dense.to(x.dtype)

    def left(self) -> Tensor:
        """A matrix with the left singular vectors and singular values of the whole, thin where the factors are."""
        if self.dense is None and 2 * self.low.rank < min(self.low.shape):
            return lowrank.left_coordinates(self.low.b, self.low.a)
        return self.matrix()

    def plus(self, other: Change) -> Change:
        """The sum of both."""
        parts = [x.dense for x in (self, other) if x.dense is not None]
        return Change(lowrank.stack([self.low, other.low]), sum(parts[1:], parts[0]) if parts else None)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the server tells its clients before and after the round."""

    before: Broadcast
    after: Broadcast
    by_rank: Mapping[int, Broadcast]
    """After the round, to a client of each rank that took part."""
    regauged: Broadcast | None
    """After the same round with other factors; none where there is no gauge to choose."""


def answers(observation: Observation, regauged: ServerState | None) -> Answers:
    """Ask the method; nothing depends on who took part except the ranks."""
    ask = observation.method.broadcast
    ranks = sorted({update.factors(name).rank for update in observation.updates for name in update.modules})
    if observation.method.info.trains != "adapter" or observation.method.info.personalised:
        ranks = []
    return Answers(
        ask(observation.before, Request(None)),
        ask(observation.after, Request(None)),
        {rank: ask(observation.after, Request(rank)) for rank in ranks},
        None if regauged is None else ask(regauged, Request(None)),
    )


@dataclass(frozen=True, slots=True)
class ModuleRound:
    """One module's round. All changes are of the *original* base, unless they say otherwise."""

    shares: Sequence[float]
    """p_k."""
    trained: Callable[[], Iterator[Change]]
    """Each client's own ΔW: s_k B_k A_k, or W_k − W."""
    patch: Change
    """Σ p_k of the frozen patches that the clients had."""
    sent: Change
    """Σ p_k of the adapters that they started from."""
    before: Change | None
    """What the server stood for before; none where the original weight is unknown."""
    after: Change | None
    landed: Change
    """What is to be compared with the ideal: `after`, or W after − W before."""
    readouts: Mapping[int, Change] = field(default_factory=dict)
    regauged: Change | None = None
    first_rows: Tensor | None = None  # (r, n)
    """The run's first A."""


def adapter_round(observation: Observation, told: Answers, name: str) -> ModuleRound:
    """The module's round of a method that trains adapters, all of it on common bases in float64.

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
    whole = [told.before, told.after, *told.by_rank.values(), *([told.regauged] if told.regauged else [])]
    # Patches are the same for every rank: what is said twice is worked on once.
    heard: dict[tuple[object, ...], Change] = {}
    keys = [_same(answer, name) for answer in whole]
    for key, answer in zip(keys, whole, strict=True):
        if key not in heard:
            heard[key] = change_of(answer, name, shape)
    rows = fresh_a(template, name, template.rank)
    changes, rows = on_common_bases([*trained, patch, adapter, *heard.values()], rows)
    num = len(trained)
    patch, adapter = changes[num : num + 2]
    found = dict(zip(heard, changes[num + 2 :], strict=True))
    before, after, *rest = (found[key] for key in keys)
    return ModuleRound(
        shares,
        lambda: iter(changes[:num]),
        patch,
        adapter,
        before,
        after,
        after,
        dict(zip(told.by_rank, rest, strict=False)),
        rest[-1] if told.regauged else None,
        rows,
    )


def weights_round(observation: Observation, base: Tensors | None, name: str) -> ModuleRound:
    """The module's round of a method that trains the weights themselves; a client's difference is made when asked."""
    old, new = (lowrank.promote(state.dense[name]) for state in (observation.before, observation.after))
    none = Change(lowrank.zeros(old.shape[0], old.shape[1], like=old))

    def difference(x: Tensor, y: Tensor) -> Change:
        return Change(none.low, lowrank.promote(x) - y)

    original = None if base is None else lowrank.promote(base[name])
    return ModuleRound(
        _shares(observation),
        lambda: (difference(update.dense[name], old) for update in observation.updates),
        none,
        none,
        None if original is None else difference(old, original),
        None if original is None else difference(new, original),
        difference(new, old),
    )


def _same(answer: Broadcast, name: str) -> tuple[object, ...]:
    """What tells apart the changes that answers stand for: an adapter with B = 0 stands for nothing."""
    f = answer.adapter.get(name)
    live = (id(f.b), id(f.a), f.scaling) if f is not None and bool(f.b.any()) else ()
    return id(answer.patch.get(name)), *live


def change_of(answer: Broadcast, name: str, shape: tuple[int, int]) -> Change:
    """All that a client adds to its base for one module."""
    return _total(shape, [(answer.adapter.get(name), 1.0)], [(answer.patch.get(name), 1.0)])


def on_common_bases(changes: Sequence[Change], rows: Tensor) -> tuple[list[Change], Tensor]:
    """The same changes and rows in coordinates of an orthonormal basis of all columns, and of all rows, in float64.

    Nothing is compressed where a change has a dense part, and no side that the factors outgrow.
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
    counts = [update.num_examples for update in observation.updates]
    return [count / sum(counts) for count in counts]


def _live(x: LowRank) -> LowRank:
    """Without the terms that are zero: fresh rows of A meet zero columns of B, and add nothing but work."""
    live = (x.b != 0).any(dim=0) & (x.a != 0).any(dim=1)
    return LowRank(x.b[:, live], x.a[live])


def _merged(items: Iterable[tuple[T, float]]) -> list[tuple[T, float]]:
    """One entry for what several clients share, with the sum of their weights."""
    weights: dict[int, tuple[T, float]] = {}
    for item, weight in items:
        weights[id(item)] = item, weight + weights.get(id(item), (item, 0.0))[1]
    return list(weights.values())


def _total(
    shape: tuple[int, int],
    adapters: Sequence[tuple[Factors | None, float]],
    patches: Sequence[tuple[Patch | None, float]],
) -> Change:
    """Σ weight · (s B A) + Σ weight · patch."""
    terms = [lowrank.scaled(f.delta(), weight) for f, weight in _merged(adapters) if f is not None]
    dense: Tensor | None = None
    for patch, weight in _merged(patches):
        if isinstance(patch, LowRank):
            terms.append(lowrank.scaled(patch, weight))
        elif patch is not None:
            dense = patch * weight if dense is None else dense + patch * weight
    return Change(lowrank.stack([lowrank.zeros(*shape), *map(_live, terms)]), dense)
