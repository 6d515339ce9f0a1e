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
    "rank": 4,
    "num_examples": 9,
    "terms": TERMS,
    "shapes": {"x": [3, 4]},
    "base": "b",
}


def introduced(**fields: Any) -> bytes:
    return protocol.encode({**SOUND, **fields}, protocol.MessageTensors())


def registry(folder: Path, answers: dict[str, bytes], lines: list[str], name: str = "fedit") -> SiteRegistry:
    config = Config()
    transport = MemoryTransport({node: lambda content, answer=answer: answer for node, answer in answers.items()})
    method = methods.create(name)
    path = folder / "sites.json"
    return SiteRegistry(transport, config.federation, config.deployment, TERMS, method, path, lines.append)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"hello", "no fedspan message"),
        (introduced(problem="still\nreading"), "node n: still reading"),
        (introduced(client_id=3), "client_id 3 and rank 4: expected a name"),
        (introduced(rank=True), "rank True: expected a name and a count"),
        (introduced(rank=0), "rank 0: expected a name and a count"),
        (introduced(num_examples=0), "clinic says that it has 0 examples"),
        (introduced(terms={"seed": 1}), "clinic: seed is 1 on the site and 0 on the server"),
        (introduced(terms=[1]), "does not list its settings"),
        (introduced(shapes={"x": 3}), "does not list its settings and shapes"),
        (protocol.encode({"client_id": "clinic"}, protocol.MessageTensors()), "introduction lacks base"),
    ],
)
def test_an_odd_introduction_is_reported_once_and_asked_for_again(tmp_path: Path, answer: bytes, expected: str) -> None:
    lines: list[str] = []
    sites = registry(tmp_path, {"n": answer}, lines)
    for _ in range(3):
        sites.greet()
        sites.transport.sleep(5)
    assert sites.members == {}
    assert len(sites.transport.sent) == 3
    (line,) = lines
    assert expected in line
    assert "\n" not in line


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
        "clinic is here, rank 4",
        "node n2: clinic is here already, as another node",
        "node n3: clinic came back with another rank or other data",
        "clinic is here, rank 4",
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
        assert "a node is not taken in: node a: says that it is 'clinic': its key is that of bank" in "".join(lines)
