"""The introductions of sites that say odd things, and a list of sites that is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from memory_transport import MemoryTransport

from fedspan import methods
from fedspan.config import Config
from fedspan.server.registry import SiteRegistry
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol

TERMS = {"seed": 0}
SOUND: dict[str, Any] = {
    "client_id": "clinic",
    "rank": 2,
    "num_examples": 9,
    "terms": TERMS,
    "shapes": {"x": [3, 4]},
    "base": "b",
    "labels": "c",
    "holds": [],
}


def introduced(**fields: Any) -> bytes:
    return protocol.encode({**SOUND, **fields}, protocol.MessageTensors())


def refused(**fields: Any) -> bytes:
    head = {"client_id": "clinic", "code": "failed", "incident": "0a1b2c", **fields}
    return protocol.encode(head, protocol.MessageTensors())


def registry(folder: Path, answers: dict[str, bytes], lines: list[str], name: str = "fedit") -> SiteRegistry:
    config = Config.model_validate({"federation": {"ranks": 2}} if name == "fedit" else {})
    transport = MemoryTransport({node: lambda content, answer=answer: answer for node, answer in answers.items()})
    method = methods.create(name)
    path = folder / "sites.json"
    return SiteRegistry(transport, config.federation, config.deployment, TERMS, method, path, lines.append)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"hello", "no fedspan message"),
        (refused(), "node n: an error of its own (incident 0a1b2c in the site's log)"),
        (refused(code="still\nreading"), "a message with code = 'still\\nreading'"),
        (refused(incident="\x1b[2J"), "a message with incident = '\\x1b[2J'"),
        (introduced(client_id=3), "client_id = 3: should be a valid string"),
        (introduced(client_id="../x"), "client_id = '../x'"),
        (introduced(client_id="\u0441linic"), "client_id = '\u0441linic'"),
        (introduced(client_id=".clinic"), "client_id = '.clinic'"),
        (introduced(client_id="c" * 65), "client_id = 'ccc"),
        (introduced(client_id="a\x1b[31m\u202eb"), r"client_id = 'a\x1b[31m\u202eb'"),
        (introduced(client_id="\ud800"), r"client_id = '\ud800'"),
        (introduced(rank=True), "rank = True: should be a valid integer"),
        (introduced(rank=0), "rank = 0: should be greater"),
        (introduced(rank=2**31), "rank = 2147483648: should be less"),
        (introduced(rank=17), "clinic says that its rank is 17: expected at most 3"),
        (introduced(rank=4.0), "rank = 4.0"),
        (introduced(num_examples=0), "num_examples = 0"),
        (introduced(num_examples=10**15), "num_examples = 1000000000000000"),
        (introduced(terms={"seed": 1}), "clinic: seed is 1 on the site and 0 on the server"),
        (introduced(terms={"seed": "\x1b" * 10**5}), "clinic: seed is "),
        (introduced(terms=[1]), "terms = a list of 1"),
        (introduced(shapes={"x": 3}), "shapes.x = 3"),
        (introduced(shapes={"x": [3, -4]}), "shapes.x.1 = -4"),
        (introduced(base="\x1b[2J"), r"base = '\x1b[2J'"),
        (introduced(extra=1), "extra = 1"),
        (protocol.encode({"client_id": "clinic"}, protocol.MessageTensors()), "lacks rank"),
    ],
)
def test_an_odd_introduction_is_reported_once_and_asked_for_again(tmp_path: Path, answer: bytes, expected: str) -> None:
    lines: list[str] = []
    sites = registry(tmp_path, {"n": answer}, lines, "flexlora")
    for _ in range(3):
        sites.greet()
        sites.transport.sleep(5)
    assert sites.members == {}
    assert len(sites.transport.sent) == 3
    (line,) = lines
    assert expected in line
    assert line.isprintable()
    assert len(line) < 600


def test_a_failing_site_is_named_and_reported_once_whatever_its_incidents_are(tmp_path: Path) -> None:
    lines: list[str] = []
    sites = registry(tmp_path, {"n": refused()}, lines)
    sites.transport.bound = {"n": "clinic"}
    for number in range(3):
        sites.transport.handlers["n"] = lambda content, number=number: refused(incident=f"{number:06x}")
        sites.greet()
        sites.transport.sleep(5)
    assert len(sites.transport.sent) == 3
    assert lines == ["a node is not taken in: node n (clinic): an error of its own (incident 000000 in the site's log)"]
    sites.transport.handlers["n"] = lambda content: refused(code="no-memory")
    sites.greet()
    assert len(lines) == 2


def test_sites_are_members_once_and_keep_their_rank_and_data(tmp_path: Path) -> None:
    lines: list[str] = []
    sites = registry(tmp_path, {"n1": introduced(), "n2": introduced()}, lines)
    sites.greet()
    assert [member.node for member in sites.members.values()] == ["n1"]
    nodes = sites.transport.handlers
    del nodes["n1"], nodes["n2"]
    nodes["n3"] = lambda content: introduced(num_examples=10)
    sites.greet()
    nodes["n4"] = lambda content: introduced()
    sites.transport.sleep(5)
    sites.greet()
    assert [member.node for member in sites.members.values()] == ["n4"]
    assert [line.split(": ", 1)[-1] for line in lines] == [
        "clinic is here, rank 2",
        "node n2: clinic is here already, as another node",
        "node n3: clinic came back with another rank or other data",
        "clinic is here, rank 2",
    ]


def test_the_first_site_to_come_does_not_choose_the_rank_of_all(tmp_path: Path) -> None:
    """It would keep out every honest site, at each start."""
    lines: list[str] = []
    liar, honest = introduced(client_id="a", rank=1), introduced(client_id="b")
    sites = registry(tmp_path, {"n1": liar, "n2": honest}, lines)
    sites.greet()
    assert list(sites.members) == ["b"]
    assert "a has rank 1: fedit needs one rank for all, expected 2 (federation.ranks)" in lines[0]


def test_a_run_that_goes_on_takes_in_its_own_sites_as_they_were(tmp_path: Path) -> None:
    """Else a site could change its weight, or a stranger be counted among those that are waited for."""
    listed = [
        {"client_id": "clinic", "rank": 2, "num_examples": 9},
        {"client_id": "mayo", "rank": 2, "num_examples": 5},
    ]
    (tmp_path / "sites.json").write_text(json.dumps({"run": "r", "clients": listed}))
    lines: list[str] = []
    answers = {
        "n1": introduced(rank=1),
        "n2": introduced(client_id="mayo", num_examples=10**12),
        "n3": introduced(client_id="other"),
    }
    with pytest.raises(FedspanError, match="0 of 2 sites came"):
        registry(tmp_path, answers, lines).gather()
    assert [line.split(": ", 1)[-1] for line in lines[1:]] == [
        "node n1: clinic came back with another rank or other data",
        "node n2: mayo came back with another rank or other data",
        "node n3: other is not among the sites that this run was started with",
    ]


def test_a_damaged_list_of_sites_ends_the_run_in_one_line(tmp_path: Path) -> None:
    for content in (b"{", b'{"run": "r"}', json.dumps({"run": "r", "clients": [3]}).encode()):
        (tmp_path / "sites.json").write_bytes(content)
        with pytest.raises(FedspanError, match=r"sites.json is damaged"):
            registry(tmp_path, {}, []).gather()


def test_a_site_cannot_speak_for_another(tmp_path: Path) -> None:
    """Whichever of the two introduces itself first, the real one is a member and the other is refused by name."""
    for impostor_first in (True, False):
        lines: list[str] = []
        folder = tmp_path / str(impostor_first)
        nodes = {"a": introduced(), "b": introduced()} if impostor_first else {"b": introduced()}
        sites = registry(folder, {}, lines)
        sites.transport.bound = {"a": "bank", "b": "clinic"}
        sites.transport.handlers.update({node: lambda content, answer=answer: answer for node, answer in nodes.items()})
        sites.greet()
        sites.transport.handlers["a"] = lambda content: introduced()
        sites.transport.sleep(5)
        sites.greet()
        assert [member.node for member in sites.members.values()] == ["b"]
        assert "a node is not taken in: node a (bank): says that it is 'clinic': its key is that of bank" in "".join(
            lines
        )
