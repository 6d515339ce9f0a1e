"""A client's answer as one vector, so that the server need not see more than the sum of the vectors.

A client's vector holds n_k, n_k again where it reports its training loss, n_k times that loss, and n_k times every
number that it would have sent, in a layout that all clients share; a factor of smaller rank fills the leading rows or
columns. The sum of the vectors is equivalent to a fold over the answers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedspan.methods.folds import Partial
from fedspan.methods.messages import Update
from fedspan.support.errors import FedspanError

Shape = tuple[int, ...]
_NUM_HEADER_WORDS = 3
"""n, n and n·loss, before the tensors."""


@dataclass(frozen=True, slots=True)
class SumLayout:
    """Names and shapes of the tensors that are summed, in their order in the vector."""

    dense: Mapping[str, Shape]
    modules: Mapping[str, Mapping[str, Shape]]

    @classmethod
    def of(cls, update: Update) -> SumLayout:
        """Return the layout of an update, that of the client of largest rank."""
        modules = {
            name: {part: tuple(t.shape) for part, t in sorted(payload.tensors().items())}
            for name, payload in sorted(update.modules.items())
        }
        return cls({name: tuple(t.shape) for name, t in sorted(update.dense.items())}, modules)

    @property
    def num_words(self) -> int:
        """Numbers in the vector."""
        shapes = [*self.dense.values(), *(s for held in self.modules.values() for s in held.values())]
        return _NUM_HEADER_WORDS + sum(math.prod(shape) for shape in shapes)

    def flatten(self, update: Update, train_loss: float) -> Tensor:
        """Return n, n, n·loss and n·x, (num_words,) in float64.

        Parameters
        ----------
        train_loss
            NaN where it is not reported.

        Raises
        ------
        FedspanError
            When the update names other tensors than the layout, or one that is larger.
        """
        weight = update.num_examples
        tensors = update.named_tensors()
        wanted = {("", name): shape for name, shape in self.dense.items()}
        wanted |= {(name, part): shape for name, x in self.modules.items() for part, shape in x.items()}
        if tensors.keys() != wanted.keys():
            raise FedspanError(
                f"the answer names other tensors than the sum: {sorted(tensors.keys() ^ wanted.keys())[0]}"
            )
        # A weight of the loss's own: a client that does not report one must not pull the mean towards 0.
        loss_terms = (weight, weight * train_loss) if math.isfinite(train_loss) else (0.0, 0.0)
        vector = torch.zeros(self.num_words, dtype=torch.float64)
        vector[:_NUM_HEADER_WORDS] = torch.tensor([weight, *loss_terms], dtype=torch.float64)
        start = _NUM_HEADER_WORDS
        for key, shape in wanted.items():
            end = start + math.prod(shape)
            _write(vector[start:end].view(shape), tensors[key], key)
            vector[start:end].mul_(weight)
            start = end
        return vector

    def partial(self, total: Tensor, num_clients: int) -> tuple[Partial, float]:
        """Return the fold that this sum over `num_clients` clients is equivalent to, and their mean loss."""
        weight, loss_weight, loss = total[:_NUM_HEADER_WORDS].tolist()
        start = _NUM_HEADER_WORDS

        def take(shape: Shape) -> Tensor:
            nonlocal start
            piece = total[start : start + math.prod(shape)].reshape(shape).to(torch.float32)
            start += math.prod(shape)
            return piece

        dense = {name: take(shape) for name, shape in self.dense.items()}
        sums = {name: {part: take(shape) for part, shape in held.items()} for name, held in self.modules.items()}
        return Partial(num_clients, weight, dense, sums), loss / loss_weight if loss_weight else math.nan

    def described(self) -> list[Any]:
        """Return the names and shapes in their order, as JSON that `SumTerms` digests."""
        modules = [[name, [[part, list(s)] for part, s in held.items()]] for name, held in self.modules.items()]
        return [[[name, list(shape)] for name, shape in self.dense.items()], modules]


@dataclass(frozen=True, slots=True)
class SumTerms:
    """Everything that must be the same for all clients of a masked sum: a digest of it is in the key of every mask.

    Each client makes it from its own settings, its own layout and the messages that it received. If a server told two
    of them different things, their masks would not cancel, and it would learn nothing.
    """

    run: str
    round_num: int
    number: int
    """Of the exchange, in the method's list."""
    settings: str
    """Digest of the agreed settings."""
    base: str
    """Digest of the untouched base."""
    server_rank: int
    num_clients: int
    """Of the run."""
    rank: int
    """The largest of the clients of this sum, whose layout all of them use."""
    layout: SumLayout

    def digest(self) -> bytes:
        """Return the SHA-256 of all of it."""
        numbers = [self.round_num, self.number, self.server_rank, self.num_clients, self.rank]
        content = [self.run, self.settings, self.base, numbers, self.layout.described()]
        return hashlib.sha256(json.dumps(content).encode()).digest()


def _write(place: Tensor, tensor: Tensor, key: tuple[str, str]) -> None:
    """Write the tensor into its place, which stays zero where a client of larger rank has more."""
    tensor, shape = tensor.detach(), tuple(place.shape)
    if tuple(tensor.shape) == shape:
        place.copy_(tensor)
        return
    name = "/".join(filter(None, key))
    # As in a fold: factors of smaller rank are nested in larger ones; no other shape may differ.
    if (
        key[0] == ""
        or tensor.ndim != 2
        or len(shape) != 2
        or any(x > y for x, y in zip(tensor.shape, shape, strict=True))
    ):
        raise FedspanError(f"{name} has shape {tuple(tensor.shape)}: expected at most {shape}")
    place[: tensor.shape[0], : tensor.shape[1]].copy_(tensor)
