"""The place of this process among those that torchrun started, read from the environment; without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fedspan.support.errors import FedspanError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_AGENT = "TORCHELASTIC_USE_AGENT_STORE"


@dataclass(frozen=True, slots=True)
class Place:
    """One of the processes that work on one run."""

    rank: int
    """From 0; process 0 leads the run."""
    size: int
    """Number of processes on all machines, at least 2."""
    local_rank: int = 0
    """From 0, on this machine."""
    agent_store: bool = True
    """The store at which the processes meet outlives them; otherwise it lives in process 0."""

    @property
    def speaks(self) -> bool:
        """Return whether this process says that process 0 is gone: one does on every machine."""
        return self.rank == 1 or (self.rank > 1 and self.local_rank == 0)


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """Return this process's place among those that work together, or None where it works alone.

    Raises
    ------
    FedspanError
        When the variables that torchrun sets are there and make no sense.
    """
    if any(name not in environ for name in _NEEDED):
        return None
    rank, size = _count(environ, "RANK"), _count(environ, "WORLD_SIZE")
    if rank >= size:
        raise FedspanError(f"RANK = {rank} with WORLD_SIZE = {size} in the environment: expected 0 to {size - 1}")
    if size == 1:
        return None
    local_rank = _count(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank
    return Place(rank, size, local_rank, environ.get(_AGENT) == "True")


def _count(environ: Mapping[str, str], name: str) -> int:
    given = environ[name]
    if not (given.isascii() and given.isdigit()):
        raise FedspanError(f"{name} = {given!r} in the environment: expected a whole number, as torchrun sets it")
    return int(given)
