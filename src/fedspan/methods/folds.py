"""Folds: the accumulation of client updates on a server, as a sum or as a collection.

Running sums are float64: one by one in float32, the mean of 100,000 equal updates is off by a thousandth. They are
added to in place where the caller owns them, in pieces that stay in the cache, so that this costs no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Tensors, Update
from fedspan.methods.products import add_products
from fedspan.support.errors import FedspanError

Place = tuple[str, str]
"""(module, part of its payload), or an empty module and the name of a dense weight."""


@dataclass(frozen=True, slots=True)
class Partial:
    """The fold of the updates seen so far; two of them merge, so servers can form a tree."""

    num_clients: int = 0
    weight: float = 0.0
    dense: Tensors = field(default_factory=dict)
    """Σ n_k x_k."""
    sums: Mapping[str, Tensors] = field(default_factory=dict)
    """Σ n_k · payload_k, for a sum."""
    collected: Sequence[Update] = ()
    """The updates themselves, for a method that needs each. A list to which its one owner appends: a tuple, made anew
    for every update, would cost the square of the number of clients."""
    product_sums: Mapping[str, Tensors] = field(default_factory=dict)
    """Σ n_k s_k B_k A_k by module, for a stream of a method whose result it is; see `fedspan.methods.products`."""
    kinds: Mapping[Place, torch.dtype] = field(default_factory=dict)
    """The types of the means, where they are not those of the sums."""
    joined: Tensor | None = None
    """All running sums one after the other, where they are views of one tensor, so that they are added to in few calls;
    in the order of `places`. Only a partial's one owner has it."""

    def mean_dense(self) -> Tensors:
        """Return Σ p_k x_k over the participants."""
        return {name: self._mean(("", name), value) for name, value in self.dense.items()}

    def mean(self, module: str) -> Tensors:
        """Return Σ p_k payload_k of one module, field by field."""
        return {part: self._mean((module, part), value) for part, value in self.sums[module].items()}

    def _mean(self, place: Place, value: Tensor) -> Tensor:
        return (value / self.weight).to(self.kinds.get(place, value.dtype))

    def shares(self) -> list[float]:
        """Return p_k = n_k / Σ n of the collected updates. The one place where counts become weights."""
        return [update.num_examples / self.weight for update in self.collected]

    def deltas(self, module: str) -> list[LowRank]:
        """Return s_k B_k A_k of the collected updates."""
        return [update.factors(module).delta() for update in self.collected]

    def products(self, module: str) -> list[LowRank]:
        """Return s_k B_k A_k in factors of like size whose terms do not cancel, for rules that multiply them out."""
        factors = [update.factors(module) for update in self.collected]
        # Scaled last: the rounding of s·B would be multiplied by what cancels.
        return [lowrank.scaled(lowrank.collected(lowrank.balanced(LowRank(f.b, f.a))), f.scaling) for f in factors]

    def places(self) -> dict[Place, Tensor]:
        """Return all running sums."""
        found = {("", name): value for name, value in self.dense.items()}
        return found | {(name, part): value for name, held in self.sums.items() for part, value in held.items()}


@dataclass(frozen=True, slots=True)
class Fold:
    """The accumulation of the updates of one exchange."""

    kind: Literal["sum", "collect"]
    add: Callable[[Partial, Update], Partial]
    merge: Callable[[Partial, Partial], Partial]
    add_in_place: Callable[[Partial, Update], Partial]
    """Like `add`, to the bit, but the sums and the list of the partial that it is given are changed: for its only
    owner."""


def weighted_mean(tensors: Iterable[Tensor], shares: Iterable[float]) -> Tensor:
    """Return Σ p_k x_k of tensors of one shape, accumulated in float64, in float32 at least."""
    total: Tensor | None = None
    kind = torch.float32
    for x, p in zip(tensors, shares, strict=True):
        kind = torch.promote_types(kind, x.dtype)
        if total is not None and x.shape != total.shape:
            shapes = f"{tuple(x.shape)} and {tuple(total.shape)}"
            raise FedspanError(f"tensors of shapes {shapes}: expected those of all clients to be of equal size")
        total = _times(x, p) if total is None else _add(total, x, p)
    if total is None:
        raise FedspanError("the mean of no tensors: expected at least one")
    return total.to(kind)


def _times(x: Tensor, weight: float) -> Tensor:
    """Return w·x in float64, contiguous and owned by the caller."""
    total: Tensor = x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    return total.mul_(weight)


