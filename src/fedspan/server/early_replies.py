"""Answers in a fixed order, whatever the order in which they come: those that are early wait, on disk beyond a limit.

Floating-point sums depend on their order, and the order of arrival is never the same twice. A message waits as the very
bytes that came and is read again when its turn has come, so that where it waited changes no bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from fedspan.server.requests import Problem, Reply
from fedspan.support.files import make_folder
from fedspan.support.free_memory import free_memory

ReadAgain = Callable[[str, bytes], Reply | Problem]
"""(client, a message that it sent) -> the reply in it."""


class EarlyReplies:
    """The replies of one exchange that came before their turn.

    Parameters
    ----------
    folder
        Holds those for which memory has no room, one file each; made when it is needed.
    limit
        Bytes that stay in memory; None: half of the memory that is free when the first comes early.
    read
        Reads a message again.
    """

    def __init__(self, folder: Path, limit: int | None, read: ReadAgain) -> None:
        self._folder, self._limit, self._read = folder, limit, read
        self._kept: dict[str, bytes | Path | Problem] = {}
        self._held = 0
        self.num_stored = 0
        """Messages that went to the disk."""

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._kept

    def put(self, client_id: str, reply: Reply | Problem) -> None:
        """Keep a reply, or the problem in its place."""
        if isinstance(reply, Problem):
            self._kept[client_id] = reply
            return
        if self._limit is None:
            self._limit = free_memory() // 2
        if self._held + len(reply.content) <= self._limit:
            self._held += len(reply.content)
            self._kept[client_id] = reply.content
        else:
            self._kept[client_id] = self._stored(reply.content)

    def take(self, client_id: str) -> Reply | Problem:
        """Return a reply and let go of it."""
        kept = self._kept.pop(client_id)
        if isinstance(kept, Problem):
            return kept
        if isinstance(kept, bytes):
            self._held -= len(kept)
            return self._read(client_id, kept)
        content = kept.read_bytes()
        kept.unlink()
        return self._read(client_id, content)

    def close(self) -> None:
        """Remove the files."""
        self._kept.clear()
        clear_early(self._folder)

    def _stored(self, content: bytes) -> Path:
        if not self.num_stored:
            clear_early(self._folder)  # of a process that was killed
            make_folder(self._folder)
        path = self._folder / f"{self.num_stored:06d}"
        self.num_stored += 1
        # Nothing is flushed: a round that is interrupted is done again.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        return path


def clear_early(folder: Path) -> None:
    """Remove what a server that was killed has left in the folder of early replies."""
    shutil.rmtree(folder, ignore_errors=True)


def in_order(
    replies: Iterable[tuple[str, Reply | Problem]],
    absent: Mapping[str, Problem],
    ids: Sequence[str],
    early: EarlyReplies,
) -> Iterator[tuple[str, Reply | Problem]]:
    """Yield replies in the order of `ids`, each as soon as all before it are known.

    Parameters
    ----------
    absent
        Those that are known beforehand.
    ids
        Every client, in order.
    """
    waiting = list(reversed(ids))
    for client_id, problem in absent.items():
        early.put(client_id, problem)

    def due() -> Iterator[tuple[str, Reply | Problem]]:
        while waiting and waiting[-1] in early:
            client_id = waiting.pop()
            yield client_id, early.take(client_id)

    try:
        yield from due()
        for client_id, reply in replies:
            if client_id == waiting[-1]:
                waiting.pop()
                yield client_id, reply
            else:
                early.put(client_id, reply)
            del reply  # it is not held while the next one comes
            yield from due()
        assert not waiting  # each of them has replied, or there is a problem
    finally:
        early.close()
