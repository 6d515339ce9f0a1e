"""The messages that a site must not act on, and its record of the sums that it has helped to unmask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedspan.config import Config
from fedspan.site.errors import Refused
from fedspan.site.message_checks import MessageChecks, RoundHeader
from fedspan.site.settings import SiteSettings
from fedspan.site.storage import SiteStorage
from fedspan.site.sum_participant import SumParticipant
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement

TERMS = {"seed": 0}


def message(**fields: Any) -> dict[str, Any]:
    common = {"terms": agreement.digest(TERMS), "base": "b", "run": "r1", "round": 3, "counted": 2}
    return {**common, "number": 0, "rank": 4, "num_clients": 5, **fields}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"terms": "x"}, "other settings"),
        ({"base": "x"}, "other base weights"),
        ({"rank": 9}, "a server of rank 9: expected at most 8"),
        ({"counted": 4}, "round 3 after 4 finished rounds"),
        ({"counted": -1}, "round 3 after -1 finished rounds"),
    ],
)
def test_a_message_for_others_or_with_odd_fields_is_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(Refused, match=expected):
        MessageChecks(TERMS, 8).check(message(**fields), "b")


@pytest.mark.parametrize("run", ["../r1", "..", "", ".r", "r/1", "\u0440", "r\n", 7, None])
def test_a_run_that_is_a_path_is_refused(run: object) -> None:
    """By the schema at the door, and once more where it is about to become a folder."""
    with pytest.raises(FedspanError, match="run = "):
        MessageChecks(TERMS).check(message(run=run), "b")


def test_a_refused_message_does_not_make_the_next_one_old() -> None:
    checks = MessageChecks(TERMS, 8)
    with pytest.raises(Refused):
        checks.check(message(counted=3, rank=9, round=9), "b")
    assert checks.check(message(), "b") == RoundHeader("r1", 3, 2, 0, 4, 5)
    with pytest.raises(Refused, match="from before round 2"):
        checks.check(message(counted=1), "b")
    checks.check(message(run="r2", counted=0, round=0), "b")  # another run begins where it likes


def test_a_sums_keys_serve_the_run_that_they_were_made_for(tmp_path: Path) -> None:
    """Under another run's name the record of unmasked sums would be another file, and empty."""
    settings = SiteSettings(Config(), "a")
    sums = SumParticipant(settings, "a", SiteStorage(tmp_path), 1, lambda line: None)
    sums.advertise(RoundHeader("r1", 0, 0, 0, 4, 2), "s", 1)
    for run, session in (("r2", "s"), ("../r1", "s"), ("r1", "t")):
        with pytest.raises(Refused, match="no keys for"):
            sums.unmask(run, session, 0, (0, 0), ["a", "b"], {})
    assert not list(tmp_path.rglob("*.json"))


def test_a_sum_is_unmasked_for_one_choice_of_clients_and_never_on_a_damaged_record(tmp_path: Path) -> None:
    storage = SiteStorage(tmp_path)
    storage.allow_unmasking("r1", "0/0", "v", ["b", "a"])
    SiteStorage(tmp_path).allow_unmasking("r1", "0/0", "v", ["a", "b"])
    storage.allow_unmasking("r1", "1/0", "w", ["a"])
    with pytest.raises(Refused, match="was unmasked for other clients before"):
        SiteStorage(tmp_path).allow_unmasking("r1", "0/0", "v", ["a"])
    path = tmp_path / "r1" / "unmasked.json"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Refused, match=r"unmasked.json is damaged"):
        storage.allow_unmasking("r1", "0/0", "v", ["a"])
    for content in ('{"0/0": ["a", "b"]}', "[]", '{"0/0": {"survivors": ["a"]}}'):  # an older form, and others
        path.write_text(content)
        with pytest.raises(Refused, match=r"unmasked.json is damaged"):
            storage.allow_unmasking("r1", "0/0", "v", ["a", "b"])


def test_only_without_proved_liars_is_a_sum_unmasked_for_fewer_clients(tmp_path: Path) -> None:
    storage = SiteStorage(tmp_path)
    storage.allow_unmasking("r1", "0/0", "v", ["a", "b", "c", "d"])
    storage.record_liar("r1", "0/0", "v", "d")
    for refused in (["a", "b", "d"], ["a", "b"], ["a", "b", "c", "e"], ["a", "b", "c", "d", "e"]):
        with pytest.raises(Refused, match="was unmasked for other clients before"):
            SiteStorage(tmp_path).allow_unmasking("r1", "0/0", "v", refused)
    SiteStorage(tmp_path).allow_unmasking("r1", "0/0", "v", ["a", "b", "c"])
    storage.allow_unmasking("r1", "1/0", "w", ["a", "b", "c", "d"])
    with pytest.raises(Refused, match="was unmasked for other clients before"):  # proved in that sum, not in this one
        storage.allow_unmasking("r1", "1/0", "w", ["a", "b", "c"])


def test_a_round_of_the_future_removes_no_state(tmp_path: Path) -> None:
    """One message of a server that lies would otherwise have taken a site's personal model."""
    storage = SiteStorage(tmp_path)
    for finished in (1, 2):
        storage.keep("r1", finished, {"x": torch.full((2,), float(finished))})
    assert storage.state("r1", 10**9) is None
    assert sorted(path.name for path in tmp_path.rglob("client-*")) == ["client-1.safetensors", "client-2.safetensors"]
    state = storage.state("r1", 2)
    assert state is not None
    assert torch.equal(state["x"], torch.full((2,), 2.0))
    assert [path.name for path in tmp_path.rglob("client-*")] == ["client-2.safetensors"]
