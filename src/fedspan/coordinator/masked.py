"""The trips of a round's secure sums, at the server: keys and shares before the vectors, unmasking after them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedspan import protocol
from fedspan.coordinator.trips import Trips
from fedspan.federation import Client
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.summing import Sum
from fedspan.sites import Question

_Read = Callable[[str, Mapping[str, Any], Sequence[Tensor]], Any]
_DAMAGED = (ValueError, KeyError, TypeError, IndexError)


@dataclass(frozen=True, slots=True)
class Setup:
    """The secure sums of one round, ready for vectors."""

    session: str
    aggregator: Any
    handed: Mapping[str, Mapping[str, bytes]]
    """Recipient -> sender -> what it shares with it, sealed."""


def set_up(
    trips: Trips, how: Sum, question: Question, head: Mapping[str, Any], clients: Sequence[Client]
) -> tuple[Setup, dict[str, str]]:
    """Have the clients agree on keys, and share their secrets, for all sums of this round.

    Parameters
    ----------
    head
        What every message of the exchange names.

    Returns
    -------
    tuple[Setup, dict]
        The sums, and what was wrong with whom.

    Raises
    ------
    ValueError
        When too few are left.
    """
    from fedspan.privacy.secure_sum import RoundAggregator  # which needs the extra `secure`

    session, threshold = secrets.token_hex(8), how.needed(len(clients))
    whole = f"{head['run']}/{question.round_num}/{session}".encode()
    aggregator = RoundAggregator(whole, threshold, question.place[1])
    problems: dict[str, str] = {}

    def collect(told: Mapping[str, Any], parcel: protocol.Parcel, to: Sequence[str], read: _Read) -> dict[str, Any]:
        found: dict[str, Any] = {}
        whole_head = {**head, "session": session, **told}
        contents = {c: protocol.encode({**whole_head, "counted": question.counted.get(c, 0)}, parcel) for c in to}
        for client_id, reply in trips.go(question, contents):
            try:
                if isinstance(reply, str):
                    raise ValueError(reply)
                found[client_id] = read(client_id, *reply)
            except _DAMAGED as error:
                problems[client_id] = " ".join(str(error).split())
        return found

    def advert(client_id: str, told: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
        content = protocol.get_bytes(tensors, told["keys"])
        aggregator.check_advert(client_id, content)
        return content

    def shares(client_id: str, told: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, bytes]:
        sealed = {other: protocol.get_bytes(tensors, place) for other, place in told["shares"].items()}
        aggregator.check_shares(client_id, sealed)
        return sealed

    asked = {"kind": "advertise", "num_sums": question.place[1]}
    adverts = collect(asked, protocol.Parcel(), [c.client_id for c in clients], advert)
    parcel = protocol.Parcel()
    keys = {name: protocol.put_bytes(parcel, content) for name, content in aggregator.keys(adverts).items()}
    sealed = collect({"kind": "share", "keys": keys, "threshold": threshold}, parcel, sorted(adverts), shares)
    return Setup(session, aggregator, aggregator.route(sealed)), problems


def unmasked(
    trips: Trips, question: Question, head: Mapping[str, Any], setup: Setup, adding: Any, tell: Callable[[str], None]
) -> Words:
    """The sum of the vectors that came, with the help of those who sent them.

    Raises
    ------
    ValueError
        When fewer than the threshold help.
    """
    survivors = adding.survivors()
    told = {"kind": "unmask", "session": setup.session, "index": question.place[0], "survivors": survivors}
    content = protocol.encode({**head, **told}, protocol.Parcel())
    answers: dict[str, bytes] = {}
    for client_id, reply in trips.go(question, dict.fromkeys(survivors, content)):
        try:
            if isinstance(reply, str):
                raise ValueError(reply)
            share = protocol.get_bytes(reply[1], reply[0]["unmask"])
            adding.check_answer(client_id, share)
            answers[client_id] = share
        except _DAMAGED as error:
            tell(f"{client_id} does not help to unmask the sum: {' '.join(str(error).split())}")
    total: Words = adding.total(answers)
    return total
