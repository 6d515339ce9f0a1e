"""Answers are folded, added or written to the disk as they come: a round holds one of them in memory."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from memory_transport import MemoryTransport, make_sites, remote_config
from run_folders import state_of

from fedspan.config import Config
from fedspan.runs import execution
from fedspan.server.early_replies import EarlyReplies, in_order
from fedspan.server.requests import Problem, Reply
from fedspan.wire.transport import Delivery

IDS = [f"client-{k}" for k in range(8)]


class OneByOne(MemoryTransport):
    """Answers lie on the disk until `poll` hands them over, one at a time, in an order of its own.

    Parameters
    ----------
    backwards
        The last site's answer comes first.
    """

    def __init__(self, handlers: dict[str, Any], folder: Path, backwards: bool) -> None:
        super().__init__(handlers)
        self.folder, self.backwards = folder, backwards
        folder.mkdir()
        self.ready: list[tuple[str, str, Path]] = []
        self.peaks: list[int] = []
        """Bytes that Python has allocated at most from one answer to the next."""
        self.sizes: list[int] = [0]

    def send(self, messages: Sequence[tuple[str, bytes]], lifetime: float, answer_bytes: int = 0) -> list[str]:
        tracemalloc.stop()
        tickets = super().send(messages, lifetime, answer_bytes)
        for _, delivery in self._due:
            assert delivery.content is not None
            path = self.folder / delivery.ticket
            path.write_bytes(delivery.content)
            self.ready.append((delivery.ticket, delivery.node, path))
        self._due.clear()
        return tickets

    def poll(self) -> list[Delivery]:
        if tracemalloc.is_tracing():
            self.peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
        else:
            tracemalloc.start(1)
        if not self.ready:
            return []
        ticket, node, path = self.ready.pop(-1 if self.backwards else 0)
        content = path.read_bytes()
        self.sizes.append(len(content))
        return [Delivery(ticket, node, content)]


@pytest.fixture(autouse=True)
def no_tracing() -> Iterator[None]:
    yield
    tracemalloc.stop()


def configured(base: Path, texts: Path, **sections: Any) -> Config:
    return remote_config(
        base,
        texts,
        "fedavg",
        federation={"num_clients": 8, "rounds": 1, "participation": 1.0},
        local={"steps": 1},
        **sections,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose weights take 1.7 MB, beside which the heads of messages are small."""
    return tiny.save("bert", tmp_path_factory.mktemp("base"), hidden_size=128, intermediate_size=512)


@pytest.fixture(scope="module")
def expected(base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The state after the same round in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    execution.run(configured(base, texts), folder)
    return state_of(folder)


@pytest.mark.parametrize(
    ("privacy", "backwards", "most"),
    [({}, False, 3.0), ({}, True, 3.0), ({"fixed_point": True}, True, 6.0), ({"secure_sums": True}, True, 4.0)],
    ids=["as they are due", "last first", "sums in the open", "masked sums"],
)
def test_a_round_holds_one_answer_in_memory(
    base: Path,
    texts: Path,
    tmp_path: Path,
    expected: dict[str, torch.Tensor],
    privacy: dict[str, Any],
    backwards: bool,
    most: float,
) -> None:
    """All weights of eight sites; of one answer, the message as it came, its tensors, and what is computed of them.
    Those that come early lie on the disk."""
    if "secure_sums" in privacy:
        pytest.importorskip("cryptography")
    config = configured(base, texts, privacy=privacy, engine={"name": "sequential", "round_memory": 1e-9})
    sites = make_sites(config, IDS, tmp_path / "sites")
    transport = OneByOne({name: site.answer for name, site in sites.items()}, tmp_path / "answers", backwards)
    execution.serve(config, tmp_path / "run", lambda event: None, transport)
    assert max(transport.peaks) < most * max(transport.sizes)
    assert not (tmp_path / "run" / ".early").exists()
    if not privacy:
        tiny.same(state_of(tmp_path / "run"), expected)


def reply(content: bytes) -> Reply:
    return Reply({"client_id": "", "run": "", "round": 0, "number": 0}, [], content)


@pytest.mark.parametrize("limit", [0, 7, 10**6])
def test_the_order_is_that_of_the_clients_whatever_comes_first(tmp_path: Path, limit: int) -> None:
    ids, absent = ["a", "b", "c", "d", "e"], {"c": Problem("is not connected", absent=True)}
    contents = {"a": b"1111", "b": b"2222", "e": b"5555"}
    due = [("a", b"1111"), ("b", b"2222"), ("c", "is not connected"), ("d", "gone"), ("e", b"5555")]
    for arrival in itertools.permutations("abde"):
        early = EarlyReplies(tmp_path / "early", limit, lambda client_id, content: reply(content))
        came = ((who, reply(contents[who]) if who in contents else Problem("gone")) for who in arrival)
        found = [
            (who, each.reason if isinstance(each, Problem) else each.content)
            for who, each in in_order(came, absent, ids, early)
        ]
        assert found == due
        num_early = sum(who in contents and min(arrival[place:]) < who for place, who in enumerate(arrival))
        assert early.num_stored == num_early if limit == 0 else early.num_stored < max(num_early, 1)
        assert not (tmp_path / "early").exists()
