"""Broadcasts by content: what a site holds is not sent again, and the figures are those of the formula."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites, remote_config
from run_folders import Stop
from signed import changed

from fedspan.config import Config
from fedspan.runs import checkpoint, execution
from fedspan.runs.events import Event
from fedspan.server import requests
from fedspan.site.site import Site
from fedspan.wire import protocol
from fedspan.wire.contents import LEAST_BYTES

IDS = [f"client-{k}" for k in range(3)]


class Held:
    """Three sites in memory, their server, and what it sends them."""

    def __init__(self, bases: dict[str, Path], texts: Path, folder: Path, method: str, **sections: Any) -> None:
        self.config: Config = remote_config(
            bases["bert"],
            texts,
            method,
            federation={"num_clients": 3, "rounds": 3, "participation": 1.0, **sections.pop("federation", {})},
            **sections,
        )
        self.folder = folder
        self.sites = make_sites(self.config, IDS, folder / "sites")
        self.transport = MemoryTransport({name: site.answer for name, site in self.sites.items()})
        self.heads: list[tuple[str, dict[str, Any]]] = []
        self.transport.mishap = self.look

    def look(self, node: str, head: dict[str, Any], content: bytes) -> bytes | str | None:
        if head["kind"] == "ask":
            self.heads.append((node, head))
        return None

    def serve(self, on_event: Callable[[Event], None] = lambda event: None) -> list[dict[str, Any]]:
        return execution.serve(self.config, self.folder / "run", on_event, self.transport).history

    def state(self) -> dict[str, torch.Tensor]:
        return tiny.state_tensors(checkpoint.read(self.folder / "run" / "checkpoint" / "federation.safetensors").state)

    def restart(self, client_id: str) -> None:
        old = self.sites[client_id]
        self.sites[client_id] = Site(old.settings, old.folder, old.loaded)
        self.transport.handlers[client_id] = self.sites[client_id].answer


def in_process(config: Config, folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    history = execution.run(config, folder).history
    return history, tiny.state_tensors(checkpoint.read(folder / "checkpoint" / "federation.safetensors").state)


SMALL = 3 * 3 * 2 * LEAST_BYTES
"""Tensors that are cheaper to send than to name: at most two of them, to three clients, in three exchanges."""


@pytest.mark.parametrize("method", ["fed_sb", "ravan", "shared_galore", "flora", "glora_sums", "scaffold", "rolora"])
def test_what_is_sent_is_what_the_formula_counts(
    bases: dict[str, Path], texts: Path, tmp_path: Path, method: str
) -> None:
    """From the second round on; in the first, sites derive the start. The bits are those of one process, whose count it
    is. RoLoRA's frozen factor is that of the round before, which the formula counts and nobody sends."""
    fed = Held(bases, texts, tmp_path, method)
    history = fed.serve()
    counted, state = in_process(fed.config, tmp_path / "one")
    tiny.same(fed.state(), state)
    assert [r["bytes_down"] for r in history] == [r["bytes_down"] for r in counted]
    sent, formula = [r["payload_down"] for r in history], [r["bytes_down"] for r in history]
    assert all(x <= y + SMALL for x, y in zip(sent, formula, strict=True))
    assert all(r["wire_down"] > r["payload_down"] for r in history)
    if method == "rolora":
        assert sent[2] < formula[2]
    else:
        assert all(y - SMALL <= x for x, y in zip(sent[1:], formula[1:], strict=True))


