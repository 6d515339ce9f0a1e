"""Secure sums between a server and its sites in memory: the bits of fixed point, and sites that drop out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from remote import IDS, SUMS, Federation, settings, spoiled
from run_folders import Stop, of_each_kind, state_of

from fedspan.federation.sampling import create_sampler
from fedspan.runs import checkpoint
from fedspan.runs.events import Event
from fedspan.runs.execution import run
from fedspan.wire import protocol


@pytest.mark.parametrize("name", of_each_kind(SUMS))
def test_secure_sums_come_to_the_bits_of_fixed_point_in_one_process(
    bases: dict[str, Path], texts: Path, tmp_path: Path, name: str
) -> None:
    """The masks cancel to the bit; the server's records hold no update of a single client."""
    one = {"rounds": 2}
    run(settings(bases["bert"], texts, name, privacy={"fixed_point": True}, federation=one), tmp_path / "fixed")
    masked = settings(bases["bert"], texts, name, privacy={"secure_sums": True}, federation=one)
    run(masked, tmp_path / "here")
    fed = Federation(masked, tmp_path)
    fed.serve()
    tiny.same(fed.state(), state_of(tmp_path / "fixed"))
    tiny.same(fed.state(), state_of(tmp_path / "here"))


@pytest.mark.parametrize("name", ["hetlora", "glora_sums"])
def test_secure_sums_of_mixed_ranks(bases: dict[str, Path], texts: Path, tmp_path: Path, name: str) -> None:
    """Every site derives the layout of the largest rank that is asked, which in one of the rounds is not the run's."""
    config = settings(bases["bert"], texts, name, federation={"ranks": (2, 8, 4, 3), "rounds": 3})
    fixed = {"privacy": config.privacy.model_copy(update={"fixed_point": True})}
    masked = {"privacy": config.privacy.model_copy(update={"secure_sums": True})}
    drawn = create_sampler(config.federation, config.seed, "none")
    assert any(1 not in drawn.draw(4, round_num) for round_num in range(3))
    run(config.model_copy(update=fixed), tmp_path / "fixed")
    fed = Federation(config.model_copy(update=masked), tmp_path)
    history = fed.serve()
    assert all(not record["rejected"] for record in history)
    tiny.same(fed.state(), state_of(tmp_path / "fixed"))


