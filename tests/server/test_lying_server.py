"""A server that lies in secure sums, to sites whose keys are signed: it learns noise, or is refused."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_folders import Stop
from signed import IDS, Change, Signed, changed, settings

from fedspan.privacy.aggregator import Aggregator
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.sum_layout import SumLayout, SumTerms
from fedspan.runs.events import Event
from fedspan.server import coordinator
from fedspan.server.key_exchange import RunTerms
from fedspan.server.sums import check_weights
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol


def chi_square(words: Words) -> float:
    """Σ (observed - expected)²/expected over the 256 byte values: 255 ± √510 for uniform bytes."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[Words]:
    """Every sum as the server has unmasked it."""
    seen: list[Words] = []
    total = Aggregator.total

    def watched(self: Aggregator, answers: dict[str, bytes]) -> Words:
        seen.append(total(self, answers))
        return seen[-1]

    monkeypatch.setattr(Aggregator, "total", watched)
    return seen


def relabelled(by: int) -> Change:
    def change(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        if "round" in head:
            head["round"] += by

    return change


LIES: dict[str, tuple[tuple[str, ...], Change, Change | None]] = {
    "nothing": ((), relabelled(0), None),
    "the number of clients": (("ask",), lambda head, tensors: head.update(num_clients=9), None),
    "the clients of the masks": (("ask",), lambda head, tensors: head["sum"]["members"].remove("client-3"), None),
    "the round": (("ask", "unmask"), relabelled(1), relabelled(-1)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_site_that_is_told_something_else_makes_the_sum_noise(
    bases: dict[str, Path], texts: Path, tmp_path: Path, sums: list[Words], lie: str
) -> None:
    """n ≈ 15,000 bytes; χ² over the byte values, 5σ: |χ² - 255| < 113. Every word of the sum is as likely as any other,
    so that it says nothing even to a server that knows three of the four vectors."""
    fed = Signed(settings(bases["bert"], texts), tmp_path)
    fed.ask_falsely("client-1", *LIES[lie])
    with nullcontext() if lie == "nothing" else pytest.raises(FedspanError, match="the sum is given up"):
        fed.serve()
    (words,) = sums
    assert words.nbytes > 10_000
    if lie == "nothing":
        assert chi_square(words) > 10_000  # the test can fail
    else:
        assert abs(chi_square(words) - 255) < 5 * 510**0.5


def test_the_weights_of_noise_are_not_those_of_any_clients() -> None:
    """Random words pass an eighth of the time where only signs and sizes are looked at."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, size=(20_000, 2), dtype=np.uint64)
    noise = FixedPoint().decode(words.ravel()).reshape(-1, 2)
    assert int(((noise[:, 0] >= 3) & (noise[:, 1] >= 0) & (noise[:, 1] <= noise[:, 0])).sum()) > 2_000
    for numbers in noise:
        with pytest.raises(FedspanError, match="the sum is given up"):
            check_weights(numbers, 3, None)


@pytest.mark.parametrize(
    ("found", "losses", "weight", "sound"),
    [
        (29.0, 29.0, None, True),
        (29.0, 0.0, None, True),
        (3.0, 2.0, 3.0, True),
        (2.0, 2.0, None, False),
        (29.5, 29.0, None, False),
        (29.0, 2.5, None, False),
        (29.0, 30.0, None, False),
        (29.0, -1.0, None, False),
        (4.0, 3.0, 3.0, False),
    ],
)
def test_the_weights_of_a_sum_are_whole_numbers_that_fit_its_clients(
    found: float, losses: float, weight: float | None, sound: bool
) -> None:
    """Of three clients."""
    with nullcontext() if sound else pytest.raises(FedspanError, match=f"counts as {found:g} examples and {losses:g}"):
        check_weights(torch.tensor([found, losses, 0.0], dtype=torch.float64), 3, weight)


def test_everything_about_a_sum_is_in_the_digest_that_its_masks_are_bound_to() -> None:
    """Names, order and padding of the layout too."""
    dense, modules = {"x": (2, 3), "y": (3, 2)}, {"m": {"a": (4, 3), "b": (3, 4)}}
    one = SumTerms("r", 0, 0, "s", "b", 4, 4, 4, SumLayout(dense, modules))
    others = [
        dataclasses.replace(one, **{f.name: 7 if isinstance(getattr(one, f.name), int) else "other"})
        for f in dataclasses.fields(one)
        if f.name != "layout"
    ]
    layouts = [
        SumLayout({"y": (3, 2), "x": (2, 3)}, modules),
        SumLayout({"x": (3, 2), "y": (2, 3)}, modules),
        SumLayout(dense, {"m": {"b": (3, 4), "a": (4, 3)}}),
        SumLayout(dense, {"m": {"a": (5, 3), "b": (3, 3)}}),
        SumLayout({}, {"m": {"a": (4, 3), "b": (3, 4), "x": (2, 3), "y": (3, 2)}}),
    ]
    others += [dataclasses.replace(one, layout=layout) for layout in layouts]
    assert len({terms.digest() for terms in (one, *others)}) == 1 + len(others) == 14


REFUSED: dict[str, tuple[Change, str]] = {
    "a layout": (lambda head, tensors: head["sum"].update(layout={"dense": {}, "modules": {}}), "sum.layout"),
    "another rank": (lambda head, tensors: head.update(rank=head["rank"] + 1), "a server of rank 5: expected at most"),
}


@pytest.mark.parametrize("lie", REFUSED)
def test_a_layout_in_the_message_or_one_of_another_rank_is_refused(
    bases: dict[str, Path], texts: Path, tmp_path: Path, lie: str
) -> None:
    """By another order and padding the server could shift one site's tensors to where all the others have zeros."""
    fed = Signed(settings(bases["bert"], texts), tmp_path)
    change, said = REFUSED[lie]
    fed.ask_falsely("client-1", ("ask",), change)
    (record,) = fed.serve()
    assert list(record["rejected"]) == ["client-1"]
    assert said in fed.said[0]


def test_a_second_list_of_survivors_is_refused_under_any_label(
    bases: dict[str, Path], texts: Path, tmp_path: Path, sums: list[Words]
) -> None:
    """The server claims to have lost the sum of four, has it masked again, and has it unmasked as another round's."""
    fed = Signed(settings(bases["bert"], texts), tmp_path)

    def cut(event: Event) -> None:
        if event.kind == "client":
            raise Stop

    with pytest.raises(Stop):
        fed.serve(cut)
    assert len(sums) == 1
    fed.transport.mishap = lambda node, head, content: "gone" if node == "node-3" and head["kind"] != "hello" else None
    for client_id in IDS:
        fed.restart(client_id)
        fed.ask_falsely(client_id, ("unmask",), relabelled(7), relabelled(-7))
    with pytest.raises(ValueError, match="0 clients helped to unmask"):
        fed.serve()
    assert len(sums) == 1
    assert sum("this site has masked" in line for line in fed.said) == 3


def test_a_run_that_is_begun_again_gives_no_site_away_by_the_difference_of_its_sums(
    bases: dict[str, Path], texts: Path, tmp_path: Path, sums: list[Words]
) -> None:
    """From the same seed every site's update has the same bits: with one site less, by an accident or a lie, the
    difference of the two runs' sums is that site's update."""
    fed = Signed(settings(bases["bert"], texts), tmp_path)
    fed.serve()
    shutil.move(tmp_path / "run", tmp_path / "before")
    for client_id in IDS:
        fed.restart(client_id)
    fed.serve()
    assert np.array_equal(*sums)  # as they were, for the same sites
    shutil.move(tmp_path / "run", tmp_path / "again")
    fed.transport.mishap = lambda node, head, content: "gone" if node == "node-3" and head["kind"] != "hello" else None
    with pytest.raises(FedspanError, match="0 clients helped to unmask"):
        fed.serve()
    assert len(sums) == 2
    assert sum("or one with the same update of this site, was unmasked for other" in line for line in fed.said) == 3


def test_the_result_of_one_round_is_in_no_other_rounds_sum(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """A second exchange asks about the result of the first. Asked in a round whose first was left out, or in another
    run, it would be about an old result, in a sum over other sites."""
    fed = Signed(settings(bases["bert"], texts, "glora_sums", federation={"rounds": 3}), tmp_path)
    kept: dict[int, bytes] = {}

    def keep(node: str, head: dict[str, Any], content: bytes) -> None:
        if node == "node-0" and head["kind"] == "ask":
            kept[head["number"]] = content

    def cut(event: Event) -> None:
        if event.kind == "round":
            raise Stop

    fed.transport.mishap = keep
    with pytest.raises(Stop):
        fed.serve(cut)

    def later(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        head.update(round=1, counted=1)
        head["sum"]["index"] = 3

    said = protocol.decode(fed.sites["client-0"].answer(changed(kept[1], later)))[0]
    assert said.get("code") == "not-held"


def test_a_roster_of_two_is_refused_by_the_server_and_by_the_sites(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sums: list[Words]
) -> None:
    """From a sum of two, each of the two learns the other's update; four sites with threshold 0.6 have agreed on 3."""
    fed = Signed(settings(bases["bert"], texts), tmp_path)
    fed.transport.mishap = lambda node, head, content: (
        "gone" if node in ("node-2", "node-3") and head["kind"] not in ("hello", "ask") else None
    )
    with pytest.raises(ValueError, match="2 clients advertised keys, 3 were needed"):
        fed.serve()

    def of_two(privacy: Any, num_rounds: int, least: int, trusted: Any) -> RunTerms:
        return RunTerms(privacy.model_copy(update={"threshold": 0.51}), num_rounds, 2, trusted)

    monkeypatch.setattr(coordinator, "RunTerms", of_two)
    monkeypatch.setattr(
        coordinator.Coordinator,
        "_ready",
        lambda self, question, clients: [c for c in clients if c.client_id < "client-2"],
    )
    with pytest.raises(ValueError, match="0 clients shared their secrets"):
        fed.serve()
    assert sums == []
    assert any("a sum of 2 clients or more: expected at least 3 in every sum" in line for line in fed.said)


def test_settings_may_ask_for_more_clients(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """With `privacy.min_clients` all four must come, and stay."""
    fed = Signed(settings(bases["bert"], texts, privacy={"min_clients": 4}), tmp_path)
    fed.transport.mishap = lambda node, head, content: "gone" if node == "node-3" and head["kind"] == "ask" else None
    with pytest.raises(ValueError, match="3 clients sent their vectors, 4 were needed"):
        fed.serve()
    fed.transport.mishap = None
    assert fed.serve()[0]["num_clients"] == 4


def test_keys_for_a_few_rounds_and_questions_in_their_place_alone(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """A site makes no keys without end, and answers one exchange as what it is in the round."""
    fed = Signed(settings(bases["bert"], texts, privacy={"rounds_ahead": 3}), tmp_path)
    kept: dict[str, bytes] = {}

    def keep(node: str, head: dict[str, Any], content: bytes) -> None:
        if node == "node-0":
            kept.setdefault(head["kind"], content)

    fed.transport.mishap = keep
    fed.serve()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("advertise", {"num_sums": 4}, "keys for 4 sums at once: expected at most 3"),
        ("ask", {"place": [0, 2]}, "exchange 0 as number 0 of 2 in round 0"),
        ("ask", {"place": [1, 1]}, "exchange 0 as number 1 of 1 in round 0"),
    ]
    for kind, fields, problem in cases:
        message = changed(kept[kind], lambda head, tensors, fields=fields: head.update(fields))
        fed.sites["client-0"].answer(message)
        assert problem in fed.said[-1]
