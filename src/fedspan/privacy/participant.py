"""A site's side of one secure sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedspan.privacy import primitives
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.primitives import SECRET, Ed25519PrivateKey
from fedspan.privacy.roster import SEALED, Advert, Roster, check_id, commitment
from fedspan.support.errors import FedspanError


class Participant:
    """One client in one sum: advertise, share, mask, unmask, in that order and each for one list of others only.

    The vector x_u leaves as y_u = x_u + PRG(b_u) + Σ_{v>u} PRG(k_uv) - Σ_{v<u} PRG(k_uv) mod 2^64, where k_uv is what
    u and v agree on and b_u is u's own seed; shares of b_u and of u's private key lie with the others. After that, of
    whoever stayed the share of b is told, of whoever left that of the private key, and of nobody both.

    Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    doi 10.1145/3133956.3133982. Differences: the seeds are committed to, so that wrong shares are noticed; all keys
    and sealed shares are bound to the whole roster; the round of consistency signatures against an actively lying
    server is left out, and the threshold must be more than half instead.

    Parameters
    ----------
    session
        Names this one sum: run, round, exchange. Nothing of another session is accepted.
    num_words
        Length of the vector; none: not known yet.
    signer, trusted
        The site's Ed25519 identity, and the public ones of all the others, as raw bytes by client. With them the
        server cannot pass its own keys off as a client's. Both or neither.

    Raises
    ------
    ValueError
        From every function, in one line, when what was brought to it is not what this sum needs. Nothing is revealed.
    """

    def __init__(
        self,
        session: bytes,
        client_id: str,
        num_words: int | None = None,
        signer: Ed25519PrivateKey | None = None,
        trusted: Mapping[str, bytes] | None = None,
    ) -> None:
        if (signer is None) != (trusted is None):
            raise FedspanError("signer and trusted go together: signatures that nobody checks protect nobody")
        self.session, self.client_id, self.num_words = session, check_id(client_id), num_words
        self._trusted = trusted
        self._channel, self._private, self._seed = (primitives.new_secret() for _ in range(3))
        keys = primitives.public_key(self._channel), primitives.public_key(self._private)
        self._advert = Advert(*keys, commitment(session, client_id, self._seed)).sign(session, client_id, signer)
        self._roster: Roster | None = None
        self._held: dict[str, bytes] = {}
        """Whose two shares are held: those who take part in the masks."""
        self._received = self._masked = False
        self._answered: tuple[tuple[str, ...], bytes] | None = None

    def advertise(self) -> bytes:
        """This client's public keys for this sum."""
        return self._advert

    def share(self, keys: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Shares of this client's two secrets for each of the others, sealed so that only they can read them.

        Parameters
        ----------
        keys
            What everyone advertised, this client included.
        threshold
            How many must stay for the sum to be unmasked.
        """
        if self._roster is not None:
            raise FedspanError(f"{self.client_id!r} has shared its secrets already: expected once in a sum")
        if keys.get(self.client_id) != self._advert:
            raise FedspanError(f"what is told as the keys of {self.client_id!r} is not what it advertised")
        roster = Roster.read(self.session, keys, threshold, self._trusted)
        seeds = primitives.split(self._seed, threshold, len(roster.ids))
        privates = primitives.split(self._private, threshold, len(roster.ids))
        sealed = {}
        for other, seed, private in zip(roster.ids, seeds, privates, strict=True):
            if other == self.client_id:
                self._held[other] = seed + private
                continue
            key, context = roster.channel(self._channel, other, self.client_id, other)
            sealed[other] = primitives.seal(key, seed + private, context)
        self._roster = roster
        return sealed

    def receive(self, shares: Mapping[str, bytes]) -> None:
        """Take what the others have shared with this client; who is not among them has no part in the masks."""
        roster = self._sharing()
        if self._received:
            raise FedspanError(f"{self.client_id!r} has received its shares already: expected once in a sum")
        if self.client_id in shares or not set(shares) <= set(roster.ids):
            raise FedspanError(f"shares from {sorted(shares)}: expected some of the others in {list(roster.ids)}")
        if len(shares) + 1 < roster.threshold:
            raise FedspanError(f"shares from {len(shares)} others: expected at least {roster.threshold - 1}")
        opened = {}
        for other, sealed in sorted(shares.items()):
            key, context = roster.channel(self._channel, other, other, self.client_id)
            sound = isinstance(sealed, bytes) and len(sealed) == SEALED
            content = primitives.unseal(key, sealed, context) if sound else None
            if content is None:
                raise FedspanError(f"the shares from {other!r} were not sealed for {self.client_id!r} in this sum")
            opened[other] = content
        self._held |= opened
        self._received = True

    def mask(self, vector: Words, shares: Mapping[str, bytes] | None = None) -> Words:
        """The vector under its masks: what leaves the site.

        Parameters
        ----------
        vector
            (num_words,) of uint64, see `FixedPoint`; left as it is.
        shares
            As `receive` takes them; none where it did already.
        """
        if self._masked:
            raise FedspanError(f"{self.client_id!r} has masked its vector already: expected once in a sum")
        if vector.dtype != np.uint64 or vector.ndim != 1 or self.num_words not in (None, len(vector)):
            told = "" if self.num_words is None else f" of {self.num_words} words"
            raise FedspanError(f"a vector of {vector.dtype} in shape {vector.shape}: expected uint64{told}")
        if shares is not None:
            self.receive(shares)
        roster = self._sharing()
        if not self._received:
            raise FedspanError(f"{self.client_id!r} has no shares of the others: expected them before its vector")
        self._masked = True  # before anything leaves: never twice, whatever happens
        keys = {v: roster.pair_key(self._private, self.client_id, v) for v in self._held if v != self.client_id}
        plus = [key for other, key in keys.items() if self.client_id < other]
        minus = [key for other, key in keys.items() if self.client_id > other]
        masked = vector.copy()
        primitives.add_masks(masked, [roster.own_key(self._seed, self.client_id), *plus], minus)
        self._seed = self._private = self._channel = b""  # what is needed from here on lies with the others
        return masked

    def unmask(self, survivors: Sequence[str]) -> bytes:
        """For each client of the masks one share: of its seed where it stayed, of its private key where it left.

        Parameters
        ----------
        survivors
            Whose masked vectors the server has. A second call is answered only where it names the same ones.
        """
        if not self._masked:
            raise FedspanError(f"{self.client_id!r} has masked nothing yet: expected its vector before the unmasking")
        stayed = tuple(sorted(survivors))
        if self._answered is not None:
            if stayed != self._answered[0]:
                raise FedspanError(f"{self.client_id!r} has unmasked for other survivors: expected the same list again")
            return self._answered[1]
        roster = self._sharing()
        if len(set(stayed)) != len(stayed) or not set(stayed) <= set(self._held):
            raise FedspanError(f"survivors {list(stayed)}: expected some of {sorted(self._held)}, each once")
        if self.client_id not in stayed:
            raise FedspanError(f"survivors {list(stayed)}: expected {self.client_id!r}, which is asked, among them")
        if len(stayed) < roster.threshold:
            raise FedspanError(f"{len(stayed)} survivors: expected at least {roster.threshold} to unmask a sum")
        parts = [both[:SECRET] if other in stayed else both[SECRET:] for other, both in sorted(self._held.items())]
        self._answered = stayed, roster.answer(self.client_id, stayed) + b"".join(parts)
        self._held = {}
        return self._answered[1]

    def _sharing(self) -> Roster:
        if self._roster is None:
            raise FedspanError(f"{self.client_id!r} has shared no secrets yet: expected the others' keys first")
        return self._roster
