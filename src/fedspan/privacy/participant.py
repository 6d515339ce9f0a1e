"""The client's side of one secure sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedspan.privacy import primitives
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.primitives import SECRET, Ed25519PrivateKey
from fedspan.privacy.roster import SEALED, AdvertisedKeys, Roster, check_id, commitment
from fedspan.support.errors import FedspanError


class Participant:
    """One client in one sum: advertise, share, mask, unmask, in that order and each for a single list of clients.

    The vector x_u leaves as y_u = x_u + PRG(b_u) + Σ_{v>u} PRG(k_uv) - Σ_{v<u} PRG(k_uv) mod 2^64, where k_uv is the
    key that u and v agree on and b_u is u's own seed; the other clients hold shares of b_u and of u's private key.

    *Pair masks* PRG(k_uv) cancel in the sum of the clients that stay. Those shared with a client that left do not, so
    its private key is restored from the shares. *The self-mask* PRG(b_u) is needed as well: if a client's vector only
    came late, after its private key was restored, the pair masks alone would no longer hide it. Hence each client
    reveals, of every other, one share only: of the seed if that client stayed, of the private key if it left. Both
    together would uncover its vector.

    A server that follows the protocol but is curious learns the sum and who took part, and nothing else about the
    vectors.

    Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    doi 10.1145/3133956.3133982. Differences: clients commit to their seeds, so that wrong shares are noticed; all
    keys and sealed shares are bound to the whole roster; the round of consistency signatures against an actively
    malicious server is left out, and the threshold must be more than half instead.

    Parameters
    ----------
    session
        Names this one sum: run, round, exchange. Nothing of another session is accepted.
    num_words
        Length of the vector; None: not known yet.
    signer, trusted
        The site's Ed25519 identity, and the public keys of the others' identities, as raw bytes by client. With them
        the server cannot present its own keys as a client's. Both or neither.

    Raises
    ------
    FedspanError
        From every method, in one line, when a message is not what this sum needs. Nothing is revealed then.
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
            raise FedspanError("signer and trusted go together: expected both or neither")
        self.session, self.client_id, self.num_words = session, check_id(client_id), num_words
        self._trusted = trusted
        self._channel, self._private, self._seed = (primitives.new_secret() for _ in range(3))
        keys = primitives.public_key(self._channel), primitives.public_key(self._private)
        self._advert = AdvertisedKeys(*keys, commitment(session, client_id, self._seed)).sign(
            session, client_id, signer
        )
        self._roster: Roster | None = None
        self._held: dict[str, bytes] = {}
        """Client -> its two shares held here, seed before private key; these clients take part in the masks."""
        self._received = self._masked = False
        self._answered: tuple[tuple[str, ...], bytes] | None = None

    def advertise(self) -> bytes:
        """Return this client's public keys for this sum."""
        return self._advert

    def share(self, keys: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Return shares of this client's two secrets for each of the others, sealed so that only they can read them.

        Parameters
        ----------
        keys
            Advertised by all clients, this one included.
        threshold
            How many must stay for the sum to be unmasked.
        """
        if self._roster is not None:
            raise FedspanError(f"{self.client_id!r} has shared its secrets already: expected once in a sum")
        if keys.get(self.client_id) != self._advert:
            raise FedspanError(f"the server's copy of the keys of {self.client_id!r} is not what it advertised")
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
        """Take the shares that the others have for this client; clients without one have no part in the masks."""
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
            well_formed = isinstance(sealed, bytes) and len(sealed) == SEALED
            content = primitives.unseal(key, sealed, context) if well_formed else None
            if content is None:
                raise FedspanError(f"the shares from {other!r} were not sealed for {self.client_id!r} in this sum")
            opened[other] = content
        self._held |= opened
        self._received = True

    def mask(self, vector: Words, shares: Mapping[str, bytes] | None = None) -> Words:
        """Return the vector under its masks, which may leave the site.

        Parameters
        ----------
        vector
            (num_words,) of uint64, see `FixedPoint`; left as it is.
        shares
            As `receive` takes them; None where it was called already.
        """
        if self._masked:
            raise FedspanError(f"{self.client_id!r} has masked its vector already: expected once in a sum")
        self._check_vector(vector)
        if shares is not None:
            self.receive(shares)
        roster = self._sharing()
        if not self._received:
            raise FedspanError(f"{self.client_id!r} has no shares of the others: expected them before its vector")
        # Before anything leaves, even if what follows fails: the difference of two vectors under the same masks would
        # be bare.
        self._masked = True
        plus, minus = self._mask_keys(roster)
        masked = vector.copy()
        primitives.add_masks(masked, plus, minus)
        self._seed = self._private = self._channel = b""  # from here on only the others' shares of them are needed
        return masked

    def _check_vector(self, vector: Words) -> None:
        if vector.dtype != np.uint64 or vector.ndim != 1 or self.num_words not in (None, len(vector)):
            length = "" if self.num_words is None else f" of {self.num_words} words"
            raise FedspanError(f"a vector of {vector.dtype} in shape {vector.shape}: expected uint64{length}")

    def _mask_keys(self, roster: Roster) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of the masks to add and of those to subtract; of two clients, the first by id adds."""
        keys = {v: roster.pair_mask_key(self._private, self.client_id, v) for v in self._held if v != self.client_id}
        plus = [key for other, key in keys.items() if self.client_id < other]
        minus = [key for other, key in keys.items() if self.client_id > other]
        return [roster.self_mask_key(self._seed, self.client_id), *plus], minus

    def unmask(self, survivors: Sequence[str]) -> bytes:
        """Return one share for each client of the masks: of its seed if it stayed, of its private key if it left.

        Parameters
        ----------
        survivors
            Clients whose masked vectors the server has. A second call is answered only where it names the same ones:
            two lists would yield both shares of the clients in which they differ.
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
        # The sum of a few clients says much about each of them.
        if len(stayed) < roster.threshold:
            raise FedspanError(f"{len(stayed)} survivors: expected at least {roster.threshold} to unmask a sum")
        parts = [both[:SECRET] if other in stayed else both[SECRET:] for other, both in sorted(self._held.items())]
        self._answered = stayed, roster.unmasking_header(self.client_id, stayed) + b"".join(parts)
        self._held = {}
        return self._answered[1]

    def _sharing(self) -> Roster:
        if self._roster is None:
            raise FedspanError(f"{self.client_id!r} has shared no secrets yet: expected the others' keys first")
        return self._roster