def test_without_room_at_the_sites_everything_is_sent(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    fed, full = (Held(bases, texts, tmp_path / str(room), "fed_sb", wire={"keep_mb": room}) for room in (1024, 0))
    kept, sent = fed.serve(), full.serve()
    tiny.same(fed.state(), full.state())
    assert kept[2]["payload_down"] < sent[2]["payload_down"] / 3
    for _, head in full.heads:  # what is completed from the message itself is not sent either way
        assert not {place for place, _ in head["broadcast"]["subspaces"].values()} & dict(head["held"]).keys()
    assert not list((tmp_path / "0" / "sites").rglob("contents/*"))


def test_what_a_site_has_lost_is_sent_whole_in_the_same_round(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """Its files are gone, those of another are damaged, a third was restarted and has them all."""
    quiet = Held(bases, texts, tmp_path / "quiet", "shared_galore")
    before = quiet.serve()
    fed = Held(bases, texts, tmp_path / "lossy", "shared_galore")

    def lose(event: Event) -> None:
        if event.kind == "round" and event.data["record"]["round_num"] == 1:
            shutil.rmtree(fed.sites[IDS[0]].folder / "contents")
            for path in (fed.sites[IDS[1]].folder / "contents").iterdir():
                path.write_bytes(path.read_bytes()[:-1] + b"?")
            fed.restart(IDS[2])

    history = fed.serve(lose)
    tiny.same(fed.state(), quiet.state())
    assert [r["rejected"] for r in history] == [{}, {}, {}]
    more = [x["round_trips"] - y["round_trips"] for x, y in zip(history, before, strict=True)]
    assert more == [0, 2, 0]
    assert history[2]["payload_down"] == before[2]["payload_down"]


def test_a_site_that_is_started_anew_says_what_it_holds(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """And so does a server: of Fed-SB's bases not one is sent again."""
    fed = Held(bases, texts, tmp_path, "fed_sb")

    def cut(event: Event) -> None:
        if event.kind == "round" and event.data["record"]["round_num"] == 1:
            raise Stop

    with pytest.raises(Stop):
        fed.serve(cut)
    for client_id in IDS:
        fed.restart(client_id)
    fed.heads.clear()
    record = fed.serve()[1]
    assert abs(record["payload_down"] - record["bytes_down"]) <= SMALL
    assert all(head["held"] for _, head in fed.heads)


def test_a_site_that_always_lacks_something_is_left_out_of_the_round(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    fed = Held(bases, texts, tmp_path, "ffa_lora", federation={"rounds": 1})

    def lacking(node: str, head: dict[str, Any], content: bytes) -> bytes | None:
        if (node, head["kind"]) != (IDS[1], "ask"):
            return None
        fields = {key: head[key] for key in ("run", "round", "number")}
        return protocol.encode({"client_id": node, "lacks": ["0" * 64], **fields}, protocol.MessageTensors())

    fed.transport.mishap = lacking
    (record,) = fed.serve()
    assert record["rejected"] == {IDS[1]: "says that it lacks tensors that it was sent"}
    assert fed.transport.sent.count((IDS[1], "ask")) == 2


def test_under_secure_sums_a_site_that_is_asked_again_masks_one_vector(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    fed = Held(bases, texts, tmp_path / "sums", "fed_sb", privacy={"secure_sums": True})

    def lose(event: Event) -> None:
        if event.kind == "round" and event.data["record"]["round_num"] == 1:
            shutil.rmtree(fed.sites[IDS[0]].folder / "contents")

    history = fed.serve(lose)
    assert [r["rejected"] for r in history] == [{}, {}, {}]
    open_sums = fed.config.privacy.model_copy(update={"secure_sums": False, "fixed_point": True})
    tiny.same(fed.state(), in_process(fed.config.model_copy(update={"privacy": open_sums}), tmp_path / "one")[1])


def test_messages_are_made_a_few_at_a_time(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that many sites times a large model are not in memory at once; the bits do not depend on it."""
    whole, few = (Held(bases, texts, tmp_path / name, "fedavg") for name in ("whole", "few"))
    whole.serve()
    batches: list[int] = []
    send = few.transport.send

    def counted(messages: Any, lifetime: float, answer_bytes: int) -> list[str]:
        batches.append(len(messages))
        return send(messages, lifetime, answer_bytes)

    monkeypatch.setattr(few.transport, "send", counted)
    monkeypatch.setattr(requests, "AT_ONCE", 1)
    history = few.serve()
    assert batches == [3] + [1] * 9  # the greetings, and three rounds of three
    assert [r["round_trips"] for r in history] == [1, 1, 1]
    tiny.same(few.state(), whole.state())


LIES: dict[str, Callable[[dict[str, Any], list[torch.Tensor]], None]] = {
    "a digest of nothing": lambda head, tensors: head["held"].append([head["held"][0][0], "0" * 64]),
    "news of another shape": lambda head, tensors: tensors.__setitem__(
        next(iter(head["previous"]["news"][0].values()))[0], torch.zeros(2, 3)
    ),
    "no previous": lambda head, tensors: head.pop("previous"),
    "other news": lambda head, tensors: tensors.__setitem__(
        next(iter(head["previous"]["news"][0].values()))[0],
        tensors[next(iter(head["previous"]["news"][0].values()))[0]] + 1,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_digest_stands_for_its_own_tensor_alone(
    bases: dict[str, Path], texts: Path, tmp_path: Path, lie: str
) -> None:
    """A server that lies about what a site holds is asked for it."""
    fed = Held(bases, texts, tmp_path, "fed_sb", federation={"rounds": 2})
    kept: list[bytes] = []

    def keep(node: str, head: dict[str, Any], content: bytes) -> None:
        if (node, head["kind"]) == (IDS[0], "ask") and "previous" in head and head["previous"]["news"]:
            kept.append(content)

    fed.transport.mishap = keep
    fed.serve()
    head = protocol.decode(fed.sites[IDS[0]].answer(changed(kept[-1], LIES[lie])))[0]
    assert head["lacks"]
