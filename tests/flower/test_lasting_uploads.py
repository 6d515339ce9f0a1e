"""An answer whose upload is interrupted arrives all the same, against Flower's own state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import Message
from flwr.app.message.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError, ObjectUnavailableError
from flwr.supercore.task_identity import TaskIdentity
from grids import RUN, field

from fedspan.flower import lasting_uploads, records
from fedspan.flower.lasting_uploads import LastingUploads
from fedspan.support.errors import FedspanError

CONTENT = random.Random(0).randbytes(12_000_000)


@dataclass
class Answer:
    """One node's answer at Flower's own state, and the calls of its upload."""

    state: Any
    message: Message
    asked: str

    def __post_init__(self) -> None:
        self.tree = get_object_tree(self.message)
        self.parts = {name: part.deflate() for name, part in get_all_nested_objects(self.message).items()}
        self.bare = remove_content_from_message(self.message)
        self.bare.metadata.__dict__["_message_id"] = self.message.object_id

    def send(self, message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
        session = self.state.start_session(RUN)
        _, needed = self.state.store_message_and_object_tree(message, tree, session)
        return set(needed), session

    def push(self, run_id: int, session: str, part: str, content: bytes) -> None:
        if not self.state.store_object(run_id, session, part, content):
            raise ObjectPushError(part, run_id, session)

    def pull(self, run_id: int, part: str) -> bytes:
        content = self.state.get_object(run_id, part)
        if content is None:
            raise ObjectPullError(part, "the object could not be found.")
        if content == b"":
            raise ObjectUnavailableError(part)
        return bytes(content)

    def server_asks(self) -> None:
        """The server takes the announcement, as the SuperLink's own handler lets it."""
        assert len(self.state.get_message_res({self.asked}, RUN)) == 1
        self.state.delete_messages(message_ins_ids={self.asked})

    def arrived(self) -> bool:
        return all(self.state.get_object(RUN, part) == content for part, content in self.parts.items())


@pytest.fixture
def answer() -> Iterator[Answer]:
    with field(ClientApp()) as made:
        made.silent.update(made.nodes)
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        question = Message(records.pack(b"?", 60.0), made.nodes[0], records.MESSAGE_TYPE, ttl=60.0)
        (asked,) = made.grid.push_messages([question])
        made.state.get_message_ins(node_id=made.nodes[0], limit=1)
        TaskIdentity.node_id = made.nodes[0]
        message = Message(records.pack(CONTENT), reply_to=question)
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        yield Answer(made.state, message, asked)


def upload(answer: Answer, uploads: Any) -> None:
    needed, session = uploads.send(answer.bare, answer.tree, 1.0)
    for part in needed:
        uploads.push(RUN, session, part, answer.parts[part])


def test_an_announcement_whose_response_was_lost_is_repeated_after_the_server_has_asked(answer: Answer) -> None:
    needed, _ = answer.send(answer.bare, answer.tree, 1.0)  # its response is lost
    assert needed == answer.parts.keys()
    answer.server_asks()
    assert answer.send(answer.bare, answer.tree, 1.0)[0] == set(), "Flower's own: nothing more is sent"
    upload(answer, LastingUploads(answer.send, answer.push, answer.pull))
    assert answer.arrived()


def test_a_part_whose_response_was_lost_is_sent_twice(answer: Answer) -> None:
    uploads = LastingUploads(answer.send, answer.push, answer.pull)
    needed, session = uploads.send(answer.bare, answer.tree, 1.0)
    first, *_ = needed
    answer.push(RUN, session, first, answer.parts[first])  # its response is lost
    with pytest.raises(ObjectPushError):
        answer.push(RUN, session, first, answer.parts[first])
    for part in needed:
        uploads.push(RUN, session, part, answer.parts[part])
    assert answer.arrived()


def test_a_part_that_the_superlink_does_not_take_ends_the_upload(answer: Answer) -> None:
    uploads = LastingUploads(answer.send, answer.push, answer.pull)
    needed, _ = uploads.send(answer.bare, answer.tree, 1.0)
    with pytest.raises(ObjectPushError):
        uploads.push(RUN, "another session", next(iter(needed)), b"a part")


@contextmanager
def swallowing() -> Iterator[tuple[int, ...]]:
    """A connection of another release, in which errors end as in Flower's own."""
    with suppress(Exception):
        yield 1, 2, 3


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import start_client_internal as loop

    with pytest.raises(FedspanError, match="with 3 calls: expected 8"), lasting_uploads.lasting(swallowing)():
        pass
    monkeypatch.delattr(loop, "http_request_response")
    with pytest.raises(FedspanError, match="no http_request_response"):
        lasting_uploads.install()
