"""Evaluations by content: what a site holds is not sent to it, and what was sent to be judged is held for training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remote import IDS, Federation
from test_client_evaluation import evaluations, judged

from fedspan.config import Config
from fedspan.federation.held_out import Collected
from fedspan.runs.events import Event
from fedspan.server.coordinator import Coordinator
from fedspan.wire import protocol
from fedspan.wire.contents import LEAST_BYTES
from fedspan.wire.envelope import opened


class Judged:
    """A federation that makes every evaluation twice, and all that its server sends and is answered."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        between: Callable[[Federation], None] = lambda fed: None,
    ) -> None:
        self.fed = Federation(config, folder)
        self.sent: list[tuple[str, dict[str, Any], bytes]] = []
        """(part of the run, head, message)."""
        self.found: list[tuple[Collected, Collected]] = []
        self.part = "run"
        once = Coordinator.evaluate

        def twice(server: Coordinator, question: Any, clients: Any, sent: Any, terms: Any, whole: bool) -> Collected:
            self.part = "first"
            first = once(server, question, clients, sent, terms, False)
            between(self.fed)
            self.part = "second"
            second = once(server, question, clients, sent, terms, whole)
            self.part = "run"
            self.found.append((first, second))
            return second

        monkeypatch.setattr(Coordinator, "evaluate", twice)
        self.fed.transport.mishap = self.look
        self.notes: list[str] = []
        self.history = self.fed.serve(self.listen)
        assert not self.notes

    def listen(self, event: Event) -> None:
        if event.kind == "note":
            self.notes.append(event.data["line"])

    def look(self, node: str, head: dict[str, Any], content: bytes) -> None:
        if head["kind"] in ("ask", "evaluate"):
            self.sent.append((self.part, head, content))

    def messages(self, part: str, round_num: int = 1) -> list[bytes]:
        """Return the messages of the first exchange of that round."""
        key = part, round_num, 0
        return [content for of, head, content in self.sent if (of, head["round"], head["place"][0]) == key]


def settings(base: Path, texts: Path, name: str, /, **sections: Any) -> Config:
    federation = {"participation": 1.0, "ranks": 4, **sections.pop("federation", {})}
    return judged(base, texts, name, evaluation={"base": False}, federation=federation, **sections)


def tensor_bytes(content: bytes) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in protocol.decode(content)[1])


def largest_tensor(content: bytes) -> int:
    return max(tensor.numel() * tensor.element_size() for tensor in protocol.decode(content)[1])


@pytest.mark.parametrize("name", ["fedavg", "flora", "fedsa_lora", "shared_galore"])
def test_what_a_site_holds_is_sent_neither_to_be_judged_nor_to_be_trained(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After a first evaluation the second, and the training that begins from the same weights, name digests alone."""
    made = Judged(settings(bases["bert"], texts, name), tmp_path, monkeypatch)
    first, second, trained = (made.messages(part) for part in ("first", "second", "run"))
    assert (len(first), len(second), len(trained)) == (4, 4, 4)
    assert all(largest_tensor(content) < LEAST_BYTES for content in second + trained)
    assert max(map(tensor_bytes, second)) < min(map(tensor_bytes, first)) / 5
    for before, after in made.found:
        assert evaluations_of(before) == evaluations_of(after)
    costs = [record["client_evaluation_costs"] for record in made.history]
    down = sum(len(opened(content)[1]) for content in first + second)
    assert costs[0]["wire_down"] == down > costs[0]["payload_down"] == sum(map(tensor_bytes, first + second))
    assert all(x["payload_down"] <= r["payload_down"] for x, r in zip(costs, made.history, strict=True))


def evaluations_of(collected: Collected) -> dict[str, list[float]]:
    return {name: vector.tolist() for name, vector in collected.by_client.items()}


def test_a_message_about_what_a_site_holds_does_not_grow_with_the_model(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for rank in (2, 16):
        config = settings(bases["bert"], texts, "flexlora", federation={"ranks": rank, "rounds": 1})
        with monkeypatch.context() as patch:
            made = Judged(config, tmp_path / str(rank), patch)
        sizes.append([max(map(len, made.messages(part))) for part in ("first", "second")])
    (small, few), (large, still_few) = sizes
    assert large > 4 * small
    assert abs(still_few - few) < 200  # digits of shapes and strides


def lose(fed: Federation) -> None:
    """One site's files are gone, and those of another are damaged."""
    shutil.rmtree(fed.sites[IDS[0]].folder / "contents")
    for path in (fed.sites[IDS[1]].folder / "contents").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("secure", [False, True])
def test_a_site_that_has_lost_what_it_held_is_asked_again(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    """Nothing is judged, counted or masked before: under secure sums one vector of each site is in the sum."""
    if secure:
        pytest.importorskip("cryptography")
    config = settings(bases["bert"], texts, "ffa_lora", privacy={"secure_sums": secure}, federation={"rounds": 1})
    made = Judged(config, tmp_path, monkeypatch, lose)
    assert (len(made.messages("first")), len(made.messages("second"))) == (4, 6)
    ((first, second),) = made.found
    assert not second.problems
    assert second.num_clients == 4
    if secure:
        assert first.total is not None
        assert second.total is not None
        assert first.total.tolist() == second.total.tolist()
    else:
        assert evaluations_of(first) == evaluations_of(second)


def test_sites_and_a_server_without_stores_come_to_the_same_figures(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = []
    for room in (1024, 0):
        with monkeypatch.context() as patch:
            made = Judged(settings(bases["bert"], texts, "fed_sb", wire={"keep_mb": room}), tmp_path / str(room), patch)
        histories.append(made.history)
    assert evaluations(histories[0]) == evaluations(histories[1])
    sent = [history[0]["client_evaluation_costs"]["payload_down"] for history in histories]
    assert sent[0] < sent[1]
    assert not list((tmp_path / "0" / "sites").rglob("contents/*"))


def test_too_little_room_costs_traffic_and_no_round_trip(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites say what they had to let go of, so that the server does not count on it."""
    config = settings(bases["bert"], texts, "fedavg", federation={"rounds": 3})
    lacking: list[Any] = []
    with monkeypatch.context() as patch:
        ample = Judged(config, tmp_path / "ample", patch)
    room = max(tensor_bytes(content) for content in ample.messages("first")) // 2

    def narrow(fed: Federation) -> None:
        for site in fed.sites.values():
            site._contents._limit = room

    def heads(fed: Federation) -> None:
        narrow(fed)
        for node, answer in list(fed.transport.handlers.items()):

            def watched(content: bytes, answer: Callable[[bytes], bytes] = answer) -> bytes:
                reply = answer(content)
                lacking.extend(protocol.decode(reply)[0].get("lacks", ()))
                return reply

            fed.transport.handlers[node] = watched

    done: list[bool] = []

    def between(fed: Federation) -> None:
        if not done:
            done.append(True)
            heads(fed)

    tight = Judged(config, tmp_path / "tight", monkeypatch, between)
    assert evaluations(tight.history) == evaluations(ample.history)
    assert not lacking
    assert [r["round_trips"] for r in tight.history] == [r["round_trips"] for r in ample.history]
    assert json.dumps(tight.history[2]["eval"]) == json.dumps(ample.history[2]["eval"])
