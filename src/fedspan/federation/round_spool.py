"""The updates of a round that its server needs all at once, in files where memory does not hold them.

A collected update is replaced by one whose factors are read from its file at every access, module by module, as the
server's rules go through them: the same numbers, and so the same bits. Moments of a local optimizer, which one method
collects, stay in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedspan.methods.folds import Partial, replace_newest
from fedspan.methods.messages import Update
from fedspan.streaming.spool import Spool, read_update
from fedspan.support.free_memory import free_memory


class RoundSpool:
    """Keeps collected updates in memory up to a limit, and in a folder beyond it.

    Parameters
    ----------
    folder
        Made when the first update goes there.
    limit
        Bytes of factors that stay in memory; none: half of the memory that is free at the first update.
    """

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._spool = Spool(folder)
        self._limit = limit
        self._held = 0
        self.num_spooled = 0

    def shed(self, partial: Partial) -> Partial:
        """Return the fold with its newest update in a file, where memory is full; called after every update."""
        if not partial.collected:
            return partial
        newest = partial.collected[-1]
        tensors = [t for payload in newest.modules.values() for t in payload.tensors().values()]
        if self._limit is None:
            self._limit = free_memory() // 2
        self._held += sum(t.numel() * t.element_size() for t in tensors)
        # What is on another device is not in this memory, and would be computed on elsewhere after reading.
        if self._held <= self._limit or any(t.device.type != "cpu" for t in tensors):
            return partial
        self.num_spooled += 1
        return replace_newest(partial, self._stored(newest))

    def _stored(self, update: Update) -> Update:
        path = self._spool.add(replace(update, client_id=f"{self.num_spooled:09d}"))
        return replace(update, modules=read_update(path).modules)


@contextmanager
def round_spool(folder: Path, limit: int | None) -> Iterator[RoundSpool]:
    """Yield the spool of one round; what it left behind goes with it, and so does what an interrupted one left."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield RoundSpool(folder, limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
