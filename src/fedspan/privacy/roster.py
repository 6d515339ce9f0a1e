"""The clients of one secure sum and their public keys, as both sides read them from the bytes that were advertised.

Every digest, key and sealed share here is bound to the session, to the client ids and to the purpose. Bytes of one sum
are therefore worthless in another, and those of one client cannot be presented as another's: a server that replays or
swaps messages gets an error, never a second mask of the same key or a share for the wrong secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedspan.privacy import primitives
from fedspan.privacy.primitives import SECRET, SIGNATURE, Ed25519PrivateKey, digest
from fedspan.support.errors import FedspanError

SEALED = 2 * SECRET + primitives.SEALED_EXTRA
"""Bytes of the sealed pair of shares that one client has for another."""
COMMITTED = 2 * SECRET
"""Bytes of the commitments to that pair, which follow it."""


class SumFailed(FedspanError):
    """Too few clients stayed, or their shares do not fit: there is no sum, and nothing was unmasked.

    Parameters
    ----------
    blamed
        Client -> its fault, where a sum without these clients can succeed.
    """

    def __init__(self, line: str, blamed: Mapping[str, str] | None = None) -> None:
        super().__init__(line)
        self.blamed = dict(blamed or {})


class DealersFailed(SumFailed):
    """The shares of some clients fit their own commitments and not their keys: no choice of helpers could restore them.

    Parameters
    ----------
    proofs
        Client -> holder -> the shares that show it.
    """

    def __init__(self, proofs: Mapping[str, Mapping[str, bytes]]) -> None:
        names = ", ".join(map(repr, proofs))
        fault = "dealt shares that do not give the secret of its keys"
        super().__init__(
            f"the shares that {names} dealt do not fit its keys: the sum is given up", dict.fromkeys(proofs, fault)
        )
        self.proofs = proofs


def too_few(got: int, needed: int, what: str) -> SumFailed:
    """Return the error for a step of the protocol that too few clients took."""
    return SumFailed(f"{got} clients {what}, {needed} were needed: the sum is given up")


@dataclass(frozen=True, slots=True)
class AdvertisedKeys:
    """One client's public keys for a sum, which every other client sees."""

    channel_key: bytes
    """For encryption between clients. Not `mask_key`, whose private half is revealed when a client leaves."""
    mask_key: bytes
    """For agreeing on the pair masks."""
    commitment: bytes
    """To the seed of the self-mask, so that a wrong share of it is noticed."""

    def sign(self, session: bytes, client_id: str, signer: Ed25519PrivateKey | None) -> bytes:
        """Return the bytes to send; signed where there is an identity to sign with."""
        body = self.channel_key + self.mask_key + self.commitment
        signature = b"" if signer is None else signer.sign(_signed(session, client_id, body))
        return message_header("advert", session, client_id) + body + signature

    @classmethod
    def read(
        cls, content: bytes, session: bytes, client_id: str, trusted: Mapping[str, bytes] | None
    ) -> AdvertisedKeys:
        """Check and parse the bytes that a client sent; where identity keys are known, its signature too."""
        if trusted is not None and check_id(client_id) not in trusted:
            raise FedspanError(f"{client_id!r} takes part, but no identity key is known for it")
        identity = None if trusted is None else trusted[client_id]
        body = body_of(content, "advert", session, client_id)
        if len(body) not in (3 * SECRET, 3 * SECRET + SIGNATURE):
            raise FedspanError(
                f"the keys of {client_id!r} have {len(body)} bytes: expected {3 * SECRET} or a signature"
            )
        body, signature = body[: 3 * SECRET], body[3 * SECRET :]
        if identity is not None and not primitives.signed(identity, signature, _signed(session, client_id, body)):
            raise FedspanError(f"the keys of {client_id!r} are not signed by the identity that is known for it")
        return cls(body[:SECRET], body[SECRET : 2 * SECRET], body[2 * SECRET :])


