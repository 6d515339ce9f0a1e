"""The client's side of one secure sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedspan.privacy import primitives
from fedspan.privacy.consistency import Consistency, check_malicious_threshold
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.primitives import SECRET, Ed25519PrivateKey
from fedspan.privacy.roster import COMMITTED, SEALED, AdvertisedKeys, Roster, check_id, commitment
from fedspan.support.errors import FedspanError


class Participant:
    """One client in one sum: advertise, share, receive, settle, mask, unmask, in that order and each once.

    The vector x_u leaves as y_u = x_u + PRG(b_u) + Σ_{v>u} PRG(k_uv) - Σ_{v<u} PRG(k_uv) mod 2^64, where k_uv is the
    key that u and v agree on and b_u is u's own seed; the other clients hold shares of b_u and of u's private key.

    *Pair masks* PRG(k_uv) cancel in the sum of the clients that stay. Those shared with a client that left do not, so
    its private key is restored from the shares. *The self-mask* PRG(b_u) is needed as well: if a client's vector only
    came late, after its private key was restored, the pair masks alone would no longer hide it. Hence each client
    reveals, of every other, one share only: of the seed if that client stayed, of the private key if it left. Both
    together would uncover its vector.

    A server that follows the protocol but is curious learns the sum and who took part, and nothing else about the
    vectors. One that tells clients different things about the sum (see `SumTerms`) gets masks that do not cancel.

    Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning",
    doi 10.1145/3133956.3133982. Differences: clients commit to their seeds and to every share, so that wrong ones are
    noticed; all keys and sealed shares are bound to the whole roster, and the masks to the terms of the sum; the round
    of consistency signatures is made only against a server that may be malicious (`fedspan.privacy.consistency`).

    Parameters
    ----------
    session
        Names this one sum: run, round, exchange. Nothing of another session is accepted.
    num_words
        Length of the vector; None: not known yet.
    signer, trusted
        The site's Ed25519 identity, and the public keys of the others' identities, as raw bytes by client. With them
        the server cannot present its own keys as a client's. Both or neither.
    malicious_server
        Unmask only what enough clients have signed to be the same list of survivors: `sign_survivors` and
        `accept_survivors` come between `mask` and `unmask`. It needs an identity, and a threshold above two thirds.

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
        malicious_server: bool = False,
    ) -> None:
        if (signer is None) != (trusted is None):
            raise FedspanError("signer and trusted go together: expected both or neither")
        self.session, self.client_id, self.num_words = session, check_id(client_id), num_words
        self._signer, self._trusted = signer, trusted
        self._consistency = Consistency(client_id, signer, trusted) if malicious_server else None
        self._channel, self._private, self._seed = (primitives.new_secret() for _ in range(3))
        keys = primitives.public_key(self._channel), primitives.public_key(self._private)
        self._advert = AdvertisedKeys(*keys, commitment(session, client_id, self._seed)).sign(
            session, client_id, signer
        )
        self._roster: Roster | None = None
        self._held: dict[str, bytes] = {}
        """Client -> its two shares held here, seed before private key."""
        self._dealers: frozenset[str] | None = None
        """Clients whose messages came, with shares that are good or not."""
        self._members: tuple[str, ...] | None = None
        """Clients of the masks."""
        self._masked = False
        self._binding = b""
        """Of the masks: see `Roster.binding`."""
        self._answered: tuple[tuple[str, ...], bytes] | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """Return the clients of the masks, this one included."""
        if self._members is None:
            raise FedspanError(f"{self.client_id!r} does not know who is in the sum: expected its members first")
        return self._members

    @property
    def is_settled(self) -> bool:
        """Return whether the clients of the masks are fixed."""
        return self._members is not None

    def advertise(self) -> bytes:
        """Return this client's public keys for this sum."""
        return self._advert

    def share(self, keys: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Return shares of this client's two secrets for each of the others, sealed so that only they can read them.

        After each follow the commitments to the two. Under this client's own name are those to the shares that it
        keeps, and a signature of all of them where there is an identity to sign with.

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
        if self._consistency is not None:
            check_malicious_threshold(threshold, len(roster.ids))
        seeds = primitives.split(self._seed, threshold, len(roster.ids))
        privates = primitives.split(self._private, threshold, len(roster.ids))
        pairs = {v: seed + private for v, seed, private in zip(roster.ids, seeds, privates, strict=True)}
        sent = {v: roster.commitments(self.client_id, v, pair) for v, pair in pairs.items()}
        content = roster.signed_commitments(self.client_id, sent)
        signature = b"" if self._signer is None else self._signer.sign(content)
        for other, pair in pairs.items():
            if other == self.client_id:
                sent[other] += signature
                continue
            key, context = roster.channel(self._channel, other, self.client_id, other)
            sent[other] = primitives.seal(key, pair, context) + sent[other]
        self._held[self.client_id] = pairs[self.client_id]
        self._roster = roster
        return sent

    def receive(self, shares: Mapping[str, bytes]) -> list[str]:
        """Take the shares that the others have for this client; return the clients whose shares are false.

        Those were not sealed for this client in this sum, or do not fit the commitments to them. That is no reason to
        stop: this client's own secrets do not depend on them, and enough others may hold true ones.
        """
        roster = self._sharing()
        if self._dealers is not None:
            raise FedspanError(f"{self.client_id!r} has received its shares already: expected once in a sum")
        if self.client_id in shares or not set(shares) <= set(roster.ids):
            raise FedspanError(f"shares from {sorted(shares)}: expected some of the others in {list(roster.ids)}")
        if len(shares) + 1 < roster.threshold:
            raise FedspanError(f"shares from {len(shares)} others: expected at least {roster.threshold - 1}")
        opened = {other: self._opened(roster, other, content) for other, content in sorted(shares.items())}
        self._held |= {other: pair for other, pair in opened.items() if pair is not None}
        self._dealers = frozenset({*shares, self.client_id})
        return [other for other, pair in opened.items() if pair is None]

    def _opened(self, roster: Roster, dealer: str, content: bytes) -> bytes | None:
        """Return the pair of shares from one client; None where they are false."""
        if not isinstance(content, bytes) or len(content) != SEALED + COMMITTED:
            return None
        key, context = roster.channel(self._channel, dealer, dealer, self.client_id)
        pair = primitives.unseal(key, content[:SEALED], context)
        if pair is None or roster.commitments(dealer, self.client_id, pair) != content[SEALED:]:
            return None
        return pair

    def discard(self, dealers: Iterable[str]) -> None:
        """Hold no shares of these clients, as if they were false."""
        for dealer in dealers:
            self._held.pop(dealer, None)

    def settle(self, members: Sequence[str]) -> None:
        """Fix the clients of the masks: those that shared their secrets, without those whose shares too few hold.

        Raises
        ------
        FedspanError
            When they are fewer than the threshold, or this client is not among them. A server that names other members
            to other clients gets masks that do not cancel.
        """
        roster = self._sharing()
        if self._members is not None:
            raise FedspanError(f"{self.client_id!r} knows the members of the sum already: expected them once")
        if self._dealers is None:
            raise FedspanError(f"{self.client_id!r} has no shares of the others: expected them before its vector")
        named = tuple(sorted(members))
        if len(set(named)) != len(named) or not set(named) <= self._dealers or self.client_id not in named:
            raise FedspanError(
                f"members {list(named)}: expected some of {sorted(self._dealers)} with {self.client_id!r}"
            )
        if len(named) < roster.threshold:
            raise FedspanError(f"{len(named)} members: expected at least {roster.threshold} in a sum")
        self._members = named

    def mask(self, vector: Words, shares: Mapping[str, bytes] | None = None, terms: bytes = b"") -> Words:
        """Return the vector under its masks, which may leave the site.

        Parameters
        ----------
        vector
            (num_words,) of uint64, see `FixedPoint`; left as it is.
        shares
            As `receive` takes them; None where it was called already. All of their senders are members then, unless
            `settle` has named them.
        terms
            Digest of what this client knows about the sum: see `SumTerms`.
        """
        if self._masked:
            raise FedspanError(f"{self.client_id!r} has masked its vector already: expected once in a sum")
        self._check_vector(vector)
        if shares is not None:
            self.receive(shares)
        roster = self._sharing()
        if self._members is None:
            self.settle(sorted(self._dealers or ()))
        # Before anything leaves, even if what follows fails: the difference of two vectors under the same masks would
        # be bare.
        self._masked = True
        self._binding = roster.binding(terms, self.members)
        plus, minus = self._mask_keys(roster, self._binding)
        masked = vector.copy()
        primitives.add_masks(masked, plus, minus)
        self._seed = self._private = self._channel = b""  # from here on only the others' shares of them are needed
        return masked

    def _check_vector(self, vector: Words) -> None:
        if vector.dtype != np.uint64 or vector.ndim != 1 or self.num_words not in (None, len(vector)):
            length = "" if self.num_words is None else f" of {self.num_words} words"
            raise FedspanError(f"a vector of {vector.dtype} in shape {vector.shape}: expected uint64{length}")

    def _mask_keys(self, roster: Roster, binding: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of the masks to add and of those to subtract; of two clients, the first by id adds."""
        others = [v for v in self.members if v != self.client_id]
        keys = {v: roster.pair_mask_key(self._private, self.client_id, v, binding) for v in others}
        plus = [key for other, key in keys.items() if self.client_id < other]
        minus = [key for other, key in keys.items() if self.client_id > other]
        return [roster.self_mask_key(self._seed, self.client_id, binding), *plus], minus

    def sign_survivors(self, survivors: Sequence[str]) -> bytes:
        """Return this client's signature of the list of survivors that it was told; of one list for a sum."""
        roster, stayed = self._checked_survivors(survivors)
        return self._demanded().sign(roster, self._binding, stayed)

    def accept_survivors(self, survivors: Sequence[str], signatures: Mapping[str, bytes]) -> None:
        """Take the signatures of the list by at least t of the survivors, without which nothing is unmasked.

        Raises
        ------
        Inconsistent
            When they are not that.
        """
        roster, stayed = self._checked_survivors(survivors)
        self._demanded().accept(roster, self._binding, stayed, signatures)

    def _demanded(self) -> Consistency:
        if self._consistency is None:
            raise FedspanError(f"{self.client_id!r} signs no survivors: expected privacy.server = 'malicious'")
        return self._consistency

    def unmask(self, survivors: Sequence[str]) -> bytes:
        """Return one share for each client of the masks: of its seed if it stayed, of its private key if it left.

        Zeros stand for the shares of a client that were false.

        Parameters
        ----------
        survivors
            Clients whose masked vectors the server has. A second call is answered only where it names the same ones:
            two lists would yield both shares of the clients in which they differ.
        """
        if self._answered is not None:
            if tuple(sorted(survivors)) != self._answered[0]:
                raise FedspanError(f"{self.client_id!r} has unmasked for other survivors: expected the same list again")
            return self._answered[1]
        roster, stayed = self._checked_survivors(survivors)
        if self._consistency is not None:
            self._consistency.check_accepted(stayed)
        pairs = {other: self._held.get(other, bytes(2 * SECRET)) for other in self.members}
        parts = [pair[:SECRET] if other in stayed else pair[SECRET:] for other, pair in pairs.items()]
        self._answered = stayed, roster.unmasking_header(self.client_id, stayed) + b"".join(parts)
        self._held = {}
        return self._answered[1]

    def _checked_survivors(self, survivors: Sequence[str]) -> tuple[Roster, tuple[str, ...]]:
        """Return the roster, and the survivors sorted, after checking that a sum may be unmasked for them."""
        if not self._masked:
            raise FedspanError(f"{self.client_id!r} has masked nothing yet: expected its vector before the unmasking")
        roster, stayed = self._sharing(), tuple(sorted(survivors))
        if len(set(stayed)) != len(stayed) or not set(stayed) <= set(self.members):
            raise FedspanError(f"survivors {list(stayed)}: expected some of {list(self.members)}, each once")
        if self.client_id not in stayed:
            raise FedspanError(f"survivors {list(stayed)}: expected {self.client_id!r}, which is asked, among them")
        # The sum of a few clients says much about each of them.
        if len(stayed) < roster.threshold:
            raise FedspanError(f"{len(stayed)} survivors: expected at least {roster.threshold} to unmask a sum")
        return roster, stayed

    def convicts(
        self, dealer: str, commitments: Mapping[str, bytes], signature: bytes, shares: Mapping[str, bytes]
    ) -> bool:
        """Return whether a client is shown to have dealt shares that do not give the secret of its keys.

        Nobody can show that of an honest client, since it has signed commitments to true shares only. A sum over its
        vector cannot be unmasked by those that follow the protocol.

        Parameters
        ----------
        commitments, signature
            All that the client committed to, by holder, and its signature of them.
        shares
            As many as are needed, by holder: of its seed if it stayed, of its private key if it left.
        """
        roster = self._sharing()
        if self._trusted is None or self._answered is None or dealer not in self.members:
            return False
        if not (commitments.keys() == set(roster.ids) >= shares.keys() and len(shares) == roster.threshold):
            return False
        if not primitives.signed(self._trusted[dealer], signature, roster.signed_commitments(dealer, commitments)):
            return False
        stayed = dealer in self._answered[0]
        if any(not roster.is_committed(dealer, v, s, stayed, commitments[v]) for v, s in shares.items()):
            return False
        secret = primitives.combine({roster.share_index(v): share for v, share in shares.items()})
        return not roster.fits(dealer, secret, stayed)

    def _sharing(self) -> Roster:
        if self._roster is None:
            raise FedspanError(f"{self.client_id!r} has shared no secrets yet: expected the others' keys first")
        return self._roster
