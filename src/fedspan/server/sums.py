"""The collection of one sum over the clients of an exchange, in the open or under masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedspan.config import Config
from fedspan.federation.clients import Client
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.server.requests import Problem, Reply
from fedspan.support.errors import FedspanError
from fedspan.wire.protocol import MessageTensors


class SumCollector(Protocol):
    """One sum that is being collected. The masked one is `fedspan.server.masked_sums.MaskedSum`."""

    @property
    def problems(self) -> Mapping[str, Problem]:
        """The clients that are not in the sum, and why. They may be left out before they are sent anything."""

    def message_fields(self, client_id: str, outgoing: MessageTensors) -> dict[str, Any]:
        """Return what a client needs to know to send its part."""

    def add(self, client_id: str, words: Words) -> None:
        """Add one client's part.

        Raises
        ------
        FedspanError
            When it cannot be in the sum. Nothing has changed then.
        """

    def leave_out(self, client_id: str, problem: Problem) -> None:
        """Record that a client's part is not in the sum."""

    def total(self) -> Words | None:
        """Return the sum, (num_words,) of uint64, and close it; None where it is to be collected once more.

        Raises
        ------
        FedspanError
            When it cannot be recovered.
        """


class PlainSum:
    """The arithmetic of secure sums without their masks: the same words, added in the open.

    Parameters
    ----------
    num_clients
        That are asked: each may add so much that their sum cannot wrap.
    weights
        Client -> the weight that it must count for; clients whose weight is not known are not in it.
    """

    def __init__(self, num_words: int, fixed_point: FixedPoint, num_clients: int, weights: Mapping[str, float]) -> None:
        self.problems: dict[str, Problem] = {}
        self._num_clients, self._weights = num_clients, weights
        self._fixed_point, self._limit = fixed_point, fixed_point.limit(num_clients)
        self._total: Words = np.zeros(num_words, dtype=np.uint64)

    def message_fields(self, client_id: str, outgoing: MessageTensors) -> dict[str, Any]:
        """Return for how many clients each must leave room, so that the sum cannot wrap, whether or not all stay."""
        return {"num_clients": self._num_clients}

    def add(self, client_id: str, words: Words) -> None:
        """Add one client's words, mod 2^64, after checking what masks would hide."""
        numbers = self._fixed_point.decode(words)
        if not bool((numbers.abs() <= self._limit).all()):
            raise FedspanError(f"a number of its part is beyond {self._limit:.6g}: the sum could wrap")
        weight = self._weights.get(client_id, max(float(numbers[0]), 1.0))
        if float(numbers[0]) != weight or float(numbers[1]) not in (0.0, weight):
            raise FedspanError(f"counts as {float(numbers[0]):g} examples: expected {weight:g}")
        self._total += words

    def leave_out(self, client_id: str, problem: Problem) -> None:
        """Record that a client's words are not in the sum."""
        self.problems[client_id] = problem

    def total(self) -> Words:
        """Return the sum."""
        return self._total


def known_weights(config: Config, clients: Iterable[Client]) -> dict[str, float]:
    """Return what each client counts for, where the server knows it."""
    # Under masks and under client-level privacy the sites do not say how many examples they have.
    privacy, weighting = config.privacy, config.federation.weighting
    known = weighting == "equal" or not (privacy.secure_sums or privacy.dp == "client")
    return {c.client_id: c.weight(weighting) for c in clients if known}


def words_of(reply: Reply, num_words: int) -> Words:
    """Return the vector of an answer to a question about a sum, (num_words,).

    Raises
    ------
    FedspanError
        When it is of another type or length: under masks nothing else can be checked.
    """
    place = reply.header.get("words")
    if place is None:
        raise FedspanError("an answer without a vector")
    vector = reply.tensors[place]
    if vector.dtype != torch.int64 or tuple(vector.shape) != (num_words,):
        raise FedspanError(f"a vector of {vector.dtype} in shape {tuple(vector.shape)}: expected {num_words} words")
    words: Words = vector.contiguous().numpy().view(np.uint64)
    return words


def check_weights(numbers: Tensor, count: int, weight: float | None) -> None:
    """Check the weights of a sum, by which it is divided.

    Under masks nobody can tell which client's vector was wrong, so that the sum as a whole is refused. Masks that do
    not cancel leave random words, which no more than one time in 2^`fraction_bits` are a whole number of examples.

    Parameters
    ----------
    numbers
        The sum, (num_words,): the weights, the weights of those that report a loss, and more.
    count
        Of the clients in it.
    weight
        What they count for together; None where they do not say.

    Raises
    ------
    FedspanError
        When they cannot be the weights of so many clients.
    """
    found, losses = numbers[:2].tolist()
    sound = found == weight if weight is not None else found >= count and found.is_integer()
    if not sound or not 0 <= losses <= found or not losses.is_integer():
        expected = "at least one example each" if weight is None else f"{weight:g} examples"
        raise FedspanError(
            f"the sum of {count} clients counts as {found:g} examples and {losses:g} losses: expected {expected}; the "
            "vector of at least one of them is wrong, and the sum is given up"
        )
