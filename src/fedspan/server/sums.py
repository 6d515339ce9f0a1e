"""The collection of one sum over the clients of an exchange, in the open or under masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from fedspan.privacy.fixed_point import Words
from fedspan.server.requests import Problem
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
    """The arithmetic of secure sums without their masks: the same words, added in the open."""

    def __init__(self, num_words: int, num_clients: int) -> None:
        self.problems: dict[str, Problem] = {}
        self._num_clients = num_clients
        self._total: Words = np.zeros(num_words, dtype=np.uint64)

    def message_fields(self, client_id: str, outgoing: MessageTensors) -> dict[str, Any]:
        """Return for how many clients each must leave room, so that the sum cannot wrap, whether or not all stay."""
        return {"num_clients": self._num_clients}

    def add(self, client_id: str, words: Words) -> None:
        """Add one client's words, mod 2^64."""
        self._total += words

    def leave_out(self, client_id: str, problem: Problem) -> None:
        """Record that a client's words are not in the sum."""
        self.problems[client_id] = problem

    def total(self) -> Words:
        """Return the sum."""
        return self._total