@dataclass(frozen=True, slots=True)
class Roster:
    """One sum's clients in their order, with their keys; every key of the sum is derived for this roster alone.

    Clients that were shown different rosters or thresholds derive different keys: they cannot open each other's
    shares, and their masks do not cancel. The server cannot gain by telling clients different things.
    """

    session: bytes
    threshold: int
    ids: tuple[str, ...]
    adverts: Mapping[str, AdvertisedKeys]
    fingerprint: bytes
    """Digest of the session, the threshold, the ids and the advertised bytes."""

    @classmethod
    def read(
        cls, session: bytes, advertised: Mapping[str, bytes], threshold: int, trusted: Mapping[str, bytes] | None
    ) -> Roster:
        """Check the advertised keys of all clients.

        Raises
        ------
        FedspanError
            Naming the client whose keys are not valid, or the threshold that is not.
        """
        ids = tuple(sorted(advertised))
        check_threshold(threshold, len(ids))
        adverts = {i: AdvertisedKeys.read(advertised[i], session, i, trusted) for i in ids}
        keys = [key for advert in adverts.values() for key in (advert.channel_key, advert.mask_key)]
        # A repeated key means copying or a broken source of randomness, and a channel key equal to a mask key would
        # be revealed along with it.
        if len(set(keys)) != len(keys):
            raise FedspanError("two of the advertised keys are the same: expected fresh keys from every client")
        parts = [part for i in ids for part in (i.encode(), advertised[i])]
        return cls(session, threshold, ids, adverts, digest(b"roster", session, str(threshold).encode(), *parts))

    def share_index(self, client_id: str) -> int:
        """Return the index of this client's share in every secret that was split."""
        return self.ids.index(client_id)

    def channel(self, private: bytes, other: str, sender: str, recipient: str) -> tuple[bytes, bytes]:
        """Return the key of one sealed message between two clients, and the context authenticated with it."""
        names = (b"shares", self.session, self.fingerprint, sender.encode(), recipient.encode())
        return primitives.agree(private, self.adverts[other].channel_key, *names), primitives.pack(*names)

    def pair_mask_key(self, private: bytes, owner: str, other: str, binding: bytes) -> bytes:
        """Return the key of the mask that two clients share: the same from either side, if their bindings are."""
        names = (name.encode() for name in sorted((owner, other)))
        public = self.adverts[other].mask_key
        return primitives.agree(private, public, b"pair mask", self.session, self.fingerprint, binding, *names)

    def self_mask_key(self, seed: bytes, owner: str, binding: bytes) -> bytes:
        """Return the key of a client's self-mask."""
        return primitives.derive(seed, b"own mask", self.session, self.fingerprint, binding, owner.encode())

    def binding(self, terms: bytes, members: Iterable[str]) -> bytes:
        """Return the digest that every mask of this sum is bound to.

        Parameters
        ----------
        terms
            Digest of everything else that must be the same for all clients: see `SumTerms`.
        members
            The clients of the masks.
        """
        return digest(b"binding", self.fingerprint, terms, *(i.encode() for i in sorted(members)))

    def commitments(self, dealer: str, holder: str, pair: bytes) -> bytes:
        """Return the commitments to a pair of shares, the seed's before the private key's.

        A share is as random as the secret, to everyone who has fewer than the threshold of them: its digest says
        nothing about it, and needs no blinding.
        """
        return self._commitment(dealer, holder, b"seed", pair[:SECRET]) + self._commitment(
            dealer, holder, b"private key", pair[SECRET:]
        )

    def is_committed(self, dealer: str, holder: str, share: bytes, stayed: bool, commitments: bytes) -> bool:
        """Return whether a revealed share, of the seed if its dealer stayed, is the one that was committed to."""
        if stayed:
            return self._commitment(dealer, holder, b"seed", share) == commitments[:SECRET]
        return self._commitment(dealer, holder, b"private key", share) == commitments[SECRET:]

    def _commitment(self, dealer: str, holder: str, kind: bytes, share: bytes) -> bytes:
        return digest(b"share", self.fingerprint, dealer.encode(), holder.encode(), kind, share)

    def signed_commitments(self, dealer: str, commitments: Mapping[str, bytes]) -> bytes:
        """Return the content that a dealer signs: all its commitments, for every holder."""
        listed = (part for i in self.ids for part in (i.encode(), commitments[i]))
        return primitives.pack(b"fedspan secure sums: shares", self.fingerprint, dealer.encode(), *listed)

    def fits(self, client_id: str, secret: bytes, stayed: bool) -> bool:
        """Return whether a restored secret is the one that its owner advertised: its seed, or its private key."""
        advert = self.adverts[client_id]
        if stayed:
            return commitment(self.session, client_id, secret) == advert.commitment
        return primitives.public_key(secret) == advert.mask_key

    def unmasking_header(self, client_id: str, survivors: Iterable[str]) -> bytes:
        """Return the start of this client's unmasking answer, which binds it to the list of survivors."""
        return digest(b"answer", self.fingerprint, client_id.encode(), *(i.encode() for i in sorted(survivors)))


def check_threshold(threshold: int, num_clients: int) -> None:
    """Check that t of n clients is more than half, and at least two.

    With half or less, the server could tell one half that a client stayed and the other that it left, and collect
    enough shares of both its secrets.
    """
    if threshold < 2 or threshold > num_clients or 2 * threshold <= num_clients:
        raise FedspanError(
            f"threshold = {threshold} of {num_clients} clients: expected at least 2, more than half and at most all"
        )


def commitment(session: bytes, client_id: str, seed: bytes) -> bytes:
    """Return a commitment to a seed: it says nothing about the 32 random bytes, and fits no others."""
    return primitives.derive(seed, b"commitment", session, client_id.encode())


def message_header(kind: str, session: bytes, client_id: str) -> bytes:
    """Return the start of a message, which binds it to its kind, its sum and its sender."""
    return digest(kind.encode(), session, client_id.encode())


def body_of(content: bytes, kind: str, session: bytes, client_id: str) -> bytes:
    """Return the content of a message after its header; a FedspanError where the header is another."""
    if not isinstance(content, bytes) or content[:SECRET] != message_header(kind, session, client_id):
        raise FedspanError(f"the {kind} of {client_id!r} is malformed or of another sum")
    return content[SECRET:]


def check_id(client_id: str) -> str:
    """Return the id; a FedspanError where it is no string or empty."""
    if not isinstance(client_id, str) or not client_id:
        raise FedspanError(f"client_id {client_id!r}: expected a name")
    return client_id


def _signed(session: bytes, client_id: str, body: bytes) -> bytes:
    return primitives.pack(b"fedspan secure sums: keys", session, client_id.encode(), body)
