"""Sums of which the server learns nothing but the sum: a single one, several after one set-up, or all in one process.

The two sides are `Participant` and `Aggregator`; they exchange bytes, and one vector of 64-bit words per client. A sum
takes five round trips: keys, shares, delivery of the shares, vectors, unmasking; against a malicious server one more,
of signed lists of survivors before the unmasking. `RoundParticipant` and
`RoundAggregator` make the first three once for several sums, each of which has its own keys and secrets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from typing import TypeVar

from fedspan.privacy import primitives
from fedspan.privacy.aggregator import Aggregator
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.participant import Participant
from fedspan.privacy.primitives import Ed25519PrivateKey
from fedspan.privacy.roster import SumFailed
from fedspan.support.errors import FedspanError

__all__ = [
    "Aggregator",
    "Participant",
    "RoundAggregator",
    "RoundParticipant",
    "SumFailed",
    "sum_in_process",
]


T = TypeVar("T")


class RoundParticipant:
    """One client in `num_sums` sums of a round: a `Participant` for each, set up together.

    Parameters
    ----------
    session
        Names the round: run and round number. The sums' own sessions are derived from it.
    num_sums
        At least one.
    signer, trusted, malicious_server
        As of `Participant`.
    """

    def __init__(
        self,
        session: bytes,
        client_id: str,
        num_sums: int,
        signer: Ed25519PrivateKey | None = None,
        trusted: Mapping[str, bytes] | None = None,
        malicious_server: bool = False,
    ) -> None:
        # Keys of its own for every sum: masks that served two sums would cancel in the difference of two vectors.
        self.sums = tuple(
            Participant(name, client_id, signer=signer, trusted=trusted, malicious_server=malicious_server)
            for name in _sessions(session, num_sums)
        )

    def advertise(self) -> bytes:
        """Return this client's keys for all the sums."""
        return primitives.pack(*(one.advertise() for one in self.sums))

    def share(self, keys: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Return shares of this client's secrets of all the sums, sealed for each of the others."""
        by_sum = _split(keys, len(self.sums))
        return _joined([one.share(by_sum[i], threshold) for i, one in enumerate(self.sums)])

    def receive(self, shares: Mapping[str, bytes]) -> list[str]:
        """Take the shares that the others have for this client; return the clients whose shares for a sum are false."""
        by_sum = _split(shares, len(self.sums))
        false = {dealer for i, one in enumerate(self.sums) for dealer in one.receive(by_sum[i])}
        for one in self.sums:
            one.discard(false)
        return sorted(false)

    def settle(self, members: Sequence[str]) -> None:
        """Fix the clients of the masks of all the sums."""
        for one in self.sums:
            one.settle(members)

    @property
    def members(self) -> tuple[str, ...]:
        """Return the clients of the masks."""
        return self.sums[0].members

    @property
    def is_settled(self) -> bool:
        """Return whether the clients of the masks are fixed."""
        return self.sums[0].is_settled

    def mask(self, index: int, vector: Words, terms: bytes = b"") -> Words:
        """Return the vector of one sum, under its masks."""
        return _numbered(self.sums, index).mask(vector, terms=terms)

    def sign_survivors(self, index: int, survivors: Sequence[str]) -> bytes:
        """Return this client's signature of the survivors of one sum."""
        return _numbered(self.sums, index).sign_survivors(survivors)

    def accept_survivors(self, index: int, survivors: Sequence[str], signatures: Mapping[str, bytes]) -> None:
        """Take the signatures of the survivors of one sum: see `Participant.accept_survivors`."""
        _numbered(self.sums, index).accept_survivors(survivors, signatures)

    def unmask(self, index: int, survivors: Sequence[str]) -> bytes:
        """Return the shares that unmask one sum."""
        return _numbered(self.sums, index).unmask(survivors)

    def convicts(
        self, index: int, dealer: str, commitments: Mapping[str, bytes], signature: bytes, shares: Mapping[str, bytes]
    ) -> bool:
        """Return whether a client is shown to have dealt false shares for one sum: see `Participant.convicts`."""
        return _numbered(self.sums, index).convicts(dealer, commitments, signature, shares)


class RoundAggregator:
    """The server's side of `num_sums` sums of a round: an `Aggregator` for each, set up together.

    A client that missed one sum may take part in the next, as the others hold its shares for it already.
    """

    def __init__(
        self, session: bytes, threshold: int, num_sums: int, trusted: Mapping[str, bytes] | None = None
    ) -> None:
        self.sums = tuple(Aggregator(name, threshold, trusted=trusted) for name in _sessions(session, num_sums))

    def check_advert(self, client_id: str, content: bytes, earlier: Mapping[str, bytes] | None = None) -> None:
        """Raise a FedspanError where one client's keys cannot be passed on to the others, as `Aggregator` says."""
        num_sums = len(self.sums)
        before, by_sum = _split(earlier or {}, num_sums), _split({client_id: content}, num_sums)
        for i, one in enumerate(self.sums):
            one.check_advert(client_id, by_sum[i][client_id], before[i])

    def keys(self, advertised: Mapping[str, bytes]) -> dict[str, bytes]:
        """Take the advertised keys of all clients; return those to send to each of them, with the threshold."""
        by_sum = _split(advertised, len(self.sums))
        trial = tuple(map(copy, self.sums))  # a bad client must not leave some of the sums set up and some not
        keys = _joined([one.keys(by_sum[i]) for i, one in enumerate(trial)])
        self.sums = trial
        return keys

    def check_shares(self, sender: str, shares: Mapping[str, bytes]) -> None:
        """Raise a FedspanError where one client's shares are not for each of the others, or of another size."""
        for one, part in zip(self.sums, _split(shares, len(self.sums)), strict=True):
            one.check_shares(sender, part)

    def route(self, sent: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """Take the sealed shares by sender and recipient; return them by recipient and sender."""
        by_sum = {sender: _split(shares, len(self.sums)) for sender, shares in sent.items()}
        trial = tuple(map(copy, self.sums))  # as in `keys`: all of the sums take the shares, or none does
        routed = [one.route({sender: by_sum[sender][i] for sender in by_sum}) for i, one in enumerate(trial)]
        self.sums = trial
        return {to: _joined([each[to] for each in routed]) for to in routed[0]}

    def settle(self, without: Mapping[str, Collection[str]]) -> dict[str, str]:
        """Fix the clients of the masks of all the sums; return those that are left out, and why."""
        left: dict[str, str] = {}
        trial = tuple(map(copy, self.sums))
        for one in trial:
            left |= one.settle(without)
        self.sums = trial
        return left

    @property
    def members(self) -> tuple[str, ...]:
        """Return the clients of the masks."""
        return self.sums[0].members

    def sum(self, index: int, num_words: int, terms: bytes = b"") -> Aggregator:
        """Return one of the sums, ready for vectors of `num_words` words under these terms; once for each."""
        one = _numbered(self.sums, index)
        one.expect(num_words, terms)
        return one


def sum_in_process(
    vectors: Mapping[str, Words],
    threshold: int,
    session: bytes,
    lost: Collection[str] = (),
    late: Collection[str] = (),
    watch: Callable[[str, Words], None] | None = None,
) -> Words:
    """Run the whole protocol between simulated clients.

    Parameters
    ----------
    vectors
        By client, (num_words,) of uint64, all of one length.
    threshold
        How many must stay: more than half of the clients, at least two.
    session
        Names the sum.
    lost
        Clients that disappear before they mask: they are not in the sum.
    late
        Clients that disappear after they have sent their vector: they are in the sum, and do not help to unmask it.
    watch
        Called with each client's masked vector, as the server sees it.

    Returns
    -------
    np.ndarray
        Σ over all but the lost, mod 2^64: (num_words,) of uint64.

    Raises
    ------
    SumFailed
        When fewer than `threshold` stayed.
    FedspanError
        When lengths or types differ, or the threshold is no majority.
    """
    unknown = sorted({*lost, *late} - set(vectors))
    if unknown:
        raise FedspanError(f"lost or late clients {unknown}: expected some of {sorted(vectors)}")
    server = Aggregator(session, threshold)
    clients = {client_id: Participant(session, client_id) for client_id in sorted(vectors)}
    keys = server.keys({client_id: one.advertise() for client_id, one in clients.items()})
    handed = server.route({client_id: one.share(keys, threshold) for client_id, one in clients.items()})
    server.expect(len(next(iter(vectors.values()))))
    for client_id, one in clients.items():
        if client_id in lost:
            continue
        masked = one.mask(vectors[client_id], handed[client_id])
        if watch is not None:
            watch(client_id, masked)
        server.add(client_id, masked)
    survivors = server.survivors()
    return server.total({i: clients[i].unmask(survivors) for i in survivors if i not in late})


def _sessions(session: bytes, num_sums: int) -> list[bytes]:
    if num_sums < 1:
        raise FedspanError(f"num_sums = {num_sums}: expected at least 1")
    # Keys, shares and masks are bound to the session of their sum, so those of one sum cannot be replayed in another.
    return [primitives.pack(session, b"sum", str(i).encode()) for i in range(num_sums)]


def _numbered(sums: Sequence[T], index: int) -> T:
    if not 0 <= index < len(sums):
        raise FedspanError(f"sum {index} of {len(sums)}: expected 0 to {len(sums) - 1}")
    return sums[index]


def _split(by_client: Mapping[str, bytes], num_sums: int) -> list[dict[str, bytes]]:
    """Return the parts of the clients' messages by sum, then by client."""
    parts: dict[str, list[bytes]] = {}
    for client_id, content in by_client.items():
        try:
            parts[client_id] = primitives.unpack(content, num_sums)
        except FedspanError as error:
            raise FedspanError(f"the message of {client_id!r} for {num_sums} sums is malformed: {error}") from None
    return [{client_id: of_client[i] for client_id, of_client in parts.items()} for i in range(num_sums)]


def _joined(by_sum: Sequence[Mapping[str, bytes]]) -> dict[str, bytes]:
    """Return one message for each client, of its parts for each of the sums."""
    return {client_id: primitives.pack(*(part[client_id] for part in by_sum)) for client_id in by_sum[0]}
