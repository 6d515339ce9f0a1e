"""Sums over nearly the same sites: said, refused by server and sites, or planned so that they do not come about."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from signed import IDS, Signed, settings

from fedspan.privacy.aggregator import Aggregator
from fedspan.privacy.fixed_point import Words
from fedspan.server.roster_plan import RosterPlan
from fedspan.support.errors import FedspanError


def gone_in(fed: Signed, absent: dict[int, Collection[str]]) -> None:
    """Have clients be away in rounds, from their first message on."""

    def mishap(node: str, head: dict[str, Any], content: bytes) -> str | None:
        client_id = IDS[int(node.removeprefix("node-"))]
        return "gone" if head["kind"] != "hello" and client_id in absent.get(head["round"], ()) else None

    fed.transport.mishap = mishap


def cohorts(history: list[dict[str, Any]]) -> list[int]:
    return [record["num_clients"] for record in history]


def test_by_default_a_small_difference_is_said_on_both_sides(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    fed = Signed(settings(bases["bert"], texts, federation={"rounds": 3}), tmp_path)
    gone_in(fed, {1: ["client-3"]})
    assert cohorts(fed.serve()) == [4, 3, 4]
    # client-3 itself was asked about no sum without it: the others see it.
    said = [line for line in fed.lines if "differs from an earlier one by client-3 alone" in line]
    assert [line.partition(":")[0] for line in said] == ["round 2", "round 3"]
    assert sum("sum 1/0 differs from an earlier one by client-3 alone" in line for line in fed.said) == 3
    assert sum("sum 2/0 differs from an earlier one by client-3 alone" in line for line in fed.said) == 3


def test_where_it_is_allowed_or_covered_by_noise_nothing_is_said(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("dp_accounting")
    for name, privacy in (("allowed", {"differencing": "allow"}), ("noise", {"dp": "example"})):
        fed = Signed(settings(bases["bert"], texts, federation={"rounds": 2}, privacy=privacy), tmp_path / name)
        gone_in(fed, {1: ["client-3"]})
        assert cohorts(fed.serve()) == [4, 3]
        assert not any("differs from an earlier one" in line for line in (*fed.lines, *fed.said))


def test_a_site_that_comes_back_waits_and_the_run_goes_on(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """After a round of three, one of four would differ by one site."""
    config = settings(bases["bert"], texts, federation={"rounds": 3}, privacy={"differencing": "refuse"})
    fed = Signed(config, tmp_path)
    gone_in(fed, {0: ["client-1"]})
    history = fed.serve()
    assert cohorts(history) == [3, 3, 3]
    # They take turns: rosters of three differ in two sites or none.
    assert [list(record["rejected"]) for record in history] == [["client-1"], ["client-1"], ["client-2"]]
    assert history[1]["rejected"]["client-1"].startswith("waits, so that the sum is not over nearly the same sites")
    assert fed.said == []


def test_a_round_that_loses_one_site_is_refused_by_the_server_and_after_a_restart(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    config = settings(bases["bert"], texts, federation={"rounds": 2}, privacy={"differencing": "refuse"})
    fed = Signed(config, tmp_path)
    gone_in(fed, {1: ["client-3"]})
    with pytest.raises(FedspanError, match="round 2: the sum differs from an earlier one by client-3 alone"):
        fed.serve()
    assert not any(kind == "unmask" for _, kind in fed.transport.sent[-4:])
    for client_id in IDS:
        fed.restart(client_id)
    gone_in(fed, {})
    assert cohorts(fed.serve()) == [4, 4]


@pytest.mark.parametrize("malicious", [False, True])
def test_sites_refuse_what_a_server_asks_all_the_same(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, malicious: bool
) -> None:
    """A server that lies about its plan, and one that calls the sum another run's."""
    monkeypatch.setattr(RosterPlan, "choose", lambda self, round_num, number, ids, without: ids)
    monkeypatch.setattr(RosterPlan, "check", lambda self, round_num, number, survivors, without: None)
    seen: list[Words] = []
    total = Aggregator.total
    monkeypatch.setattr(Aggregator, "total", lambda self, answers: seen.append(total(self, answers)) or seen[-1])
    privacy = {"differencing": "refuse", **({"server": "malicious", "threshold": 0.7} if malicious else {})}
    config = settings(bases["bert"], texts, federation={"rounds": 2}, privacy=privacy)
    fed = Signed(config, tmp_path)
    gone_in(fed, {1: ["client-3"]})
    with pytest.raises(FedspanError, match=r"0 clients (helped to unmask|signed the list of survivors)"):
        fed.serve()
    (tmp_path / "run").rename(tmp_path / "before")
    for client_id in IDS:
        fed.restart(client_id)
    gone_in(fed, {0: ["client-3"]})
    with pytest.raises(FedspanError, match=r"0 clients (helped to unmask|signed the list of survivors)"):
        fed.serve()
    assert len(seen) == 1
    assert sum("differs from an earlier one by client-3 alone" in line for line in fed.said) == 6
    assert any("whose difference could be read: its settings forbid it" in line for line in fed.lines)


def test_what_the_policy_is_for(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing moves between two sums, here since nobody learns, their difference is one site's part to the bit:
    its weight is read."""
    seen: list[Words] = []
    total = Aggregator.total
    monkeypatch.setattr(Aggregator, "total", lambda self, answers: seen.append(total(self, answers)) or seen[-1])
    config = settings(bases["bert"], texts, federation={"rounds": 2})
    fed = Signed(config, tmp_path)
    gone_in(fed, {1: ["client-3"]})
    fed.serve()
    one, other = seen
    weight = int((one - other)[0]) >> config.privacy.fraction_bits
    assert weight == fed.sites["client-3"].client.num_examples
    assert np.array_equal(one.shape, other.shape)


def test_a_damaged_plan_is_one_line(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "sums.json"
    path.write_text("[1]")
    with pytest.raises(FedspanError, match=r"sums.json is damaged") as refused:
        RosterPlan(settings(bases["bert"], texts).privacy, 3, path, lambda line: None)
    assert "\n" not in str(refused.value)
