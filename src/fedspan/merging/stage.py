"""The stages of a round: the exchanges of a method that clients answer with one piece of work."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from fedspan.methods.base import Method, ServerState


@dataclass(frozen=True, slots=True)
class Stage:
    """Exchanges that one piece of work answers: the one that asks for it, and those that ask about it again."""

    ask: Literal["train", "gradient"]
    numbers: tuple[int, ...]
    """Their places in the method's list."""
    following: int | None
    """The exchange that the round's next stage begins with; none: the round ends with this one."""


def stage_of(method: Method, state: ServerState) -> Stage:
    """Return the stage that a state is at the beginning of.

    Raises
    ------
    ValueError
        When no stage begins at the state's exchange or after it.
    """
    due = [n for n, x in enumerate(method.exchanges) if n >= state.exchange and x.due(state.round_num)]
    ask = method.exchanges[due[0]].ask if due else "again"
    if ask == "again":
        raise ValueError(f"exchange {state.exchange} of round {state.round_num + 1} begins no stage")
    again = tuple(takewhile(lambda number: method.exchanges[number].ask == "again", due[1:]))
    rest = due[1 + len(again) :]
    return Stage(ask, (due[0], *again), rest[0] if rest else None)
