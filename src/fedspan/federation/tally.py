"""The costs and events of one round, added up as it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedspan.methods.base import ServerState
from fedspan.methods.folds import Partial
from fedspan.support.peak_memory import peak_memory, reset_peak_memory
from fedspan.wire.sizes import partial_bytes, state_bytes


@dataclass(slots=True)
class RoundTally:
    """The costs and events of a round, added up as it goes.

    Server time is work of the server alone: broadcasts, folds, filters and steps. The time spent waiting for clients
    is counted apart from it.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    server_seconds: float = 0.0
    client_seconds: float = 0.0
    train_wall_seconds: float = 0.0
    peak_server_bytes: int = 0
    optimizer_bytes: int = 0
    """The largest that a client's local optimizer held."""
    bad: int = 0
    """Clients whose answer was wrong, not counting those that did not answer."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Client -> why its answer was left out."""
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def server(self) -> Iterator[None]:
        """Count the time inside as the server's."""
        began = time.perf_counter()
        yield
        self.server_seconds += time.perf_counter() - began

    @contextmanager
    def memory(self, state: ServerState, partial: Partial) -> Iterator[None]:
        """Measure the peak memory of the step inside, with what the server holds before it."""
        held = state_bytes(state) + partial_bytes(partial)
        before = reset_peak_memory()
        yield
        self.peak_server_bytes = max(self.peak_server_bytes, held + peak_memory() - before)

    def record(self) -> dict[str, Any]:
        """Return the entries of the round's record."""
        return {
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "server_seconds": self.server_seconds,
            "client_seconds": self.client_seconds,
            "train_wall_seconds": self.train_wall_seconds,
            "peak_server_bytes": self.peak_server_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "rejected": self.rejected,
            **self.diagnostics,
        }
