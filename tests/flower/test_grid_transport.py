"""Bytes through Flower's grid: what arrives is what was sent, and what does not arrive is said."""

import os
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from grids import Field, field

from fedspan.flower import node_clients, records
from fedspan.flower.backoff import Backoff
from fedspan.flower.client_app import SHARE, client_app
from fedspan.flower.grid_transport import GridTransport
from fedspan.wire.refusals import TEXTS, Code
from fedspan.wire.transport import AT_ONCE, Delivery
from fedspan.wire.unix_socket import CallFailed, CallTimedOut

HERE = Path("site")


def echo(folder: Path, content: bytes, timeout: float) -> bytes:
    return folder.name.encode() + content


def collect(transport: GridTransport, tickets: list[str], seconds: float = 10.0) -> dict[str, Delivery]:
    """Return the deliveries by ticket, each of which must arrive once."""
    found: dict[str, Delivery] = {}
    end = time.monotonic() + seconds
    while not found.keys() >= set(tickets) and time.monotonic() < end:
        for delivery in transport.poll():
            assert delivery.ticket not in found, "one delivery came twice"
            found[delivery.ticket] = delivery
        transport.sleep(0.01)
    return found


@pytest.mark.parametrize("size", [1, 1000, records.SMALL, records.SMALL + 1, 12_000_000])
def test_what_is_answered_is_what_was_sent(size: int) -> None:
    content = os.urandom(size)
    with field(client_app(echo, HERE), client_app(echo, Path("b"))) as made:
        transport = GridTransport(made.grid, "test")
        assert transport.nodes() == sorted(map(str, made.nodes), key=int)
        first, second = map(str, made.nodes)
        tickets = transport.send([(first, content), (second, b"x" + content)], 60.0)
        found = collect(transport, tickets)
        assert [found[t].content for t in tickets] == [b"site" + content, b"bx" + content]
        assert [found[t].node for t in tickets] == [first, second]
        assert all(found[t].error is None for t in tickets)
        assert transport.poll() == []


class Counted:
    """A grid that counts the answers that it is asked for in each call."""

    def __init__(self, grid: Any) -> None:
        self.grid, self.asked = grid, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)

    def pull_messages(self, tickets: list[str]) -> Any:
        self.asked.append(len(tickets))
        return self.grid.pull_messages(tickets)