_PIECE = 2**15
"""Numbers that are added at once: as float64 they fit the cache beside their sum."""


def _add(total: Tensor, x: Tensor, weight: float) -> Tensor:
    """Add w·x to a sum in place, in pieces on a CPU: a whole x would be copied to float64 first."""
    if x.numel() <= _PIECE or x.device.type != "cpu":
        return total.add_(_times(x, weight))
    flat, values = total.view(-1), x.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        # The product is rounded before it is added, as in the sum of two folds, or the bits would differ.
        flat[start : start + _PIECE].add_(_times(values[start : start + _PIECE], weight))
    return total


def _plus(x: Tensors, y: Tensors) -> dict[str, Tensor]:
    """Return x + y, name by name. Nothing is padded: the shapes of dense weights must agree."""
    _same_names("tensors", x, y)
    for name in x:
        if x[name].shape != y[name].shape:
            shapes = f"{tuple(x[name].shape)} and {tuple(y[name].shape)}"
            raise FedspanError(f"updates hold {name} in shapes {shapes}: expected one shape")
    return {name: x[name].double() + y[name] for name in x}


def _same_names(what: str, x: Mapping[str, object], y: Mapping[str, object]) -> None:
    if x.keys() != y.keys():
        raise FedspanError(f"updates name different {what}: {sorted(x.keys() ^ y.keys())[:3]}")


