"""Laws of dealing: every task is done once, whoever does it; errors and losses reach the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import Any

import pytest
import torch
from torch import Tensor

from fedspan.client.processes import Answer, MakeMessage, Message, answer_messages
from fedspan.distributed.dealer import Dealer


class Lost(Exception):
    """What a test's dealer raises of a process that is gone."""


def square(message: Mapping[str, Any], tensors: list[Tensor]) -> Message:
    """The number and the tensor, squared; an error for 13."""
    time.sleep(message.get("seconds", 0.0))
    if message["number"] == 13:
        raise ValueError("13 is not wanted")
    return {"number": message["number"] ** 2}, [tensor**2 for tensor in tensors]


@contextmanager
def dealer(others: int, answer: Answer = square) -> Iterator[Dealer]:
    """A dealer to that many others, which answer on threads of this process."""
    pipes = {rank: Pipe() for rank in range(1, others + 1)}
    for _, far in pipes.values():
        threading.Thread(target=answer_messages, args=(far, answer), daemon=True).start()
    made = Dealer({rank: near for rank, (near, _) in pipes.items()}, lambda rank, how: Lost(f"{rank} is gone"))
    made.own = answer
    yield made
    for near, far in pipes.values():
        near.close()
        far.close()


def task(number: int, **more: Any) -> MakeMessage:
    return lambda held: ({"number": number, **more}, [torch.tensor([float(number)])])


@pytest.mark.parametrize("others", [1, 3])
def test_every_task_is_done_once(others: int) -> None:
    with dealer(others) as deal:
        for _ in range(3):
            tasks = [task(n, seconds=0.001) for n in range(13)]
            done = {number: (answer, tensors) for number, answer, tensors in deal.run(tasks)}
            assert sorted(done) == list(range(13))
            for n, (answer, (tensor,)) in done.items():
                assert answer == {"number": n**2}
                assert float(tensor) == n**2


def test_all_take_part_and_the_free_ones_take_more() -> None:
    did: dict[int, int] = {}

    def count(message: Mapping[str, Any], tensors: list[Tensor]) -> Message:
        thread = threading.get_ident()
        did[thread] = did.get(thread, 0) + 1
        time.sleep(0.05 if did[thread] > 1 or len(did) > 1 else 0.4)  # whoever is first is slow
        return {}, ()

    with dealer(2, count) as deal:
        assert len(list(deal.run([task(n) for n in range(12)]))) == 12
    assert len(did) == 3
    assert min(did.values()) < max(did.values())


def test_an_error_of_another_process_is_raised_here() -> None:
    with dealer(2) as deal:
        deal.own = lambda message, tensors: ({}, ())
        given = [task(n) for n in (1, 2)]
        list(deal.run(given))
        # This process is busy with the first until the others have had the second.
        deal.own = lambda message, tensors: (time.sleep(0.3), ({}, ()))[1]
        with pytest.raises(ValueError, match="13 is not wanted"):
            list(deal.run([task(13)] * 6))


def test_an_error_of_a_task_that_cannot_be_made_is_raised_here() -> None:
    def broken(held: set[int]) -> Message:
        raise TypeError("not a task")

    with dealer(1) as deal, pytest.raises(TypeError, match="not a task"):
        list(deal.run([broken] * 4))


def test_answers_that_nobody_took_are_not_those_of_the_next_call() -> None:
    with dealer(2) as deal:
        first = deal.run([task(n, seconds=0.05) for n in range(9)])
        next(first)
        first.close()  # as where a round fails
        done = {number: answer["number"] for number, answer, _ in deal.run([task(n) for n in (20, 21, 22)])}
        assert done == {0: 400, 1: 441, 2: 484}


def test_a_process_that_is_gone_is_named() -> None:
    near, far = Pipe()
    deal = Dealer({4: near}, lambda rank, how: Lost(f"{rank} is gone"))
    deal.own = lambda message, tensors: (time.sleep(0.01), ({}, ()))[1]
    far.close()
    with pytest.raises(Lost, match="4 is gone"):
        list(deal.run([task(n) for n in range(50)]))


def test_messages_outside_the_tasks_are_answered_in_their_order() -> None:
    with dealer(3) as deal:
        deal.tell({"number": 5})
        deal.tell({"number": 6})
        assert deal.replies(2) == {rank: [{"number": 25}, {"number": 36}] for rank in (1, 2, 3)}
        deal.tell({"number": 13})
        with pytest.raises(ValueError, match="13 is not wanted"):
            deal.replies(1)


def test_what_was_brought_to_a_process_is_noted_for_it_alone() -> None:
    seen: list[tuple[int, int]] = []

    def noting(number: int) -> MakeMessage:
        def make(held: set[int]) -> Message:
            seen.append((id(held), len(held)))
            held.add(number)
            return {"number": number, "seconds": 0.02}, ()

        return make

    with dealer(2) as deal:
        list(deal.run([noting(n) for n in range(6)]))
    for own in {held for held, _ in seen}:
        counts = [count for held, count in seen if held == own]
        assert counts == list(range(len(counts)))
    assert len({held for held, _ in seen}) == 3
