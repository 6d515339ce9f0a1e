"""Answers at a SuperLink, of which the parts come one after the other: each is fetched as far as it is there.

A site announces an answer before it uploads the parts of it, pieces of 5 MiB. Flower's own grid, once it has taken an
announcement, waits until the last piece is there, for two hours if need be. Meanwhile no other answer is read and no
deadline is kept: one site whose upload stops half-way, or that sends a piece every other minute, would hold up a whole
federation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
)
from flwr.superlink.grid.http_grid import HttpGrid

from fedspan.support.errors import one_line

TURN = 30.0
"""Seconds for which an answer whose upload is under way is fetched before others are begun, so that as a rule one large
answer is in memory at a time. A slower one is fetched beside them."""

_AT_ONCE = 64
"""Parts of one answer that are asked for in one go: an announcement may name any number that never come."""

Answer = tuple[str, Message | str]
"""The ticket that is answered, and the answer, or why none will come."""


class Answers(Protocol):
    """Answers that come to the tickets of messages."""

    def pull(self, tickets: Sequence[str]) -> list[Answer]:
        """Return the answers to these tickets that are whole, each once."""

    def is_under_way(self, tickets: Sequence[str]) -> bool:
        """Return whether an answer to one of these tickets is being uploaded, and has its turn."""

    def forget(self, tickets: Sequence[str]) -> None:
        """Let go of the parts that came for these tickets."""


def answers_at(grid: Grid) -> Answers:
    """Return the answers that come to a grid."""
    return PartialAnswers(grid) if isinstance(grid, HttpGrid) else WholeAnswers(grid)


class WholeAnswers:
    """Answers of a grid that announces none before it is whole, as in a simulation."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def pull(self, tickets: Sequence[str]) -> list[Answer]:
        """Return the answers to these tickets."""
        return [(reply.metadata.reply_to_message_id, reply) for reply in self._grid.pull_messages(tickets)]

    def is_under_way(self, tickets: Sequence[str]) -> bool:
        """Return False."""
        return False

    def forget(self, tickets: Sequence[str]) -> None:
        """Do nothing."""


@dataclass(slots=True)
class _Announced:
    """An answer of which some parts may not be there yet."""

    message_id: str
    needed: list[str]
    """Ids of its parts."""
    since: float
    parts: dict[str, bytes] = field(default_factory=dict)


class PartialAnswers:
    """Answers over the network, fetched part by part.

    Parameters
    ----------
    now
        Returns seconds of a monotonic clock.
    """

    def __init__(self, grid: HttpGrid, now: Callable[[], float] = time.monotonic) -> None:
        self._grid, self._now = grid, now
        self._announced: dict[str, _Announced] = {}
        """By ticket. The SuperLink announces an answer once."""

    def pull(self, tickets: Sequence[str]) -> list[Answer]:
        """Return the answers to these tickets whose last part is there; one that is not whole keeps nobody waiting."""
        self._ask([ticket for ticket in tickets if ticket not in self._announced])
        answers: list[Answer] = []
        for ticket in [ticket for ticket in self._announced if ticket in tickets]:
            try:
                found = self._fetched(self._announced[ticket])
            except Exception:
                self._announced[ticket] = self._announced.pop(ticket)  # the others' turn is next
                if not answers:
                    raise
                break  # those that are whole would be lost with it; it is tried again with a later call
            if not isinstance(found, _Announced):
                self.forget([ticket])
                answers.append((ticket, found))
        return answers

    def is_under_way(self, tickets: Sequence[str]) -> bool:
        """Return whether one of these answers was announced less than `TURN` seconds ago and is not whole."""
        begun = [self._announced[ticket].since for ticket in tickets if ticket in self._announced]
        return any(self._now() - since < TURN for since in begun)

    def forget(self, tickets: Sequence[str]) -> None:
        """Let go of the parts that came for these tickets."""
        for ticket in tickets:
            self._announced.pop(ticket, None)

    def _ask(self, tickets: Sequence[str]) -> None:
        """Take note of the answers that were announced since the last call."""
        if not tickets:
            return
        response = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=tickets))
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            # Of the announcement, which the SuperLink has checked, and not of the message, which is the site's own
            # words: it could name another site's ticket.
            parts = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
            answer = _Announced(message.metadata.message_id, parts, self._now())
            self._announced[message.metadata.reply_to_message_id] = answer

    def _fetched(self, answer: _Announced) -> Message | _Announced | str:
        """Return the answer as a message; itself while parts are missing, and a reason where no message will come."""
        if self._fetch_parts(answer):
            return "its answer broke off before the last part of it"
        if len(answer.parts) < len(answer.needed):
            return answer
        self._confirm(answer)
        try:
            message = inflate_object_from_contents(answer.message_id, answer.parts)
        except Exception as error:  # of parts that are a site's own words
            return f"its answer could not be put together ({one_line(error, 200)})"
        if not isinstance(message, Message):
            return f"its answer is a {type(message).__name__}: expected a message"
        message.metadata.__dict__["_message_id"] = answer.message_id  # which is not a part of what is sent
        return message

    def _fetch_parts(self, answer: _Announced) -> bool:
        """Fetch the parts that are there, until the first that is not; return whether the upload has broken off."""
        waiting = False
        fetch = make_pull_object_fn_protobuf(
            self._grid._runtime_client.PullObject, self._grid.node, self._grid.run.run_id
        )

        def keep(part: str) -> bytes:
            nonlocal waiting
            try:
                answer.parts[part] = fetch(part)
            except ObjectUnavailableError:
                waiting = True
                raise
            return b""

        missing = list(islice((part for part in answer.needed if part not in answer.parts), _AT_ONCE))
        try:
            pull_objects(missing, keep, max_tries_per_object=1)
        except ObjectPullError:
            return not waiting
        return False

    def _confirm(self, answer: _Announced) -> None:
        """Say that the answer has come, so that the SuperLink lets go of it."""
        self._grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._grid.node, run_id=self._grid.run.run_id, message_object_id=answer.message_id
            )
        )
