"""Regions that die, answer twice, lie, or lose sites; and what a region's server refuses of the server above."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from memory_transport import MemoryTransport
from run_folders import state_of
from trees import OPEN, REGIONS, SECURE, Tree, flat, settings

from fedspan.federation import requirements
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.sum_layout import SumLayout
from fedspan.regions.regional_server import RegionalServer
from fedspan.server.greeting import Arrivals
from fedspan.server.regional_sums import RegionalSums, RegionalTotal
from fedspan.server.requests import Reply
from fedspan.support.errors import FedspanError
from fedspan.wire import framing, protocol
from fedspan.wire.transport import Delivery

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def north_missing(
    bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The state of one server whose clients of the north are silent in the second round."""
    folder = tmp_path_factory.mktemp("flat")
    config = settings(bases["bert"], texts, "fedit")
    flat(config, folder, lambda client, round_num: round_num == 1 and client in REGIONS["north"])
    return state_of(folder / "run")


def test_a_region_that_dies_is_left_out_and_the_run_goes_on(
    bases: dict[str, Path], texts: Path, tmp_path: Path, north_missing: dict[str, torch.Tensor]
) -> None:
    tree = Tree(settings(bases["bert"], texts, "fedit", privacy=SECURE), tmp_path)
    tree.transport.mishap = lambda node, head, content: (
        "the node is not connected" if node == "node-north" and head.get("round") == 1 else None
    )
    history = tree.serve()
    assert [record["num_clients"] for record in history] == [4, 2]
    reason = "its region north: the node is not connected"
    assert history[1]["rejected"] == {"client-0": reason, "client-2": reason}
    assert "the region north is left out: the node is not connected" in tree.lines
    tiny.same(tree.state(), north_missing)


def test_answers_that_come_twice_or_late_and_sites_in_two_regions(
    bases: dict[str, Path], texts: Path, tmp_path: Path, north_missing: dict[str, torch.Tensor]
) -> None:
    """The north gives its first answer again in the second round, and claims a site of the south; every delivery comes
    twice; a site of a region knocks at the server above."""
    tree = Tree(settings(bases["bert"], texts, "fedit", privacy=OPEN), tmp_path)
    poll, north, south = tree.transport.poll, tree.regions["north"].answer, tree.regions["south"].answer
    asked: list[bytes] = []
    given: list[bytes] = []

    def twice() -> list[Delivery]:
        return [delivery for delivery in poll() for _ in range(2)]

    def replaying(content: bytes) -> bytes:
        head = protocol.decode(content)[0]
        if head["kind"] == "hello":
            south(content)  # so that its site is known to both
            own = protocol.decode(north(content))[0]
            strange = {**own["members"][0], "client_id": "client-1"}
            return framing.amended(north(content), {"members": [*own["members"], strange]})
        asked.append(content)
        given.append(given[0] if given else north(content))
        return given[-1]

    transport: Any = tree.transport
    transport.poll = twice
    tree.transport.handlers |= {"node-north": replaying, "node-direct": tree.sites["client-3"].answer}
    history = tree.serve()
    assert [record["num_clients"] for record in history] == [4, 2]
    assert history[1]["rejected"]["client-0"] == "its region north: answered for round 1: expected 2"
    strange = "north says that client-1 is one of its sites: it is a site of south (deployment.regions)"
    assert f"a node is not taken in: node node-north: {strange}" in tree.lines
    direct = "client-3 is a site of a region: expected it through the server of its region"
    assert f"a node is not taken in: node node-direct: {direct}" in tree.lines
    tiny.same(tree.state(), north_missing)
    _refuses_what_is_not_its_own(tree, asked[0])


def _refuses_what_is_not_its_own(tree: Tree, relay: bytes) -> None:
    """A server above cannot have a region pass on other messages, or ask other regions' sites."""
    (inner,) = {protocol.get_bytes(protocol.decode(relay)[1], k) for k in protocol.decode(relay)[0]["messages"]}

    def answered(content: bytes) -> str:
        before = len(tree.said)
        head = protocol.decode(tree.regions["north"].answer(content))[0]
        assert "code" in head
        return " ".join(tree.said[before:])

    assert "a message of kind 'ask' for a region: expected one of hello, relay" in answered(inner)
    stranger = framing.amended(relay, {"clients": {"client-1": [0, 0]}})
    assert "a question to client-1, which north has not" in answered(stranger)
    later = framing.amended(relay, {"round": 1})
    assert "a message to pass on with round 0: expected 1" in answered(later)
    other = framing.amended(relay, {"terms": "ab"})
    assert "a question for other settings than this region's" in answered(other)


