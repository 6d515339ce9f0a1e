"""Folds: the accumulation of client updates on a server, as a sum or as a collection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.methods.messages import Tensors, Update
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Partial:
    """The fold of the updates seen so far; two of them merge, so servers can form a tree."""

    num_clients: int = 0
    weight: float = 0.0
    dense: Tensors = field(default_factory=dict)
    """Σ n_k x_k."""
    sums: Mapping[str, Tensors] = field(default_factory=dict)
    """Σ n_k · payload_k, for a sum."""
    collected: tuple[Update, ...] = ()
    """The updates themselves, for a method that needs each."""

    def mean_dense(self) -> Tensors:
        """Return Σ p_k x_k over the participants."""
        return {name: value / self.weight for name, value in self.dense.items()}

    def mean(self, module: str) -> Tensors:
        """Return Σ p_k payload_k of one module, field by field."""
        return {name: value / self.weight for name, value in self.sums[module].items()}

    def shares(self) -> list[float]:
        """Return p_k = n_k / Σ n of the collected updates. The one place where counts become weights."""
        return [update.num_examples / self.weight for update in self.collected]

    def deltas(self, module: str) -> list[LowRank]:
        """Return s_k B_k A_k of the collected updates."""
        return [update.factors(module).delta() for update in self.collected]


@dataclass(frozen=True, slots=True)
class Fold:
    """The accumulation of the updates of one exchange."""

    kind: Literal["sum", "collect"]
    add: Callable[[Partial, Update], Partial]
    merge: Callable[[Partial, Partial], Partial]


def _plus(x: Tensors, y: Tensors) -> dict[str, Tensor]:
    """Return x + y, name by name. Nothing is padded: the shapes of dense weights must agree."""
    _same_names("tensors", x, y)
    for name in x:
        if x[name].shape != y[name].shape:
            shapes = f"{tuple(x[name].shape)} and {tuple(y[name].shape)}"
            raise FedspanError(f"updates hold {name} in shapes {shapes}: expected one shape")
    return {name: x[name] + y[name] for name in x}


def _same_names(what: str, x: Mapping[str, object], y: Mapping[str, object]) -> None:
    if x.keys() != y.keys():
        raise FedspanError(f"updates name different {what}: {sorted(x.keys() ^ y.keys())[:3]}")


def _plus_nested(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y, where a factor of smaller rank fills the leading rows or columns and counts as zero elsewhere."""
    if x.shape == y.shape:
        return x + y
    rows, columns = max(x.shape[0], y.shape[0]), max(x.shape[1], y.shape[1])
    total = x.new_zeros((rows, columns))
    total[: x.shape[0], : x.shape[1]] += x
    total[: y.shape[0], : y.shape[1]] += y
    return total


def _weighted(x: Tensors, weight: float) -> dict[str, Tensor]:
    return {name: lowrank.promote(value) * weight for name, value in x.items()}


def _plus_modules(x: Mapping[str, Tensors], y: Mapping[str, Tensors]) -> dict[str, Tensors]:
    _same_names("modules", x, y)
    total: dict[str, Tensors] = {}
    for name in x:
        _same_names(f"tensors of {name}", x[name], y[name])
        total[name] = {part: _plus_nested(x[name][part], y[name][part]) for part in x[name]}
    return total


def _add_to_sum(partial: Partial, update: Update) -> Partial:
    w = update.num_examples
    modules = {name: _weighted(p.tensors(), w) for name, p in update.modules.items()}
    return _merge(partial, Partial(1, w, _weighted(update.dense, w), modules))


def _collect(partial: Partial, update: Update) -> Partial:
    w = update.num_examples
    return _merge(partial, Partial(1, w, _weighted(update.dense, w), collected=(replace(update, dense={}),)))


def _merge(x: Partial, y: Partial) -> Partial:
    # Only a fold of nothing may lack what the other names: anything else would be averaged as a zero.
    if x.num_clients == 0 or y.num_clients == 0:
        return y if x.num_clients == 0 else x
    return Partial(
        x.num_clients + y.num_clients,
        x.weight + y.weight,
        _plus(x.dense, y.dense),
        _plus_modules(x.sums, y.sums),
        (*x.collected, *y.collected),
    )


SUM = Fold("sum", _add_to_sum, _merge)
COLLECT = Fold("collect", _collect, _merge)


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
