"""Whole rounds with `privacy.server = "malicious"`: the same bits as with a curious server, and no shares for a lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from signed import IDS, Signed, changed, settings, without

from fedspan.config import Config
from fedspan.federation.requirements import chosen
from fedspan.privacy.aggregator import Aggregator
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol

MALICIOUS = {"server": "malicious", "threshold": 0.7}


def malicious(bases: dict[str, Path], texts: Path, **sections: Any) -> Config:
    return settings(bases["bert"], texts, privacy={**MALICIOUS, **sections.pop("privacy", {})}, **sections)


def test_the_bits_are_those_of_a_curious_server(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """For one more round trip a sum, whose message has the signatures of all."""
    config = malicious(bases, texts, federation={"rounds": 2})
    fed = Signed(config, tmp_path / "malicious")
    history = fed.serve()
    plain = Signed(settings(bases["bert"], texts, federation={"rounds": 2}), tmp_path / "curious")
    before = plain.serve()
    tiny.same(fed.state(), plain.state())
    assert [r["round_trips"] for r in history] == [1 + r["round_trips"] for r in before]
    assert fed.lines == plain.lines


@pytest.mark.parametrize(("lost_at", "in_sum"), [("ask", False), ("sign", True), ("unmask", True)])
def test_a_site_may_be_lost_at_any_step(
    bases: dict[str, Path], texts: Path, tmp_path: Path, lost_at: str, in_sum: bool
) -> None:
    config = malicious(bases, texts)
    fed = Signed(config, tmp_path / "lost")
    fed.transport.mishap = lambda node, head, content: "gone" if (node, head["kind"]) == ("node-2", lost_at) else None
    (record,) = fed.serve()
    assert list(record["rejected"]) == ([] if in_sum else ["client-2"])
    if not in_sum:
        tiny.same(fed.state(), without(config, tmp_path / "without", "client-2"))
    else:
        assert "client-2 does not help to unmask the sum: gone" in fed.lines


def fewer(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    head["survivors"].remove("client-3")
    head.get("signatures", {}).pop("client-3", None)


def unsigned(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    head["signatures"] = dict(list(head["signatures"].items())[:2])


def swapped(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
    one, other, *_ = head["signatures"]
    head["signatures"][one] = head["signatures"][other]


LIES: dict[str, tuple[tuple[str, ...], Callable[..., None], str]] = {
    "other survivors to sign and to unmask": (("sign", "unmask"), fewer, ""),
    "other survivors to unmask": (("unmask",), fewer, "expected those that 'client-1' has signed"),
    "two signatures": (("unmask",), unsigned, "2 signatures of the list of survivors: expected at least 3"),
    "one site's signature in another's name": (("unmask",), swapped, "has not signed the survivors"),
    "none": (("unmask",), lambda head, tensors: head.pop("signatures"), "0 signatures of the list of survivors"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_site_that_is_lied_to_reveals_nothing(bases: dict[str, Path], texts: Path, tmp_path: Path, lie: str) -> None:
    """The curious protocol's site answers the same message."""
    kinds, change, said = LIES[lie]
    fed = Signed(malicious(bases, texts), tmp_path / "malicious")
    fed.ask_falsely("client-1", kinds, change)
    fed.serve()
    assert said in "\n".join(fed.said)
    # Where it signed another list, its signature shows it to the server too; else it refuses the unmasking.
    assert any(line.startswith("client-1 does not help to unmask the sum") for line in fed.lines)
    told = {line.partition(": ")[2].partition(" (incident")[0] for line in fed.lines if "does not help" in line}
    assert told & {
        "it was not shown that enough sites were told the same survivors of the sum: it reveals nothing",
        "'client-1' has not signed the survivors ['client-0', 'client-1', 'client-2', 'client-3'] of this sum",
    }


