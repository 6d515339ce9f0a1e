"""The dealing of tasks to this process and to others behind channels.

The next task goes to whoever is free, the costliest first, as with worker processes (`client.processes`); this process
works too. Each of the others has a thread here that sends it a task, waits for the answer and takes the next, so that
none waits for this process's own work. Answers come in any order: the caller puts them in theirs.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fedspan.client.processes import Answer, MakeMessage, rebuild_error
from fedspan.wire import packing

_Answered = tuple[int, Any, list[Tensor]]
"""Number of the task, what was answered or the error of this side, and the answer's tensors."""


class Dealer:
    """Deals tasks; has the interface of `client.processes.Processes`.

    Parameters
    ----------
    channels
        Process -> the channel to it. It answers every message with one, as `client.processes.answer_messages` does.
    lost
        Called, on any thread, with a process that is gone and with the reason; returns the error to raise.
    """

    def __init__(self, channels: Mapping[int, packing.Channel], lost: Callable[[int, str], BaseException]) -> None:
        self._channels, self._lost = channels, lost
        self._notes: dict[int, set[int]] = {rank: set() for rank in channels}
        self._threads: dict[int, threading.Thread] = {}
        self._replies: queue.SimpleQueue[_Answered] = queue.SimpleQueue()
        self.own: Answer | None = None
        """Does this process's share of the tasks."""
        self.doing: dict[int, Any] = {}
        """Process -> the message that it is busy with."""

    def start(self) -> None:
        """Do nothing: torchrun has started the processes."""

    def close(self) -> None:
        """Do nothing: the processes end when the run does."""

    def tell(self, message: Any) -> None:
        """Begin to send every process a message outside the tasks."""
        for rank in self._channels:
            self._begin(rank, deque([rank]), {rank: lambda held: (message, ())}, self._replies)

    def replies(self, each: int) -> dict[int, list[Any]]:
        """Return the answers to the last `each` messages of `tell`, in the order of the messages.

        Raises
        ------
        Exception
            The one that a process answered with.
        """
        found: dict[int, list[Any]] = {rank: [] for rank in self._channels}
        for _ in range(each * len(self._channels)):
            rank, answer, _ = _opened(self._replies.get())
            found[rank].append(answer)
        return found

    def run(self, tasks: Sequence[MakeMessage]) -> Iterator[tuple[int, Any, list[Tensor]]]:
        """Yield the answers to all tasks, with the tasks' numbers, as they come in. Tasks begin in their order."""
        waiting, numbered = deque(range(len(tasks))), dict(enumerate(tasks))
        # Not one queue for all calls: an earlier caller may have taken only some of its answers.
        answers: queue.SimpleQueue[_Answered] = queue.SimpleQueue()
        for rank in self._channels:
            self._begin(rank, waiting, numbered, answers)
        try:
            for _ in tasks:
                number = _next(waiting) if answers.empty() else None
                yield _opened(answers.get()) if number is None else self._work(number, tasks[number])
        finally:
            waiting.clear()

    def _work(self, number: int, task: MakeMessage) -> tuple[int, Any, list[Tensor]]:
        assert self.own is not None
        message, tensors = task(self._notes.setdefault(0, set()))
        answer, out = self.own(message, list(tensors))
        return number, answer, list(out)

    def _begin(
        self,
        rank: int,
        waiting: deque[int],
        tasks: Mapping[int, MakeMessage],
        answers: queue.SimpleQueue[_Answered],
    ) -> None:
        given = (rank, self._threads.get(rank), waiting, tasks, answers)
        self._threads[rank] = threading.Thread(target=self._ask, args=given, daemon=True)
        self._threads[rank].start()

    def _ask(
        self,
        rank: int,
        before: threading.Thread | None,
        waiting: deque[int],
        tasks: Mapping[int, MakeMessage],
        answers: queue.SimpleQueue[_Answered],
    ) -> None:
        """Give a process one task after the other, and pass its answers on."""
        if before is not None:
            before.join()  # an answer may be on its way that must not be taken for one of these
        while (number := _next(waiting)) is not None:
            try:
                reply, tensors = self._asked(rank, *tasks[number](self._notes[rank]))
            except (EOFError, OSError):
                answers.put((number, self._lost(rank, "its connection is closed"), []))
                return
            except Exception as error:  # raised where the answer is taken
                answers.put((number, error, []))
                return
            answers.put((number, reply, tensors))

    def _asked(self, rank: int, message: Any, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        self.doing[rank] = message
        packing.send(self._channels[rank], message, tensors)
        reply, received = packing.receive(self._channels[rank])
        del self.doing[rank]
        return reply, received


def _next(waiting: deque[int]) -> int | None:
    """Return the next task and take it from those that wait, whichever thread asks; None where none is left."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _opened(answered: _Answered) -> tuple[int, Any, list[Tensor]]:
    """Return an answer, or raise the error that came instead of one."""
    number, reply, tensors = answered
    if isinstance(reply, BaseException):
        raise reply
    if "error" in reply:
        raise rebuild_error(reply["error"])
    return number, reply["answer"], tensors
