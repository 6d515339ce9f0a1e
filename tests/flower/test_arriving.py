"""Answers whose parts come one after the other: one that is not whole holds up nobody, and names nobody else."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import HEAD_BODY_DIVIDER, get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedspan.flower import arriving, records
from fedspan.flower.grid_transport import GridTransport
from fedspan.wire.transport import AT_ONCE, Delivery

RUN, NODES = 7, (11, 12, 13)
CONTENT = random.Random(0).randbytes(12_000_000)  # three pieces and what holds them together


class SuperLink:
    """The calls of a SuperLink's runtime API, with the answers of nodes as far as they were uploaded."""

    def __init__(self) -> None:
        self.asked: dict[str, Message] = {}
        self.announced: dict[str, tuple[Any, Any]] = {}
        """By ticket."""
        self.parts: dict[str, bytes | None] = {}
        """None where a part is announced and not there yet."""
        self._late: dict[str, bytes] = {}
        self.handed_over: Counter[str] = Counter()
        self.confirmed: list[str] = []
        self.failures = 0

    def reply(self, ticket: str, content: bytes, without: int = 0, as_if_to: str | None = None) -> list[str]:
        """Announce a node's answer and upload it but for the last parts, whose ids are returned."""
        asked = self.asked[ticket]
        TaskIdentity.node_id = asked.metadata.dst_node_id
        answer = Message(records.pack(content), reply_to=asked)
        announcement = message_to_proto(remove_content_from_message(answer))
        if as_if_to is not None:
            answer.metadata.__dict__["_reply_to_message_id"] = as_if_to
        tree, objects = get_object_tree(answer), get_all_nested_objects(answer)
        announcement.metadata.message_id = answer.object_id
        self.announced[ticket] = announcement, tree
        missing = list(objects)[len(objects) - without :]
        self.parts |= {name: None if name in missing else part.deflate() for name, part in objects.items()}
        self._late |= {name: objects[name].deflate() for name in missing}
        return missing

    def upload(self, part: str) -> None:
        self.parts[part] = self._late[part]

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        found = [self.announced.pop(ticket) for ticket in request.message_ids if ticket in self.announced]
        return PullAppMessagesResponse(
            messages_list=[message for message, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def PullObject(self, request: Any) -> PullObjectResponse:
        if self.failures:
            self.failures -= 1
            raise httpx.ReadError("the connection was reset")
        found = request.object_id in self.parts
        content = self.parts.get(request.object_id)
        self.handed_over[request.object_id] += content is not None
        return PullObjectResponse(
            object_found=found, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.confirmed.append(request.message_object_id)


class Grid(HttpGrid):
    """Flower's grid over that SuperLink."""

    def __init__(self, superlink: SuperLink) -> None:
        super().__init__(token="t")
        self.superlink = superlink
        self.set_run(Run.create_empty(run_id=RUN))

    @property
    def _runtime_client(self) -> Any:
        return self.superlink

    def push_messages(self, messages: Any) -> list[str]:
        tickets = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.superlink.asked[message.object_id] = message
            tickets.append(message.object_id)
        return tickets


@pytest.fixture
def made() -> Iterator[SimpleNamespace]:
    before = {name: getattr(TaskIdentity, name) for name in ("_task_id", "_run_id", "_node_id")}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, SUPERLINK_NODE_ID
    superlink = SuperLink()
    transport = GridTransport(Grid(superlink), "test")
    yield SimpleNamespace(superlink=superlink, transport=transport)
    for name, value in before.items():
        setattr(TaskIdentity, name, value)


def send(made: SimpleNamespace, answer_bytes: int = AT_ONCE) -> list[str]:
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    messages = [(str(node), f"to {node}".encode()) for node in NODES]
    return made.transport.send(messages, 600.0, answer_bytes)


def collect(made: SimpleNamespace, wanted: int) -> dict[str, Delivery]:
    """Return so many deliveries, and check that no poll brings another one."""
    found: dict[str, Delivery] = {}
    end = time.monotonic() + 30
    while len(found) < wanted and time.monotonic() < end:
        found |= {delivery.ticket: delivery for delivery in made.transport.poll()}
        time.sleep(0.01)
    assert not any(made.transport.poll() for _ in range(3))
    return found


@pytest.mark.parametrize("answer_bytes", [AT_ONCE, 1000])
def test_an_upload_that_stops_half_way_holds_up_nobody(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, answer_bytes: int
) -> None:
    """Flower's own grid would wait for the last part of the first answer, and read no other until then."""
    monkeypatch.setattr(arriving, "TURN", 0.05)
    first, second, third = send(made, answer_bytes)
    (last,) = made.superlink.reply(first, CONTENT, without=1)
    made.superlink.reply(second, b"b" + CONTENT)
    made.superlink.reply(third, b"c")
    assert {ticket: d.content for ticket, d in collect(made, 2).items()} == {second: b"b" + CONTENT, third: b"c"}
    assert len(made.superlink.confirmed) == 2
    made.superlink.upload(last)
    assert {ticket: d.content for ticket, d in collect(made, 1).items()} == {first: CONTENT}
    assert len(made.superlink.confirmed) == 3


def test_an_answer_that_comes_part_by_part_is_fetched_once_and_before_others(made: SimpleNamespace) -> None:
    first, second, _ = send(made)
    late = made.superlink.reply(first, CONTENT, without=3)
    made.superlink.reply(second, b"b")
    for part in late:
        assert collect(made, 0) == {}
        made.superlink.upload(part)
    assert [(d.ticket, d.content) for d in made.transport.poll()] == [(first, CONTENT)]
    assert [(d.ticket, d.content) for d in made.transport.poll()] == [(second, b"b")]
    assert all(count == 1 for count in made.superlink.handed_over.values())


def test_an_upload_that_broke_off_is_an_error_at_once(made: SimpleNamespace) -> None:
    first, second, _ = send(made)
    (last,) = made.superlink.reply(first, CONTENT, without=1)
    made.superlink.reply(second, b"b")
    del made.superlink.parts[last]  # as when Flower has given the upload up
    found = collect(made, 2)
    assert (found[first].content, found[first].error) == (None, "its answer broke off before the last part of it")
    assert found[second].content == b"b"


def test_parts_that_came_are_let_go_of_with_their_ticket(made: SimpleNamespace) -> None:
    first, *_ = send(made)
    made.superlink.reply(first, CONTENT, without=1)
    assert collect(made, 0) == {}
    held = made.transport._answers._announced
    assert sum(map(len, held[first].parts.values())) > len(CONTENT) // 2
    made.transport.forget([first])
    assert held == {}


def test_a_site_answers_for_its_own_ticket_whatever_its_message_says(made: SimpleNamespace) -> None:
    """The SuperLink checks the announcement; the message itself is the site's own words."""
    first, second, _ = send(made)
    made.superlink.reply(second, b"mine", as_if_to=first)
    assert {ticket: d.node for ticket, d in collect(made, 1).items()} == {second: str(NODES[1])}


def test_trouble_on_the_way_loses_no_answer(made: SimpleNamespace) -> None:
    tickets = send(made, 1000)
    for ticket in tickets:
        made.superlink.reply(ticket, b"small")
    made.superlink.failures = 2
    found = collect(made, 3)
    assert {ticket: d.content for ticket, d in found.items()} == dict.fromkeys(tickets, b"small")


def garbled(made: SimpleNamespace, ticket: str, kind: str) -> None:
    """Announce an answer that no message can be made of."""
    asked = made.superlink.asked[ticket]
    TaskIdentity.node_id = asked.metadata.dst_node_id
    answer = Message(records.pack(b"x"), reply_to=asked)
    announcement = message_to_proto(remove_content_from_message(answer))
    content = {
        "without its parts": answer.deflate(),
        "no message": ConfigRecord({"a": 1.0}).deflate(),
        "a body of no form": b"Message  5" + HEAD_BODY_DIVIDER + b"\xff" * 5,
    }[kind]
    name = hashlib.sha256(content).hexdigest()
    announcement.metadata.message_id = name
    made.superlink.announced[ticket] = announcement, ObjectTree(object_id=name)
    made.superlink.parts[name] = content


@pytest.mark.parametrize("kind", ["without its parts", "no message", "a body of no form"])
def test_an_answer_of_no_form_keeps_nobody_waiting(made: SimpleNamespace, kind: str) -> None:
    """It is that site's error, and those that are asked for in the same call are read."""
    first, second, third = send(made, 1000)
    garbled(made, first, kind)
    made.superlink.reply(second, b"b")
    made.superlink.reply(third, b"c")
    found = collect(made, 3)
    assert {ticket: d.content for ticket, d in found.items()} == {first: None, second: b"b", third: b"c"}
    assert "its answer" in str(found[first].error)


def test_an_announcement_of_many_parts_costs_little(made: SimpleNamespace) -> None:
    """Of parts that never come a few are asked for at a time."""
    first = send(made, 1000)[0]
    made.superlink.reply(first, b"a", without=1)
    tree = made.superlink.announced[first][1]
    never = [hashlib.sha256(b"%d" % k).hexdigest() for k in range(20_000)]
    tree.children.extend(ObjectTree(object_id=name) for name in never)
    made.superlink.parts |= dict.fromkeys(never)
    asked, pull = Counter[str](), made.superlink.PullObject

    def counted(request: Any) -> PullObjectResponse:
        asked["calls"] += 1
        return pull(request)

    made.superlink.PullObject = counted
    assert made.transport.poll() == []
    assert 0 < asked["calls"] <= 100
