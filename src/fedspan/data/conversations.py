"""Conversations: rows of a `messages` column, checked turn by turn.

Two spellings are read: OpenAI's ``{"role": …, "content": …}`` and ShareGPT's ``{"from": …, "value": …}``. A system turn
may come first; then a user and an assistant take turns, and the last turn is the assistant's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedspan.config import DataConfig
from fedspan.data.rows import Rows
from fedspan.data.tables import Table
from fedspan.support.errors import FedspanError

COLUMNS = ("messages", "conversations")
"""Columns that are taken for conversations where `data.messages_column` names none."""
Role = Literal["system", "user", "assistant"]
_ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SENDERS: Mapping[str, Role] = {**_ROLES, "human": "user", "gpt": "assistant"}
_KEYS = (("role", "content", _ROLES), ("from", "value", _SENDERS))
# Keys that change what a turn means, so that leaving them out would train on something else.
_UNREAD = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "refusal", "images", "audio")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str
    trained: bool = True
    """The loss is on it; for turns of the assistant alone. OpenAI's ``"weight": 0`` makes it context."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system turn, or none, and one exchange or more, each a user's turn and the assistant's."""

    turns: tuple[Turn, ...]
    where: str
    """Its row and table, as messages name them."""

    @property
    def system(self) -> tuple[Turn, ...]:
        """The system turn, or nothing."""
        return tuple(turn for turn in self.turns[:1] if turn.role == "system")

    @property
    def num_exchanges(self) -> int:
        """Number of the assistant's turns."""
        return sum(turn.role == "assistant" for turn in self.turns)

    @property
    def answer(self) -> Turn:
        """The assistant's last turn."""
        return self.turns[-1]

    def without_oldest(self) -> Conversation:
        """Return it without its oldest exchange."""
        system = self.system
        return replace(self, turns=system + self.turns[len(system) + 2 :])


def column_of(table: Table, config: DataConfig) -> str | None:
    """Return the column of conversations: `data.messages_column`, or a usual name where there are no plain answers."""
    if config.messages_column is not None:
        return config.messages_column
    if config.output_column in table.columns:
        return None
    return next((name for name in COLUMNS if name in table.columns), None)


def conversations_of(rows: Rows) -> list[Conversation] | None:
    """Return the conversations that the rows are, or None for instructions with their answers.

    Raises
    ------
    FedspanError
        For a mixture, as of files with different columns.
    """
    if not isinstance(rows.inputs, list):
        return None
    found = [row for row in rows.inputs if isinstance(row, Conversation)]
    if found and len(found) < len(rows):
        raise FedspanError(f"{found[0].where} is a conversation, and other rows are not: expected one form of data")
    return found or None


def read_conversations(table: Table, name: str) -> list[Conversation]:
    """Return the conversations of a column.

    Raises
    ------
    FedspanError
        Naming the row and turn that is not as expected.
    """
    values = table.column(name, "data.messages_column")
    return [_conversation(value, f"row {row} of {table.source}") for row, value in enumerate(values, 1)]


def _conversation(value: Any, where: str) -> Conversation:
    if isinstance(value, str) or not isinstance(value, Sequence):
        form = "null" if value is None else type(value).__name__
        raise FedspanError(f'{where}: its conversation is {form}: expected a list of {{"role": …, "content": …}}')
    turns = tuple(_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1))
    _check_order(turns, where)
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        raise FedspanError(f'{where}: every turn of the assistant has "weight": 0: expected one to learn from')
    return Conversation(turns, where)


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise FedspanError(f'{where}, is {type(turn).__name__}: expected {{"role": …, "content": …}}')
    spelling = next((keys for keys in _KEYS if keys[0] in turn), None)
    if spelling is None:
        raise FedspanError(f'{where}, has the keys {", ".join(map(str, turn))}: expected "role" or "from"')
    sender, text, roles = spelling
    name, content = turn[sender], turn.get(text)
    if not isinstance(name, str) or name not in roles:
        raise FedspanError(f"{where}, has the {sender} {name!r}: expected {', '.join(roles)}")
    for key in _UNREAD:
        if turn.get(key):
            raise FedspanError(f"{where}, has {key!r}: expected {sender} and {text} alone, since it would not be read")
    return Turn(roles[name], _content(content, text, where), _is_trained(turn.get("weight"), where))


def _content(content: Any, key: str, where: str) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str):
        raise FedspanError(f"{where}: its {key} is a list of parts: expected one text")
    if not isinstance(content, str):
        form = "missing or null" if content is None else type(content).__name__
        raise FedspanError(f"{where}: its {key} is {form}: expected text")
    if not content.strip():
        raise FedspanError(f"{where}: its {key} is empty: expected text")
    return content


def _is_trained(weight: Any, where: str) -> bool:
    if weight is None:
        return True
    if isinstance(weight, bool) or weight not in (0, 1):
        raise FedspanError(f"{where}: its weight is {weight!r}: expected 0 or 1")
    return bool(weight)


def _check_order(turns: Sequence[Turn], where: str) -> None:
    """Check that user and assistant take turns, after a system turn or none, and that the assistant ends."""
    if not any(turn.role == "assistant" for turn in turns):
        raise FedspanError(f"{where}: its conversation has no turn of the assistant: expected one to learn from")
    expected = "user"
    for number, turn in enumerate(turns, 1):
        if turn.role == "system" and number == 1:
            continue
        if turn.role != expected:
            raise FedspanError(f"{where}, turn {number}, is of the {turn.role}: expected the {expected}")
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant":
        raise FedspanError(f"{where}: its last turn is of the user: expected the assistant, whose answer is learnt")