def test_the_server_sees_masked_words_alone(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """No message under secure sums holds a tensor of an update, a loss or a count of examples."""
    fed = Federation(settings(bases["bert"], texts, "ffa_lora", privacy={"secure_sums": True}), tmp_path)
    seen: list[dict[str, Any]] = []
    for node, answer in list(fed.transport.handlers.items()):

        def watched(content: bytes, answer: Callable[[bytes], bytes] = answer) -> bytes:
            reply = answer(content)
            seen.append(protocol.decode(reply)[0])
            return reply

        fed.transport.handlers[node] = watched
    fed.serve()
    assert {frozenset(m) & {"update", "train_loss"} for m in seen} == {frozenset()}
    assert {m["num_examples"] for m in seen if "num_examples" in m} == {None}
    # Two clients' words of one round have nothing in common, and neither is near the fixed point of a small number.
    assert sum("words" in m for m in seen) == 9


def test_a_server_cannot_talk_a_site_out_of_secure_sums(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """The same question without its sum would be answered with the bare update: the site's own settings forbid it."""
    fed = Federation(
        settings(bases["bert"], texts, "ffa_lora", privacy={"secure_sums": True}, federation={"rounds": 1}), tmp_path
    )
    asked: list[tuple[str, bytes]] = []

    def mishap(node: str, head: dict[str, Any], content: bytes) -> None:
        if head["kind"] == "ask":
            asked.append((node, content))

    fed.transport.mishap = mishap
    fed.serve()
    node, content = asked[0]
    bare = spoiled(lambda head, tensors: head.pop("sum"))(content)
    header = protocol.decode(fed.transport.handlers[node](bare))[0]
    assert header["code"] == "own-update"
    assert not {"update", "words", "train_loss"} & header.keys()


# Secure sums with drop-outs


@pytest.mark.parametrize("kind", ["advertise", "share", "receive", "ask", "unmask"])
def test_one_site_of_four_may_drop_out_of_a_secure_sum_anywhere(
    bases: dict[str, Path], texts: Path, tmp_path: Path, kind: str
) -> None:
    """Before its vector is in, the sum is that of the other three; after, of all four: exactly."""
    sections = {"federation": {"participation": 1.0, "rounds": 1}}
    config = settings(bases["bert"], texts, "ffa_lora", privacy={"secure_sums": True}, **sections)
    fed = Federation(config, tmp_path / "a")
    fed.transport.mishap = lambda node, head, content: "gone" if node == "node-1" and head["kind"] == kind else None
    history = fed.serve()
    plain = Federation(
        settings(bases["bert"], texts, "ffa_lora", privacy={"fixed_point": True}, **sections), tmp_path / "b"
    )
    if kind != "unmask":
        plain.transport.mishap = lambda node, head, content: (
            "gone" if node == "node-1" and head["kind"] == "ask" else None
        )
    plain.serve()
    assert history[0]["num_clients"] == (4 if kind == "unmask" else 3)
    tiny.same(fed.state(), plain.state())


def test_two_of_four_are_too_many_and_nothing_is_changed(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = settings(
        bases["bert"], texts, "ffa_lora", privacy={"secure_sums": True}, federation={"participation": 1.0, "rounds": 2}
    )
    fed = Federation(config, tmp_path)
    fed.transport.mishap = lambda node, head, content: (
        "gone" if node in ("node-1", "node-2") and head["kind"] == "unmask" and head["round"] == 1 else None
    )
    with pytest.raises(ValueError, match="2"):
        fed.serve()
    before = fed.state()
    assert len(checkpoint.read(tmp_path / "run" / "checkpoint" / "federation.safetensors").history) == 1
    fed.transport.mishap = None
    fed.serve()
    assert any(not torch.equal(before[name], value) for name, value in fed.state().items())


def test_keys_are_exchanged_for_several_rounds_at_once(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Rounds take two round trips instead of five, until a site has lost its keys: then they are exchanged again."""
    one = {"participation": 1.0, "rounds": 6}
    masked = {"secure_sums": True, "rounds_ahead": 4}
    config = settings(bases["bert"], texts, "ffa_lora", privacy=masked, federation=one)
    fed = Federation(config, tmp_path / "a")
    round_trips = [record["round_trips"] for record in fed.serve()]
    assert round_trips == [5, 2, 2, 2, 5, 2]
    other = Federation(config, tmp_path / "b")

    def restart(event: Event) -> None:
        if event.kind == "round" and event.data["record"]["round_num"] == 1:
            other.restart("client-2")

    history = other.serve(restart)
    assert [record["round_trips"] for record in history] == [5, 2, 5, 2, 2, 2]
    assert "has no keys for" in history[1]["rejected"]["client-2"]
    assert [record["num_clients"] for record in history] == [4, 3, 4, 4, 4, 4]


def test_no_two_choices_of_clients_are_unmasked_for_one_sum(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """Asked again for the same round without client-3, the sites refuse: the difference would be client-3's update."""
    config = settings(
        bases["bert"], texts, "ffa_lora", privacy={"secure_sums": True}, federation={"participation": 1.0, "rounds": 1}
    )
    fed = Federation(config, tmp_path)

    def cut(event: Event) -> None:
        if event.kind == "client":
            raise Stop  # the sum is unmasked by now, and the server claims to have lost it

    with pytest.raises(Stop):
        fed.serve(cut)
    fed.transport.mishap = lambda node, head, content: "gone" if node == "node-3" and head["kind"] != "hello" else None
    for client_id in IDS:
        fed.restart(client_id)
    with pytest.raises(ValueError, match="helped to unmask"):
        fed.serve()
    assert sum("the difference would reveal the update of one of them" in line for line in fed.lines) == 3
    fed.transport.mishap = None
    fed.serve()  # the same clients again: nothing is revealed that was not known before