def _plus_nested(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y, where a factor of smaller rank fills the leading rows or columns and counts as zero elsewhere."""
    if x.shape == y.shape:
        return x.double() + y
    rows, columns = max(x.shape[0], y.shape[0]), max(x.shape[1], y.shape[1])
    total = x.new_zeros((rows, columns), dtype=torch.float64)
    total[: x.shape[0], : x.shape[1]] += x
    total[: y.shape[0], : y.shape[1]] += y
    return total


def _plus_modules(x: Mapping[str, Tensors], y: Mapping[str, Tensors]) -> dict[str, Tensors]:
    _same_names("modules", x, y)
    total: dict[str, Tensors] = {}
    for name in x:
        _same_names(f"tensors of {name}", x[name], y[name])
        total[name] = {part: _plus_nested(x[name][part], y[name][part]) for part in x[name]}
    return total


def _single(update: Update, summed: bool) -> Partial:
    """Return the fold of one update, in tensors of its own."""
    w = update.num_examples
    tensors = update.named_tensors()
    values = {place: _times(x, w) for place, x in tensors.items() if summed or not place[0]}
    kinds = {place: torch.promote_types(tensors[place].dtype, torch.float32) for place in values}
    modules = update.modules if summed else {}
    sums = {name: {part: values[name, part] for part in p.tensors()} for name, p in modules.items()}
    dense = {name: values["", name] for name in update.dense}
    collected = () if summed else (replace(update, dense={}),)
    return Partial(1, w, dense, sums, collected, kinds=kinds)


def _add_to_sum(partial: Partial, update: Update) -> Partial:
    return _merge(partial, _single(update, summed=True))


def _collect(partial: Partial, update: Update) -> Partial:
    return _merge(partial, _single(update, summed=False))


def _merge(x: Partial, y: Partial) -> Partial:
    # Only a fold of nothing may lack what the other names: anything else would be averaged as a zero.
    if x.num_clients == 0 or y.num_clients == 0:
        return y if x.num_clients == 0 else x
    dense, sums = _plus(x.dense, y.dense), _plus_modules(x.sums, y.sums)
    _same_names("modules", x.product_sums, y.product_sums)
    return Partial(
        x.num_clients + y.num_clients,
        x.weight + y.weight,
        dense,
        sums,
        (*x.collected, *y.collected),
        {name: add_products(held, y.product_sums[name]) for name, held in x.product_sums.items()},
        _kinds(x, y),
    )


def _kinds(x: Partial, y: Partial) -> Mapping[Place, torch.dtype]:
    """Return the types of the means over both."""
    if x.kinds == y.kinds and len(x.kinds) == len(x.places()):
        return x.kinds
    mine, others = ({p: part.kinds.get(p, value.dtype) for p, value in part.places().items()} for part in (x, y))
    return {place: torch.promote_types(mine[place], others[place]) for place in mine}


def _added_in_place(partial: Partial, update: Update) -> Partial:
    return _in_place(partial, update, summed=True)


def _collected_in_place(partial: Partial, update: Update) -> Partial:
    return _in_place(partial, update, summed=False)


def _in_place(partial: Partial, update: Update, summed: bool) -> Partial:
    totals = partial.places()
    values = {place: x for place, x in update.named_tensors().items() if summed or not place[0]}
    if partial.num_clients == 0 or not _fits(totals, values, partial.kinds):
        # Makes new tensors, which belong to the partial and may be added to; or says why the update does not fit.
        return _joined(_merge(replace(partial, joined=None), _single(update, summed)))
    w = update.num_examples
    if partial.joined is None:
        for place, x in values.items():
            _add(totals[place], x, w)
    else:
        _add_joined(partial.joined, [values[place] for place in totals], w)
    collected = partial.collected
    if not summed:
        collected = _own_list(partial)
        collected.append(replace(update, dense={}))
    return replace(partial, num_clients=partial.num_clients + 1, weight=partial.weight + w, collected=collected)


def replace_newest(partial: Partial, update: Update) -> Partial:
    """Return the fold with another update in the place of the last that it collected, changed in place: for its one
    owner."""
    collected = _own_list(partial)
    collected[-1] = update
    return replace(partial, collected=collected)


def _own_list(partial: Partial) -> MutableSequence[Update]:
    """Return the collected updates as a list that may be changed."""
    return partial.collected if isinstance(partial.collected, list) else list(partial.collected)


_JOINED_BELOW = 3 * 2**10
"""The mean number of entries below which the sums of a CPU are joined: the calls then cost more than a copy."""
_RUN = {"cpu": _PIECE}
_LONGEST_RUN = 2**27
"""Numbers that are added at once on other devices, which have no cache to stay in and wait for every call."""


def _joined(partial: Partial) -> Partial:
    """Return the partial with its sums as views of one tensor, where that saves time."""
    totals = partial.places()
    devices = {(x.device, x.dtype) for x in totals.values()}
    numbers = sum(x.numel() for x in totals.values())
    if len(devices) != 1 or len(totals) < 2 or {x.dtype for x in totals.values()} != {torch.float64}:
        return partial
    if next(iter(devices))[0].type == "cpu" and numbers >= _JOINED_BELOW * len(totals):
        return partial
    whole = torch.cat([x.reshape(-1) for x in totals.values()])
    parts = torch.split(whole, [x.numel() for x in totals.values()])
    views = {place: part.view(x.shape) for (place, x), part in zip(totals.items(), parts, strict=True)}
    dense = {name: views["", name] for name in partial.dense}
    sums = {name: {part: views[name, part] for part in held} for name, held in partial.sums.items()}
    return replace(partial, dense=dense, sums=sums, joined=whole)


def _add_joined(whole: Tensor, values: Sequence[Tensor], weight: float) -> None:
    """Add w·x to all sums, as many of them in one call as are added at once."""
    longest = _RUN.get(whole.device.type, _LONGEST_RUN)
    run: list[Tensor] = []
    start = length = 0
    for x in values:
        if run and length + x.numel() > longest:
            _add(whole[start : start + length], torch.cat(run), weight)
            start, run, length = start + length, [], 0
        run.append(x.reshape(-1))
        length += x.numel()
    _add(whole[start : start + length], torch.cat(run), weight)


def _fits(totals: Mapping[Place, Tensor], values: Mapping[Place, Tensor], kinds: Mapping[Place, torch.dtype]) -> bool:
    """Return whether the values can be added to the sums as they are."""
    return totals.keys() == values.keys() and all(
        x.shape == totals[place].shape
        and place in kinds
        and torch.promote_types(x.dtype, kinds[place]) == kinds[place]
        and totals[place].dtype == torch.float64
        for place, x in values.items()
    )


SUM = Fold("sum", _add_to_sum, _merge, _added_in_place)
COLLECT = Fold("collect", _collect, _merge, _collected_in_place)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request to the cohort, and the fold of its updates."""

    fold: Fold = COLLECT
    ask: Literal["train", "gradient", "again"] = "train"
    """``train``: the result of local training.  ``gradient``: the mean gradient over a few batches with respect to the
    weight of every module, as a Vector {"gradient": (m, n)}, before anything is trained.  ``again``: another
    function of the update from the exchange before."""
    every: int = 1
    """The number of rounds between two of it, from the first on; 0: the first round alone."""

    def due(self, round_num: int) -> bool:
        """Return whether it takes place in this round, counted from 0."""
        return round_num % self.every == 0 if self.every else round_num == 0
