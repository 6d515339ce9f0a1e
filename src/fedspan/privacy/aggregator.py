"""The server's side of one secure sum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedspan.privacy import primitives
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.primitives import SECRET
from fedspan.privacy.roster import SEALED, AdvertisedKeys, Roster, SumFailed, check_id, commitment, too_few
from fedspan.support.errors import FedspanError


class Aggregator:
    """Collects one sum, Σ x_u over the clients that stay, from their masked vectors: see `Participant`.

    It holds one running sum, never the vectors of two clients.

    Parameters
    ----------
    session
        The same as the participants'.
    threshold
        How many clients must stay: more than half of those that advertise, at least two.
    num_words
        Length of the vectors; None: `expect` sets it later.
    trusted
        Public identity keys by client. A badly signed key is then refused here, with its client's name.

    Raises
    ------
    SumFailed
        When fewer than `threshold` clients completed a step.
    FedspanError
        Naming the client, when its message is not valid. Nothing has changed then: continue without it. The `check_`
        methods say the same of one client's message alone, before the others' have arrived.
    """

    def __init__(
        self, session: bytes, threshold: int, num_words: int | None = None, trusted: Mapping[str, bytes] | None = None
    ) -> None:
        self.session, self.threshold = session, threshold
        self._trusted = trusted
        self._roster: Roster | None = None
        self._sharers: tuple[str, ...] = ()
        self._added: set[str] = set()
        self._total: Words | None = None
        self._closed = self._done = False
        if num_words is not None:
            self.expect(num_words)

    def expect(self, num_words: int) -> None:
        """Fix the length of the vectors, once."""
        if self._total is not None or num_words < 1:
            raise ValueError(f"num_words = {num_words}: expected a positive number, once")
        self._total = np.zeros(num_words, np.uint64)

    def check_advert(self, client_id: str, content: bytes) -> None:
        """Raise a FedspanError where one client's keys cannot be passed on to the others."""
        AdvertisedKeys.read(content, self.session, check_id(client_id), self._trusted)

    def keys(self, advertised: Mapping[str, bytes]) -> dict[str, bytes]:
        """Take the advertised keys of all clients; return those to send to each of them, with the threshold."""
        if self._roster is not None:
            raise ValueError("the keys of this sum were collected already: expected once")
        for client_id in advertised:
            check_id(client_id)
        if len(advertised) < self.threshold:
            raise too_few(len(advertised), self.threshold, "advertised keys")
        self._roster = Roster.read(self.session, advertised, self.threshold, self._trusted)
        return dict(sorted(advertised.items()))

    def check_shares(self, sender: str, shares: Mapping[str, bytes]) -> None:
        """Raise a FedspanError where one client's shares are not for each of the others, or of another size.

        They are sealed, so the server cannot check more.
        """
        ids = self._listed().ids
        if sender not in ids or set(shares) != set(ids) - {sender}:
            raise FedspanError(f"shares from {sender!r}: expected one for each of the others in {list(ids)}")
        if any(not isinstance(s, bytes) or len(s) != SEALED for s in shares.values()):
            raise FedspanError(f"shares from {sender!r}: expected {SEALED} bytes each")

    def route(self, sent: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """Take the sealed shares by sender and recipient; return them by recipient and sender."""
        if self._sharers:
            raise ValueError("the shares of this sum were routed already: expected once")
        for sender, shares in sorted(sent.items()):
            self.check_shares(sender, shares)
        if len(sent) < self.threshold:
            raise too_few(len(sent), self.threshold, "shared their secrets")
        self._sharers = tuple(sorted(sent))
        return {to: {sender: sent[sender][to] for sender in self._sharers if sender != to} for to in self._sharers}

    def add(self, client_id: str, masked: Words) -> None:
        """Add one client's masked vector to the running sum."""
        if self._total is None:
            raise ValueError("the length of the vectors is not known: expected a call of expect first")
        if client_id not in self._sharers:
            raise FedspanError(f"a vector from {client_id!r}: expected one of {list(self._sharers)}, which have shared")
        if client_id in self._added:
            raise FedspanError(f"a second vector from {client_id!r}: expected one")
        if self._closed:
            raise FedspanError(f"the vector of {client_id!r} is late: the survivors were named already")
        if masked.dtype != np.uint64 or masked.shape != self._total.shape:
            raise FedspanError(
                f"the vector of {client_id!r} is {masked.dtype} in shape {masked.shape}: expected uint64 in "
                f"{self._total.shape}"
            )
        self._total += masked
        self._added.add(client_id)

    def survivors(self) -> list[str]:
        """Return the clients whose vectors are in the sum, for which each of them is asked to unmask.

        Nothing is added afterwards: no answer would unmask a vector that came later.
        """
        if len(self._added) < self.threshold:
            raise too_few(len(self._added), self.threshold, "sent their vectors")
        self._closed = True
        return sorted(self._added)

    def check_answer(self, client_id: str, content: bytes) -> None:
        """Raise a FedspanError where one survivor's answer is of another sum or for other survivors.

        Whether its shares are right shows only in `total`.
        """
        self._read(client_id, content)

    def total(self, answers: Mapping[str, bytes]) -> Words:
        """Return the sum without masks, from the survivors' answers: (num_words,) of uint64, once."""
        roster = self._listed()
        if self._done or self._total is None:
            raise ValueError("this sum was unmasked already: expected once")
        survivors = self.survivors()
        secrets = self._restored_secrets(roster, answers)
        self._done = True
        plus: list[bytes] = []
        minus: list[bytes] = []
        for client_id, secret in secrets.items():
            if client_id in self._added:
                minus.append(roster.self_mask_key(secret, client_id))
                continue
            # A survivor v < u has added the mask that it shares with u, one above has subtracted it.
            for other in survivors:
                (minus if other < client_id else plus).append(roster.pair_mask_key(secret, client_id, other))
        primitives.add_masks(self._total, plus, minus)
        return self._total

    def _restored_secrets(self, roster: Roster, answers: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return, checked, the seed of each client that stayed and the private key of each that left."""
        shares = {client_id: self._read(client_id, content) for client_id, content in sorted(answers.items())}
        if len(shares) < self.threshold:
            raise too_few(len(shares), self.threshold, "helped to unmask")
        helpers = list(shares)[: self.threshold]
        secrets = {u: primitives.combine({roster.share_index(v): shares[v][u] for v in helpers}) for u in self._sharers}
        for client_id, secret in secrets.items():
            self._check(client_id, secret)
        return secrets

    def _read(self, client_id: str, content: bytes) -> dict[str, bytes]:
        """Return the shares of one answer, by the client of the masks that each belongs to."""
        if client_id not in self._added:
            raise FedspanError(f"an answer from {client_id!r}: expected one of {sorted(self._added)}")
        size = SECRET * (1 + len(self._sharers))
        if not isinstance(content, bytes) or len(content) != size:
            raise FedspanError(f"the answer of {client_id!r}: expected {size} bytes")
        if content[:SECRET] != self._listed().unmasking_header(client_id, self._added):
            raise FedspanError(f"the answer of {client_id!r} is of another sum, or for other survivors")
        return {u: content[SECRET * i : SECRET * (i + 1)] for i, u in enumerate(self._sharers, 1)}

    def _check(self, client_id: str, secret: bytes) -> None:
        """Raise SumFailed where a restored secret is not the one advertised, so that no sum is ever wrong."""
        advert = self._listed().adverts[client_id]
        if client_id in self._added:
            fits = commitment(self.session, client_id, secret) == advert.commitment
        else:
            fits = primitives.public_key(secret) == advert.mask_key
        if not fits:
            raise SumFailed(f"the shares of {client_id!r} that came do not fit its keys: the sum is given up")

    def _listed(self) -> Roster:
        if self._roster is None:
            raise ValueError("no keys were collected: expected a call of keys first")
        return self._roster