@pytest.mark.parametrize(("answer_bytes", "together"), [(AT_ONCE, 1), (AT_ONCE // 2, 2), (1000, 3)])
def test_large_answers_are_fetched_one_at_a_time(answer_bytes: int, together: int) -> None:
    """Flower hands over all answers of a call at once, so that they would be in memory together."""
    with field(*(client_app(echo, Path(name)) for name in "abc")) as made:
        grid: Any = Counted(made.grid)
        transport = GridTransport(grid, "test")
        tickets = transport.send([(str(node), b"?") for node in made.nodes], 60.0, answer_bytes)
        time.sleep(0.3)  # all are there when the first is asked for
        found: list[Delivery] = []
        while len(found) < 3:
            arrived = transport.poll()
            assert len(arrived) <= together
            found += arrived
        assert sorted(d.content or b"" for d in found) == [b"a?", b"b?", b"c?"]
        assert {d.ticket for d in found} == set(tickets)
        assert max(grid.asked) == together
        assert transport.poll() == []


def test_what_is_large_travels_in_pieces_and_what_is_small_in_one() -> None:
    """Flower sends a configuration whole, however large, and an array in pieces of 5 MiB."""
    assert not records.pack(b"x" * records.SMALL).array_records
    large = records.pack(b"x" * (records.SMALL + 1))
    assert sum(len(value) for value in large.config_records["fedspan"].values() if isinstance(value, bytes)) == 0
    (array,) = large.array_records["fedspan-content"].values()
    assert array.stype == records.SERIALISATION


CANARY = "Mrs-Canary-C50.9"
FAILURES: dict[str, tuple[Exception, Code]] = {
    "no worker": (CallFailed(f"the worker has\nno memory left: {CANARY}"), Code.WORKER_GONE),
    "a late worker": (CallTimedOut(f"the worker of {CANARY} did not answer"), Code.WORKER_LATE),
    "a disk": (OSError(28, "No space left on device", f"/patients/{CANARY}"), Code.FAILED),
    "a defect": (RuntimeError(CANARY), Code.FAILED),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_is_answered_at_once_with_a_code_and_no_text(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """The text, which may quote the site's data, is in the site's log under the incident's number."""
    error, code = FAILURES[what]

    def failing(folder: Path, content: bytes, timeout: float) -> bytes:
        raise error

    with field(client_app(failing, HERE)) as made:
        transport = GridTransport(made.grid, "test")
        (ticket,) = transport.send([(str(made.nodes[0]), b"?")], 60.0)
        said = str(collect(transport, [ticket])[ticket].error)
    found = re.fullmatch(r"(.+) \(incident ([0-9a-f]{6}) in the site's log\)", said)
    assert found is not None
    assert found[1] == TEXTS[code]
    (line,) = [r.message for r in caplog.records if f"incident {found[2]}" in r.message]
    assert CANARY in line
    assert "\n" not in line


def test_words_of_a_nodes_own_are_shown_in_one_printable_line() -> None:
    """Not ours: whoever holds a node key may answer with any error."""
    app = ClientApp()

    @app.query("fedspan")
    def answer(message: Message, context: Any) -> Message:
        reason = "\x1b[2Jround 3: done\nround 4: done \u202e" + "x" * 10**5
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    with field(app) as made:
        transport = GridTransport(made.grid, "test")
        (ticket,) = transport.send([(str(made.nodes[0]), b"?")], 60.0)
        said = str(collect(transport, [ticket])[ticket].error)
    assert said.startswith(r"\x1b[2Jround 3: done round 4: done \u202exxx")
    assert said.isprintable()
    assert len(said) < 400


class Unreadable:
    """A grid of whose replies one cannot be put together."""

    def __init__(self, grid: Any) -> None:
        self.grid, self.odd = grid, 1

    def __getattr__(self, name: str) -> Any:
        if name == "pull_messages" and self.odd:
            self.odd -= 1
            raise KeyError("an object of the message")
        return getattr(self.grid, name)


def test_a_reply_that_flower_cannot_read_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with field(client_app(echo, HERE)) as made:
        transport = GridTransport(Unreadable(made.grid), "test")
        (ticket,) = transport.send([(str(made.nodes[0]), b"?")], 60.0)
        assert collect(transport, [ticket])[ticket].content == b"site?"
    assert any("a reply cannot be read" in record.message for record in caplog.records)


def test_a_silent_node_is_reported_when_the_lifetime_is_over() -> None:
    with field(client_app(echo, HERE)) as made:
        made.silent.add(made.nodes[0])
        transport = GridTransport(made.grid, "test")
        began = time.monotonic()
        (ticket,) = transport.send([(str(made.nodes[0]), b"?")], 0.5)
        delivery = collect(transport, [ticket])[ticket]
        assert delivery.content is None
        assert delivery.error == "no answer came within the message's lifetime"
        assert 0.4 < time.monotonic() - began < 5


def test_a_node_that_is_not_there_is_reported() -> None:
    with field(client_app(echo, HERE)) as made:
        transport = GridTransport(made.grid, "test")
        tickets = transport.send([("12345", b"?"), (str(made.nodes[0]), b"!")], 60.0)
        found = collect(transport, tickets)
        assert found[tickets[0]].error == "Flower did not accept a message for the node 12345"
        assert found[tickets[1]].content == b"site!"


def test_a_forgotten_message_is_never_delivered() -> None:
    with field(client_app(echo, HERE)) as made:
        transport = GridTransport(made.grid, "test")
        forgotten, ticket = transport.send([(str(made.nodes[0]), b"1"), (str(made.nodes[0]), b"2")], 60.0)
        lost = transport.send([("12345", b"?")], 60.0)
        transport.forget([forgotten, *lost])
        assert list(collect(transport, [ticket])) == [ticket]
        time.sleep(0.1)
        assert transport.poll() == []


def test_the_worker_gets_its_share_of_the_lifetime_and_never_more_than_the_site_allows() -> None:
    seen: list[float] = []

    def asked(folder: Path, content: bytes, timeout: float) -> bytes:
        seen.append(timeout)
        return b""

    with field(client_app(asked, HERE), client_app(asked, HERE, deadline=5.0)) as made:
        transport = GridTransport(made.grid, "test")
        collect(transport, transport.send([(str(made.nodes[0]), b"?")], 60.0))
        collect(transport, transport.send([(str(made.nodes[1]), b"?")], 60.0))
    assert seen == [SHARE * 60.0, 5.0]


def test_the_site_is_the_nodes_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    with field(client_app(echo), client_app(echo), configs=[{"site": "folder/a"}, {}]) as made:
        transport = GridTransport(made.grid, "test")
        nodes = [str(node) for node in made.nodes]
        tickets = transport.send([(node, b"") for node in nodes], 60.0)
        found = collect(transport, tickets)
        assert found[tickets[0]].content == b"a"
        assert str(found[tickets[1]].error).startswith(TEXTS[Code.NOT_READY])
        monkeypatch.setenv("FEDSPAN_SITE", "folder/b")
        (ticket,) = transport.send([(nodes[1], b"")], 60.0)
        assert collect(transport, [ticket])[ticket].content == b"b"


def test_an_answer_of_another_kind_is_an_error() -> None:
    app = ClientApp()

    @app.query("fedspan")
    def answer(message: Message, context: Any) -> Message:
        return Message(RecordDict(), reply_to=message)

    with field(app) as made:
        transport = GridTransport(made.grid, "test")
        (ticket,) = transport.send([(str(made.nodes[0]), b"?")], 60.0)
        assert collect(transport, [ticket])[ticket].error == "a message holds the records []: expected 'fedspan'"


def test_a_message_that_is_not_ours_is_refused_not_raised() -> None:
    with field(client_app(echo, HERE)) as made:
        foreign = Message(RecordDict(), made.nodes[0], records.MESSAGE_TYPE, ttl=60.0)
        (ticket,) = made.grid.push_messages([foreign])
        while not (replies := list(made.grid.pull_messages([ticket]))):
            time.sleep(0.01)
        assert replies[0].has_error()


class Flaky:
    """A grid whose calls fail a few times first."""

    def __init__(self, grid: Any, failures: int) -> None:
        self.grid, self.failures = grid, failures

    def __getattr__(self, name: str) -> Any:
        if name in ("push_messages", "pull_messages", "get_node_ids") and self.failures:
            self.failures -= 1
            response = httpx.Response(503, request=httpx.Request("POST", "http://superlink"))
            raise httpx.HTTPStatusError("busy", request=response.request, response=response)
        return getattr(self.grid, name)


def test_trouble_that_passes_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedspan.flower.grid_transport._PAUSE", 0.01)
    with field(client_app(echo, HERE)) as made:
        grid: Any = Flaky(made.grid, 3)
        transport = GridTransport(grid, "test")
        assert transport.nodes() == [str(made.nodes[0])]
        grid.failures = 3
        (ticket,) = transport.send([(str(made.nodes[0]), b"?")], 60.0)
        grid.failures = 3
        assert collect(transport, [ticket])[ticket].content == b"site?"


def test_trouble_that_stays_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedspan.flower.grid_transport._PAUSE", 0.01)
    monkeypatch.setattr("fedspan.flower.grid_transport.PATIENCE", 0.1)
    with field(client_app(echo, HERE)) as made:
        grid: Any = Flaky(made.grid, 0)
        transport = GridTransport(grid, "test")
        transport.send([(str(made.nodes[0]), b"?")], 60.0)
        grid.failures = 10**6
        with pytest.raises(ConnectionError, match="SuperLink gives no answers"):
            collect(transport, ["?"])
        (ticket,) = transport.send([(str(made.nodes[0]), b"?")], 60.0)
        grid.failures = 0
        found = collect(transport, [ticket])
        assert "Flower did not accept a message" in str(found[ticket].error)


def test_a_lifetime_is_positive() -> None:
    made = Field([], [])
    with pytest.raises(ValueError, match="lifetime = 0"):
        GridTransport(made.grid, "test").send([], 0)


def test_the_backoff_is_a_quarter_of_the_wait_within_its_bounds() -> None:
    now = 0.0
    backoff = Backoff(2.0, 0.1, lambda: now)
    assert backoff.seconds() == 0.1
    now = 4.0
    assert backoff.seconds() == 1.0
    now = 100.0
    assert backoff.seconds() == 2.0
    backoff.restart()
    assert backoff.seconds() == 0.1
    with pytest.raises(ValueError, match="poll = 0"):
        Backoff(0.0)


def test_a_node_may_speak_for_the_client_of_its_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with field(client_app(echo, HERE), client_app(echo, HERE)) as made:
        assert GridTransport(made.grid, "test").client_of(str(made.nodes[0])) is None
        known = {info.node_id: info.public_key for info in made.grid.get_nodes()}
        monkeypatch.setattr(node_clients, "read_keys", lambda folder: {"north": known[made.nodes[0]]})
        (tmp_path / "clients.json").write_text('{"north": "client-0", "south": "client-1"}')
        transport = GridTransport(made.grid, "test", node_clients.NodeClients(tmp_path))
        assert transport.client_of(str(made.nodes[0])) == "client-0"
        with pytest.raises(ValueError, match="its key is not in"):
            transport.client_of(str(made.nodes[1]))
        with pytest.raises(ValueError, match="not connected any more"):
            transport.client_of("12345")
