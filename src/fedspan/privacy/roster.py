"""Who takes part in one secure sum, with which keys: what both sides read from the bytes that were advertised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedspan.privacy import primitives
from fedspan.privacy.primitives import SECRET, SIGNATURE, Ed25519PrivateKey, digest
from fedspan.support.errors import FedspanError

SEALED = 2 * SECRET + primitives.SEALED_EXTRA
"""Bytes of the two shares that one client has for another."""


class SumFailed(FedspanError):
    """Too few clients stayed, or their shares do not fit: there is no sum, and nothing was unmasked."""


def too_few(got: int, needed: int, what: str) -> SumFailed:
    """So many did what the sum needs more of."""
    return SumFailed(f"{got} clients {what}, {needed} were needed: the sum is given up")


@dataclass(frozen=True, slots=True)
class Advert:
    """What one client tells everyone before a sum."""

    channel: bytes
    """Public key of the encryption between clients."""
    mask: bytes
    """Public key from which pairwise masks are agreed."""
    commitment: bytes
    """To the seed of its own mask, so that a wrong share of it is noticed."""

    def sign(self, session: bytes, client_id: str, signer: Ed25519PrivateKey | None) -> bytes:
        """The bytes that are sent; signed when there is an identity to sign with."""
        body = self.channel + self.mask + self.commitment
        signature = b"" if signer is None else signer.sign(_signed(session, client_id, body))
        return message("advert", session, client_id) + body + signature

    @classmethod
    def read(cls, content: bytes, session: bytes, client_id: str, trusted: Mapping[str, bytes] | None) -> Advert:
        """Check and take apart what a client sent; where identity keys are known, its signature too."""
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

    Two clients that were shown different rosters, or different thresholds, cannot read each other's shares.
    """

    session: bytes
    threshold: int
    ids: tuple[str, ...]
    adverts: Mapping[str, Advert]
    fingerprint: bytes
    """Of all of it."""

    @classmethod
    def read(
        cls, session: bytes, advertised: Mapping[str, bytes], threshold: int, trusted: Mapping[str, bytes] | None
    ) -> Roster:
        """Check everyone's advertised keys.

        Raises
        ------
        ValueError
            Naming the client whose keys are not what they should be, or what is wrong with the threshold.
        """
        ids = tuple(sorted(advertised))
        check_threshold(threshold, len(ids))
        adverts = {i: Advert.read(advertised[i], session, i, trusted) for i in ids}
        keys = [key for advert in adverts.values() for key in (advert.channel, advert.mask)]
        if len(set(keys)) != len(keys):
            raise FedspanError("two of the advertised keys are the same: expected fresh keys from every client")
        told = [part for i in ids for part in (i.encode(), advertised[i])]
        return cls(session, threshold, ids, adverts, digest(b"roster", session, str(threshold).encode(), *told))

    def place(self, client_id: str) -> int:
        """Which share of everyone's secrets is this client's."""
        return self.ids.index(client_id)

    def channel(self, private: bytes, other: str, sender: str, recipient: str) -> tuple[bytes, bytes]:
        """The key of one sealed message between two clients, and the context that is authenticated with it."""
        names = (b"shares", self.session, self.fingerprint, sender.encode(), recipient.encode())
        return primitives.agree(private, self.adverts[other].channel, *names), primitives.pack(*names)

    def pair_key(self, private: bytes, owner: str, other: str) -> bytes:
        """The key of the mask that two clients share."""
        names = (name.encode() for name in sorted((owner, other)))
        public = self.adverts[other].mask
        return primitives.agree(private, public, b"pair mask", self.session, self.fingerprint, *names)

    def own_key(self, seed: bytes, owner: str) -> bytes:
        """The key of the mask that is a client's own."""
        return primitives.derive(seed, b"own mask", self.session, self.fingerprint, owner.encode())

    def answer(self, client_id: str, survivors: Iterable[str]) -> bytes:
        """How this client's answer to "these stayed" begins."""
        return digest(b"answer", self.fingerprint, client_id.encode(), *(i.encode() for i in sorted(survivors)))


def check_threshold(threshold: int, num_clients: int) -> None:
    """t of n: more than half, or two halves could be asked for different secrets of one client; and never one alone."""
    if threshold < 2 or threshold > num_clients or 2 * threshold <= num_clients:
        raise FedspanError(
            f"threshold = {threshold} of {num_clients} clients: expected at least 2, more than half and at most all"
        )


def commitment(session: bytes, client_id: str, seed: bytes) -> bytes:
    """Says nothing about the 32 random bytes of the seed, and fits no others."""
    return primitives.derive(seed, b"commitment", session, client_id.encode())


def message(kind: str, session: bytes, client_id: str) -> bytes:
    """How a message begins: of what kind it is, in which sum, from whom."""
    return digest(kind.encode(), session, client_id.encode())


def body_of(content: bytes, kind: str, session: bytes, client_id: str) -> bytes:
    """What follows that beginning."""
    if not isinstance(content, bytes) or content[:SECRET] != message(kind, session, client_id):
        raise FedspanError(f"what came as the {kind} of {client_id!r} is not that, or of another sum")
    return content[SECRET:]


def check_id(client_id: str) -> str:
    """Any name but an empty one."""
    if not isinstance(client_id, str) or not client_id:
        raise FedspanError(f"client_id {client_id!r}: expected a name")
    return client_id


def _signed(session: bytes, client_id: str, body: bytes) -> bytes:
    return primitives.pack(b"fedspan secure sums: keys", session, client_id.encode(), body)
