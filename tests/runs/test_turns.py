"""Computations that take turns: one at a time, answered together, each with its own errors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from fedspan.runs.turns import Stopped, Turn, take_turns
from fedspan.support.activity import listening, report


def doubled(waiting: Sequence[tuple[int, Any]]) -> dict[int, Any]:
    return {i: 2 * request for i, request in waiting}


def test_all_that_wait_are_answered_together_and_one_runs_at_a_time() -> None:
    running, rounds = threading.Lock(), []

    def work(turn: Turn, count: int) -> int:
        total = 0
        for number in range(1, count + 1):
            assert running.acquire(blocking=False)
            running.release()
            total += turn.ask(number)
        return total

    def answer(waiting: Sequence[tuple[int, Any]]) -> dict[int, Any]:
        rounds.append(list(waiting))
        return doubled(waiting)

    turns = [Turn(partial(work, count=count)) for count in (3, 1, 0, 2)]
    take_turns(turns, answer)
    assert [turn.result for turn in turns] == [12, 2, 0, 6]
    assert rounds == [[(0, 1), (1, 1), (3, 1)], [(0, 2), (3, 2)], [(0, 3)]]


def test_every_computation_has_the_context_of_its_caller() -> None:
    """A listener to the work in hand hears what is reported in each of them."""
    heard: list[str] = []

    def work(turn: Turn, number: int) -> None:
        report(f"reading {number}")
        turn.ask(1)
        report(f"read {number}")

    with listening(lambda activity: heard.append(activity.what)):
        take_turns([Turn(partial(work, number=number)) for number in range(2)], doubled)
    assert heard == ["reading 0", "reading 1", "read 0", "read 1"]


def test_one_that_fails_does_not_stop_the_others() -> None:
    def fails(turn: Turn) -> int:
        turn.ask(1)
        raise ValueError("mine")

    def handed(turn: Turn) -> str:
        try:
            turn.ask(5)
        except KeyError as error:
            return f"caught {error}"
        return "nothing"

    def answer(waiting: Sequence[tuple[int, Any]]) -> dict[int, Any]:
        return {i: KeyError("x") if request == 5 else 2 * request for i, request in waiting}

    turns = first, second, third = [Turn(fails), Turn(handed), Turn(lambda turn: turn.ask(2) + turn.ask(3))]
    take_turns(turns, answer)
    assert isinstance(first.error, ValueError)
    assert (second.result, third.result) == ("caught 'x'", 10)


def test_who_waits_is_stopped_when_nobody_answers() -> None:
    cleaned: list[int] = []

    def work(turn: Turn, number: int) -> None:
        try:
            turn.ask(number)
        except Stopped:
            cleaned.append(number)
            raise

    def answer(waiting: Sequence[tuple[int, Any]]) -> dict[int, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns([Turn(partial(work, number=number)) for number in range(3)], answer)
    assert cleaned == [0, 1, 2]