def test_the_curious_protocol_answers_a_second_list_that_it_is_told(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is what the signatures are for: the same lie, and the site reveals shares for survivors of the server's
    choice."""
    fed = Signed(settings(bases["bert"], texts), tmp_path)
    given: list[bytes] = []

    def keep(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        given.append(protocol.get_bytes(tensors, head["unmask"]))

    fed.ask_falsely("client-1", ("unmask",), fewer, keep)
    fed.serve()
    assert len(given[0]) == 32 * 5
    assert not any("client-1" in line and "incident" in line for line in fed.said)


def test_too_few_signatures_end_the_sum_with_nothing_unmasked(
    bases: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(Aggregator, "total", lambda self, answers: seen.append(answers))
    fed = Signed(malicious(bases, texts), tmp_path)
    fed.transport.mishap = lambda node, head, content: (
        "gone" if node in ("node-2", "node-3") and head["kind"] == "sign" else None
    )
    with pytest.raises(FedspanError, match="2 clients signed the list of survivors, 3 were needed"):
        fed.serve()
    assert seen == []
    assert ("node-0", "unmask") not in fed.transport.sent


def test_a_signature_of_an_earlier_round_is_refused(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    fed = Signed(malicious(bases, texts, federation={"rounds": 2}), tmp_path)
    old: dict[str, torch.Tensor] = {}

    def replay(head: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        for name, index in head["signatures"].items():
            if head["round"] == 0:
                old[name] = tensors[index]
            elif name != "client-1":
                tensors[index] = old[name]

    fed.ask_falsely("client-1", ("unmask",), replay)
    assert len(fed.serve()) == 2
    assert sum("has not signed the survivors" in line for line in fed.said) == 1


def test_identities_are_demanded_of_both_sides(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = malicious(bases, texts)
    with pytest.raises(FedspanError, match="'malicious': the site 'client-0' has no identity; expected `identity`"):
        Signed(config, tmp_path / "sites", signed=False)
    fed = Signed(config, tmp_path / "server", known=False)
    with pytest.raises(FedspanError, match=r"the server has no public keys of the sites; expected sites.json"):
        fed.serve()


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"threshold": 0.6}, "privacy.threshold = 0.6 with privacy.server = 'malicious': .* more than 2/3"),
        ({"secure_sums": False}, "privacy.server = 'malicious': it is about secure sums"),
    ],
)
def test_settings_that_prove_nothing_are_refused(
    bases: dict[str, Path], texts: Path, privacy: dict[str, Any], said: str
) -> None:
    with pytest.raises(FedspanError, match=said) as refused:
        chosen(malicious(bases, texts, privacy=privacy))
    assert "\n" not in str(refused.value)


def test_a_question_for_a_signature_where_none_are_used_is_refused(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    fed = Signed(settings(bases["bert"], texts), tmp_path)
    kept: list[bytes] = []

    def keep(node: str, head: dict[str, Any], content: bytes) -> None:
        if (node, head["kind"]) == ("node-0", "unmask"):
            kept.append(content)

    fed.transport.mishap = keep
    fed.serve()
    said = fed.sites["client-0"].answer(changed(kept[0], lambda head, tensors: head.update(kind="sign")))
    assert protocol.decode(said)[0]["code"] == "refused"
    assert IDS[0] in fed.said[-1]


def test_evaluations_by_the_clients_are_signed_sums_too(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Their keys are others than those of the rounds, and so are the lists that are signed for them."""
    judged = {"evaluation": {"where": "clients", "every": 1}, "data": {"client_holdout": 0.3}}
    federation = {"rounds": 2}
    fed = Signed(malicious(bases, texts, federation=federation, **judged), tmp_path / "malicious")
    signed: set[tuple[int, int]] = set()

    def note(node: str, head: dict[str, Any], content: bytes) -> None:
        if head["kind"] == "sign":
            signed.add((head["round"], head["number"]))

    fed.transport.mishap = note
    fed.serve()
    plain = Signed(settings(bases["bert"], texts, federation=federation, **judged), tmp_path / "curious")
    plain.serve()
    figures = [
        json.loads((tmp_path / name / "run" / "summary.json").read_text())["client_evaluation"]
        for name in ("malicious", "curious")
    ]
    assert figures[0] == figures[1]
    assert figures[0]["clients"] == len(IDS)
    numbers = {number for _, number in signed}
    assert len(numbers) == 2, "the round's exchange and the evaluation"
    assert len(signed) >= 4
