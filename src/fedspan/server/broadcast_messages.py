"""The messages of one exchange in which sites are sent a broadcast: for training and for an evaluation alike.

Both name by digests what a site holds already (`fedspan.server.contents`), and make a message when it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.federation.clients import Client
from fedspan.federation.exchange import BroadcastFor, Question
from fedspan.methods.messages import Broadcast
from fedspan.server.contents import SiteContents
from fedspan.server.key_exchange import Heading
from fedspan.server.requests import Problem, Reply, Requests
from fedspan.wire import protocol
from fedspan.wire.precision import Kind
from fedspan.wire.protocol import MessageTensors

SumFields = Callable[[str, MessageTensors], dict[str, Any]]
"""(client, the message's tensors) -> the description of the sum that it is to take part in."""


@dataclass(frozen=True, slots=True)
class MessageForm:
    """The parts of an exchange's messages that do not depend on the client."""

    question: Question
    heading: Heading
    """The fields of every message of the exchange, those about keys included."""
    fields: Mapping[str, Any]
    """Those of the messages with a broadcast."""
    derived: Callable[[int], Broadcast]
    """Rank -> the broadcast that a site works out by itself."""
    kind: Kind
    """The type in which broadcasts travel."""
    keep: bool = False
    """Sites are asked to keep all that they are sent, since they will be sent it again."""
    answer_bytes: Callable[[str], int] = lambda client_id: 0
    """Client -> about the bytes of its answer, once its message is made."""


class BroadcastMessages(Mapping[str, bytes]):
    """The messages by client, each made when it is looked up, and again where it is sent once more.

    Parameters
    ----------
    sum_fields
        None: the clients are asked for an answer of their own.
    on_message
        Called with a client and what it is sent, before its message is made.
    """

    def __init__(
        self,
        requests: Requests,
        contents: SiteContents,
        form: MessageForm,
        clients: Sequence[Client],
        broadcast_for: BroadcastFor,
        sum_fields: SumFields | None = None,
        on_message: Callable[[Client, Broadcast], None] = lambda client, sent: None,
    ) -> None:
        self._requests, self._contents, self._form = requests, contents, form
        self._clients = {client.client_id: client for client in clients}
        self._sum_fields, self._on_message = sum_fields, on_message
        contents.begin(form.question)
        self.sent = {client.client_id: broadcast_for(client) for client in clients}
        """By client."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.sent)

    def __len__(self) -> int:
        return len(self.sent)

    def __getitem__(self, client_id: str) -> bytes:
        client, sent, form = self._clients[client_id], self.sent[client_id], self._form
        self._on_message(client, sent)
        outgoing, derived, question = MessageTensors(), form.derived(client.rank), form.question
        described = protocol.put_broadcast(outgoing, sent, derived, form.kind)
        patch = protocol.put_patch(outgoing, sent, question.seen.get(client_id, 0), question.version)
        head = {
            **form.heading,
            **form.fields,
            "counted": question.counted.get(client_id, 0),
            "broadcast": described,
            "patch": patch,
            **self._contents.name(question, client_id, sent, derived, (described, patch), outgoing, form.keep),
        }
        if self._sum_fields is not None:
            head["sum"] = self._sum_fields(client_id, outgoing)
        self._requests.count_payload(outgoing.payload())
        return protocol.encode(head, outgoing)

    def whole(self, client_id: str) -> bytes:
        """Return a client's message with all of its tensors."""
        self._contents.forget(client_id)
        return self[client_id]

    def replies(self, enough: int | None = None) -> Iterator[tuple[str, Reply | Problem]]:
        """Send the messages and yield the replies as they come, after noting what the sites hold now.

        Parameters
        ----------
        enough
            The number of replies to wait for; None: all of them.
        """
        form = self._form
        replies = self._requests.exchange(form.question, self, enough, self.whole, form.answer_bytes)
        for client_id, reply in replies:
            if isinstance(reply, Reply):
                header = reply.header
                self._contents.answered(client_id, header.get("stored", False), header.get("gone", ()))
            yield client_id, reply
            del reply  # it is not held while the next one comes