def test_a_site_that_comes_back_as_another_node_is_asked_again(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    tree = Tree(settings(bases["bert"], texts, "fedit", privacy=OPEN, federation={"rounds": 3}), tmp_path)
    nodes = tree.below["north"].handlers

    def renamed(node: str, head: dict[str, Any], content: bytes) -> None:
        if head.get("round") == 1 and "client-0" in nodes:
            nodes["back"] = nodes.pop("client-0")

    tree.transport.mishap = renamed
    assert [record["num_clients"] for record in tree.serve()] == [4, 4, 4]


def test_a_server_cannot_choose_the_room_of_a_masked_vector(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """By refusals it would find the largest number of one site's vector, question by question."""
    states = []
    for room in (None, 2**31 - 1):
        tree = Tree(
            settings(bases["bert"], texts, "fedit", privacy=SECURE, federation={"rounds": 1}), tmp_path / str(room)
        )
        for transport in tree.below.values():
            for node, answer in list(transport.handlers.items()):

                def lied_to(content: bytes, answer: Any = answer, room: int | None = room) -> Any:
                    head = protocol.decode(content)[0]
                    if room is not None and head["kind"] == "ask":
                        content = framing.amended(content, {"sum": {**head["sum"], "num_clients": room}})
                    return answer(content)

                transport.handlers[node] = lied_to
        (record,) = tree.serve()
        assert record["num_clients"] == 4, record["rejected"]
        states.append(tree.state())
    tiny.same(*states)


def test_sites_that_leave_a_masked_sum_of_their_region(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Of three one may leave; of two none may, and the region is left out with the reason."""
    regions = {"north": ["client-0", "client-1", "client-2"], "south": ["client-3", "client-4"]}
    one = {"num_clients": 5, "rounds": 1}
    config = settings(bases["bert"], texts, "fedit", regions=regions, privacy=SECURE, federation=one)
    tree = Tree(config, tmp_path)
    lost = {"client-2", "client-4"}
    for transport in tree.below.values():
        transport.mishap = lambda node, head, content: "gone" if head["kind"] == "ask" and node in lost else None
    (record,) = tree.serve()
    assert record["num_clients"] == 2
    assert record["rejected"]["client-2"] == "gone"
    assert record["rejected"]["client-3"].endswith("1 clients sent their vectors, 2 were needed: the sum is given up")
    assert any(line.startswith("round 1: no sum of the region south: 1 clients") for line in tree.said)
    flat(config, tmp_path / "flat", lambda client, round_num: client not in ("client-0", "client-1"))
    tiny.same(tree.state(), state_of(tmp_path / "flat" / "run"))


LAYOUT = SumLayout({"head": (2,)}, {})
POINT = FixedPoint(32)


class _NoRegistry:
    def record(self, client_id: str, round_num: int, missed: bool) -> None:
        pass


class _NoRequests:
    registry = _NoRegistry()


def _reply(answers: Any, problems: Any, numbers: Any) -> Reply:
    words = POINT.encode(torch.tensor(numbers, dtype=torch.float64), 1)
    header: Any = {"words": 0, "round": 0}
    if answers is not None:
        header["relayed"] = {"answers": answers, "problems": problems}
    return Reply(header, [torch.from_numpy(words.view(np.int64))], b"")


OWN = {"client-0": (1.0, 0), "client-2": (2.0, 0)}
SOUND = [7.0, 7.0, 3.0, 0.5, -0.5]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (_reply({**OWN, "client-1": (1.0, 0)}, {}, SOUND), "it names client-1"),
        (_reply({"client-0": (1.0, 0)}, {}, SOUND), "it names client-2"),
        (_reply(OWN, {"client-2": ("gone", True)}, SOUND), "it names client-2"),
        (_reply(OWN, {}, SOUND[:4]), "a vector of torch.int64 in shape (4,): expected 5 words"),
        (_reply(OWN, {}, [8.0, *SOUND[1:]]), "counts as 8 examples and 7 losses: expected 7 examples"),
        (_reply(OWN, {}, [*SOUND[:3], 2.0**30 + 1, 0.0]), "the sum could wrap"),
        (_reply(None, {}, SOUND), "it does not say who is in it"),
    ],
)
def test_a_region_whose_answer_is_wrong_adds_nothing(reply: Reply, reason: str) -> None:
    config: Any = settings(Path("base"), Path("texts"), "fedit", privacy=OPEN)
    requests: Any = _NoRequests()
    sums: Any = RegionalSums(requests, config)
    found = RegionalTotal(np.zeros(LAYOUT.num_words, dtype=np.uint64))
    known = {"client-0": 3.0, "client-2": 4.0}
    assert sums._add(found, list(OWN), _reply(OWN, {}, SOUND), known, 4) is None
    before = found.total.copy()
    problem = sums._add(found, list(OWN), reply, known, 4)
    assert problem is not None
    assert reason in problem.reason
    np.testing.assert_array_equal(found.total, before)


@pytest.mark.parametrize(
    ("name", "regions", "changes", "reason"),
    [
        ("glora", REGIONS, {}, "the server of glora needs every client's own update; methods that need sums alone: "),
        ("fedit", REGIONS, {}, "expected privacy.secure_sums = true, or privacy.fixed_point = true"),
        ("fedit", {"north": ["client-0"]}, {"privacy": OPEN}, "has 1 clients: expected federation.num_clients = 4"),
        (
            "fedit",
            {"north": ["client-0"], "south": ["client-1", "client-2", "client-3"]},
            {"privacy": SECURE},
            "north has 1 of the clients; expected at least 2 in every region",
        ),
    ],
)
def test_what_cannot_be_summed_in_regions_is_refused_before_the_first_round(
    name: str, regions: Any, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(FedspanError) as refused:
        requirements.chosen(settings(Path("base"), Path("texts"), name, regions=regions, **changes))
    assert reason in str(refused.value)


def test_a_site_in_two_regions_is_refused() -> None:
    with pytest.raises(ValueError, match="client-0 is in north and in south: expected one region for each client"):
        settings(Path("base"), Path("texts"), "fedit", regions={"north": ["client-0"], "south": ["client-0"]})


FORM = {"terms": {}, "shapes": {"layer": [8, 8]}, "base": "ab", "labels": "cd"}
MEMBER = {"client_id": "client-0", "rank": 4, "num_examples": None, "form": 0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"members": [{**MEMBER, "form": 1}]}, "client-0 has form 1: expected one of 1"),
        ({"members": [{**MEMBER, "rank": 9}]}, "client-0 says that its rank is 9: expected at most 8"),
        ({"members": [{**MEMBER, "client_id": "../x"}]}, "a message with members.0.client_id"),
        ({"forms": [{**FORM, "more": 1}]}, "a message with forms.0.more"),
        ({"members": [MEMBER], "holds": []}, "a message with holds"),
    ],
)
def test_introductions_of_regions_are_checked_as_those_of_sites(changes: dict[str, Any], reason: str) -> None:
    head = {"client_id": "north", "members": [MEMBER], "forms": [FORM]}

    def read(head: dict[str, Any]) -> Arrivals:
        return Arrivals.read(Delivery("t", "node", protocol.encode(head, protocol.MessageTensors())), 16)

    arrived = read(head)
    assert arrived.region == "north"
    assert [(each.client_id, each.rank, each.num_examples) for each in arrived.greetings] == [("client-0", 4, 1)]
    with pytest.raises(FedspanError) as refused:
        read({**head, **changes})
    assert reason in str(refused.value)


def test_a_regional_server_needs_its_region_and_the_keys_of_its_sites(tmp_path: Path) -> None:
    config = settings(Path("base"), Path("texts"), "fedit", privacy=OPEN)
    nobody = MemoryTransport({})
    with pytest.raises(FedspanError, match="the region 'west': expected one of north, south"):
        RegionalServer("west", config, nobody, tmp_path, print)
    signed = {**SECURE, "server": "malicious", "threshold": 0.7}
    config = settings(Path("base"), Path("texts"), "fedit", privacy=signed)
    with pytest.raises(FedspanError, match="the region's server has no public keys of its sites"):
        RegionalServer("north", config, nobody, tmp_path, print)
