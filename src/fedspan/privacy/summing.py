"""A client's answer as one vector, so that the server need not see more than the sum of the vectors.

A client's vector holds n_k, n_k again where it tells its training loss, n_k times that loss, and n_k times every
number that it would have sent, in a layout that all clients share; a factor of smaller rank fills the leading rows or
columns. The sum is what a fold over the answers is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedspan.methods.folds import Partial
from fedspan.methods.messages import Update
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.support.errors import FedspanError

Shape = tuple[int, ...]
_HEAD = 3
"""Words before the tensors."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names and shapes of what is summed, in the order in which it stands in the vector."""

    dense: Mapping[str, Shape]
    modules: Mapping[str, Mapping[str, Shape]]

    @classmethod
    def of(cls, update: Update) -> Layout:
        """The layout of what the client of largest rank sends."""
        modules = {
            name: {part: tuple(t.shape) for part, t in sorted(payload.tensors().items())}
            for name, payload in sorted(update.modules.items())
        }
        return cls({name: tuple(t.shape) for name, t in sorted(update.dense.items())}, modules)

    @property
    def num_words(self) -> int:
        """Numbers in the vector."""
        shapes = [*self.dense.values(), *(s for held in self.modules.values() for s in held.values())]
        return _HEAD + sum(math.prod(shape) for shape in shapes)

    def flatten(self, update: Update, train_loss: float) -> Tensor:
        """n, n, n·loss and n·x, (num_words,) in float64.

        Parameters
        ----------
        train_loss
            NaN where it is not told.

        Raises
        ------
        ValueError
            When the update names other tensors than the layout, or one that is larger.
        """
        weight = update.num_examples
        held = update.named_tensors()
        wanted = {("", name): shape for name, shape in self.dense.items()}
        wanted |= {(name, part): shape for name, x in self.modules.items() for part, shape in x.items()}
        if held.keys() != wanted.keys():
            raise FedspanError(f"the answer names other tensors than the sum: {sorted(held.keys() ^ wanted.keys())[0]}")
        loss_terms = (weight, weight * train_loss) if math.isfinite(train_loss) else (0.0, 0.0)
        pieces = [torch.tensor([weight, *loss_terms], dtype=torch.float64)]
        pieces += [_padded(held[key], shape, key).flatten() * weight for key, shape in wanted.items()]
        return torch.cat(pieces)

    def partial(self, total: Tensor, num_clients: int) -> tuple[Partial, float]:
        """The fold that this sum over `num_clients` clients stands for, and their mean loss."""
        weight, loss_weight, loss = total[:_HEAD].tolist()
        start = _HEAD

        def take(shape: Shape) -> Tensor:
            nonlocal start
            piece = total[start : start + math.prod(shape)].reshape(shape).to(torch.float32)
            start += math.prod(shape)
            return piece

        dense = {name: take(shape) for name, shape in self.dense.items()}
        sums = {name: {part: take(shape) for part, shape in held.items()} for name, held in self.modules.items()}
        return Partial(num_clients, weight, dense, sums), loss / loss_weight if loss_weight else math.nan

    def to_json(self) -> dict[str, Any]:
        """For a message."""
        return {
            "dense": {name: list(shape) for name, shape in self.dense.items()},
            "modules": {name: {p: list(s) for p, s in held.items()} for name, held in self.modules.items()},
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Layout:
        """As it was sent."""
        modules = {name: {p: tuple(s) for p, s in held.items()} for name, held in told["modules"].items()}
        return cls({name: tuple(shape) for name, shape in told["dense"].items()}, modules)


def _padded(tensor: Tensor, shape: Shape, key: tuple[str, str]) -> Tensor:
    """In float64, with zeros where a client of larger rank has more."""
    exact = tensor.detach().to("cpu", torch.float64)
    if tuple(exact.shape) == shape:
        return exact
    name = "/".join(filter(None, key))
    # As in a fold: factors of smaller rank are nested in larger ones; nothing else has leave to differ.
    if (
        key[0] == ""
        or exact.ndim != 2
        or len(shape) != 2
        or any(x > y for x, y in zip(exact.shape, shape, strict=True))
    ):
        raise FedspanError(f"{name} has shape {tuple(exact.shape)}: expected at most {shape}")
    whole = exact.new_zeros(shape)
    whole[: exact.shape[0], : exact.shape[1]] = exact
    return whole


@dataclass(frozen=True, slots=True)
class Sum:
    """How a run's sums are taken, where all clients are in one process."""

    arithmetic: FixedPoint
    masked: bool
    threshold: float
    """Share of the clients that must stay."""
    run: str = ""
    """Names the run in the sums' sessions."""

    def begin(self, layout: Layout, num_clients: int) -> Adding:
        """A sum over at most so many clients."""
        return Adding(self, layout, num_clients)

    def needed(self, num_clients: int) -> int:
        """How many clients must stay until the end: at least two, or there would be nothing to hide in."""
        return max(2, math.ceil(self.threshold * num_clients))


@dataclass(slots=True)
class Adding:
    """One sum as it grows."""

    how: Sum
    layout: Layout
    num_clients: int
    vectors: dict[str, Words] = field(default_factory=dict)
    total: Words | None = None
    count: int = 0

    def add(self, update: Update, train_loss: float) -> str | None:
        """Count one client's answer; what is wrong with it, where it cannot be."""
        try:
            words = self.how.arithmetic.encode(self.layout.flatten(update, train_loss), self.num_clients)
        except ValueError as error:
            return str(error)
        self.count += 1
        if self.how.masked:
            self.vectors[update.client_id] = words
        else:
            self.total = words if self.total is None else self.total + words
        return None

    def partial(self, round_num: int, exchange: int) -> tuple[Partial, float]:
        """The fold over everyone that was counted, and their mean loss.

        Raises
        ------
        ValueError
            When fewer stayed than can unmask a sum.
        """
        if self.how.masked and self.vectors:
            from fedspan.privacy.secure_sum import sum_in_process  # which needs the extra `secure`

            session = f"{self.how.run}/{round_num}/{exchange}".encode()
            self.total = sum_in_process(self.vectors, self.how.needed(self.num_clients), session)
        if self.total is None:
            return Partial(), 0.0
        return self.layout.partial(self.how.arithmetic.decode(self.total), self.count)
