"""Several computations in one process that take turns, so that what they ask for can be done together.

Each computation is ordinary code that calls `ask` where it needs work done. One of them runs at a time, in an order
that is always the same; where it asks, the next one runs, and once all of them wait for an answer, their requests are
answered together. Threads serve as coroutines here, since a run asks from deep inside its round loop: never do two of
them run at once, so none needs a lock.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class Stopped(BaseException):
    """Raised in a computation that will get no answer, because all of them are being stopped."""


@dataclass(slots=True)
class Turn:
    """One computation: its thread, and what passes between it and the one that answers."""

    work: Callable[[Turn], Any]
    _answered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    request: Any = None
    """The request that it waits for; None once it has ended."""
    result: Any = None
    """The value that it returned."""
    error: BaseException | None = None
    """The error that it raised."""
    _answer: Any = None
    _thread: threading.Thread | None = None

    def ask(self, request: Any) -> Any:
        """Return the answer to a request; called by the computation itself.

        Raises
        ------
        BaseException
            The one that was given as the answer.
        """
        self.request = request
        self._asked.release()
        self._answered.acquire()
        self.request = None
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def go_on(self, answer: Any = None) -> None:
        """Let the computation run, from its start or with this answer, until it asks or ends."""
        self._answer = answer
        if self._thread is None:
            # With the caller's context variables, such as the listener to the work in hand.
            self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True)
            self._thread.start()
        else:
            self._answered.release()
        self._asked.acquire()

    def _run(self) -> None:
        try:
            self.result = self.work(self)
        except BaseException as error:  # handed to the one that answers
            self.error = error
        self._asked.release()


def take_turns(turns: Sequence[Turn], answer: Callable[[Sequence[tuple[int, Any]]], dict[int, Any]]) -> None:
    """Run these computations to their ends; each turn then has the result or the error of its own.

    Parameters
    ----------
    answer
        Takes the number and request of every computation that waits, and returns their answers; an exception as an
        answer is raised in that computation.

    Raises
    ------
    BaseException
        From `answer`, or of a computation that was interrupted, after `Stopped` was raised in every computation that
        waits.
    """
    try:
        for turn in turns:
            _go_on(turn)
        while waiting := [(i, turn.request) for i, turn in enumerate(turns) if turn.request is not None]:
            answers = answer(waiting)
            for i, _ in waiting:
                _go_on(turns[i], answers[i])
    except BaseException:
        for turn in turns:
            if turn.request is not None:
                turn.go_on(Stopped())
        raise


def _go_on(turn: Turn, answer: Any = None) -> None:
    turn.go_on(answer)
    # Nobody is asked to handle an interruption: it stops all of them.
    if turn.error is not None and not isinstance(turn.error, Exception):
        raise turn.error
