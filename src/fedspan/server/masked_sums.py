"""The messages of secure sums on the server: keys and shares before the vectors, unmasking after them.

Keys and shares are exchanged for several rounds at once, fresh ones for every sum: two round trips less in each.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedspan.federation.clients import Client
from fedspan.federation.exchange import Question
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.running_sum import SumSettings
from fedspan.server.checks import DAMAGED
from fedspan.server.requests import Requests
from fedspan.support.errors import FedspanError
from fedspan.wire import protocol

_Read = Callable[[str, Mapping[str, Any], Sequence[Tensor]], Any]


@dataclass(slots=True)
class Setup:
    """Secure sums that are ready for vectors."""

    session: str
    aggregator: Any
    handed: dict[str, dict[str, bytes]]
    """Recipient -> sender -> what it shares with it, sealed; of those who have not been told yet."""
    clients: frozenset[str]
    left: list[int]
    """The sums that have not been taken yet."""
    stale: bool = False
    """Somebody has no keys for it any more: the next round begins with new ones."""

    def serves(self, clients: Sequence[Client], num_sums: int) -> bool:
        """Whether it is good for a round of these clients. One that is missing counts as dropped out."""
        ids = {client.client_id for client in clients}
        return not self.stale and ids <= self.clients and len(self.left) >= num_sums


def set_up(
    requests: Requests,
    how: SumSettings,
    question: Question,
    head: Mapping[str, Any],
    clients: Sequence[Client],
    rounds: int,
) -> tuple[Setup, dict[str, str]]:
    """Have the clients agree on keys, and share their secrets, for all sums of this round and those after it.

    Parameters
    ----------
    head
        What every message of the exchange names.
    rounds
        For how many rounds.

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
    num_sums = rounds * question.place[1]
    aggregator = RoundAggregator(whole, threshold, num_sums)
    problems: dict[str, str] = {}

    def collect(header: Mapping[str, Any], parcel: protocol.Parcel, to: Sequence[str], read: _Read) -> dict[str, Any]:
        found: dict[str, Any] = {}
        whole_head = {**head, "session": session, **header}
        contents = {c: protocol.encode({**whole_head, "counted": question.counted.get(c, 0)}, parcel) for c in to}
        for client_id, reply in requests.go(question, contents):
            try:
                if isinstance(reply, str):
                    raise FedspanError(reply)
                found[client_id] = read(client_id, *reply)
            except DAMAGED as error:
                problems[client_id] = " ".join(str(error).split())
        return found

    def advert(client_id: str, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
        content = protocol.get_bytes(tensors, header["keys"])
        aggregator.check_advert(client_id, content)
        return content

    def shares(client_id: str, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, bytes]:
        sealed = {other: protocol.get_bytes(tensors, place) for other, place in header["shares"].items()}
        aggregator.check_shares(client_id, sealed)
        return sealed

    asked = {"kind": "advertise", "num_sums": num_sums}
    adverts = collect(asked, protocol.Parcel(), [c.client_id for c in clients], advert)
    parcel = protocol.Parcel()
    keys = {name: protocol.put_bytes(parcel, content) for name, content in aggregator.keys(adverts).items()}
    sealed = collect({"kind": "share", "keys": keys, "threshold": threshold}, parcel, sorted(adverts), shares)
    handed: dict[str, dict[str, bytes]] = aggregator.route(sealed)
    return Setup(session, aggregator, handed, frozenset(handed), list(range(num_sums))), problems


def unmasked(
    requests: Requests,
    question: Question,
    head: Mapping[str, Any],
    setup: Setup,
    index: int,
    adding: Any,
    notify: Callable[[str], None],
) -> Words:
    """The sum of the vectors that came, with the help of those who sent them.

    Parameters
    ----------
    setup
        Stale from here on when somebody who sent a vector does not help: it may have lost its keys.
    index
        Which of its sums.
    adding
        The aggregator of that sum.

    Raises
    ------
    ValueError
        When fewer than the threshold help.
    """
    survivors = adding.survivors()
    header = {"kind": "unmask", "session": setup.session, "index": index, "survivors": survivors}
    content = protocol.encode({**head, **header}, protocol.Parcel())
    answers: dict[str, bytes] = {}
    for client_id, reply in requests.go(question, dict.fromkeys(survivors, content)):
        try:
            if isinstance(reply, str):
                raise FedspanError(reply)
            share = protocol.get_bytes(reply[1], reply[0]["unmask"])
            adding.check_answer(client_id, share)
            answers[client_id] = share
        except DAMAGED as error:
            setup.stale = True
            notify(f"{client_id} does not help to unmask the sum: {' '.join(str(error).split())}")
    total: Words = adding.total(answers)
    return total
