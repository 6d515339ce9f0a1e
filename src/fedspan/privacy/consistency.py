"""The consistency round of secure sums: signed lists of survivors, against a server that shows sites different ones.

After the vectors every survivor signs the list of survivors that it was told. It reveals shares only after the server
has shown t valid signatures of that same list. An honest client signs one list for a sum. Of n clients let c collude
with the server. Two different lists would each need t - c honest signers, none of them the same, out of n - c:
2(t - c) ≤ n - c. So with 2t > n + c all honest clients that reveal anything reveal it for one list, and the server
learns the sum of at least t clients' vectors, or nothing. t > 2n/3 allows for every c < n/3.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", section 6 and
theorem 6.5 (doi 10.1145/3133956.3133982; 1611.04482 is its earlier form). Differences: the signed content names the
session, the roster with its keys and threshold, the terms of the sum and the clients of the masks too, so that clients
which were told different things about any of these sign different statements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedspan.privacy import primitives
from fedspan.privacy.primitives import SIGNATURE, Ed25519PrivateKey
from fedspan.privacy.roster import Roster
from fedspan.support.errors import FedspanError


class Inconsistent(FedspanError):
    """The server has not shown that enough clients were told the same survivors: nothing is revealed."""


def most_colluders(threshold: int, num_clients: int) -> int:
    """Return how many clients may collude with a malicious server without its learning more: c < 2t - n, and c < t."""
    return min(2 * threshold - num_clients, threshold) - 1


def check_malicious_threshold(threshold: int, num_clients: int) -> None:
    """Check that t of n is more than two thirds, as every c < n/3 colluding clients need it.

    Raises
    ------
    FedspanError
        When it is not.
    """
    if 3 * threshold <= 2 * num_clients:
        raise FedspanError(
            f"threshold = {threshold} of {num_clients} clients: expected more than two thirds of them against a "
            "malicious server"
        )


def statement(roster: Roster, client_id: str, binding: bytes, survivors: Sequence[str]) -> bytes:
    """Return the content that a client signs.

    Parameters
    ----------
    binding
        As `Roster.binding` returns it: the roster, the terms of the sum and the clients of its masks.
    survivors
        Sorted.
    """
    listed = (i.encode() for i in survivors)
    return primitives.pack(
        b"fedspan secure sums: survivors", roster.session, roster.fingerprint, binding, client_id.encode(), *listed
    )


class Consistency:
    """One client's part of the consistency round of one sum: it signs one list, and accepts that list alone.

    Parameters
    ----------
    signer, trusted
        This client's identity, and the public keys of all.

    Raises
    ------
    FedspanError
        When there is no identity: unsigned lists would prove nothing.
    """

    def __init__(self, client_id: str, signer: Ed25519PrivateKey | None, trusted: Mapping[str, bytes] | None) -> None:
        if signer is None or trusted is None:
            raise FedspanError(
                f"{client_id!r} has no identity to sign with: expected one, and those of all others, against a "
                "malicious server"
            )
        self._client_id, self._signer, self._trusted = client_id, signer, trusted
        self._signed: tuple[str, ...] | None = None
        self._accepted = False

    def sign(self, roster: Roster, binding: bytes, survivors: tuple[str, ...]) -> bytes:
        """Return this client's signature of a list of survivors; of another list only an error."""
        if self._signed not in (None, survivors):
            raise Inconsistent(f"{self._client_id!r} has signed other survivors of this sum: expected the same list")
        self._signed = survivors
        return self._signer.sign(statement(roster, self._client_id, binding, survivors))

    def accept(
        self, roster: Roster, binding: bytes, survivors: tuple[str, ...], signatures: Mapping[str, bytes]
    ) -> None:
        """Take the signatures that allow this client to unmask.

        Raises
        ------
        Inconsistent
            When this client has not signed that list, a signature is not valid, of a client that did not survive or of
            another sum or list, or they are fewer than the threshold.
        """
        if self._signed != survivors:
            raise Inconsistent(f"survivors {list(survivors)}: expected those that {self._client_id!r} has signed")
        if not set(signatures) <= set(survivors):
            others = sorted(set(signatures) - set(survivors))
            raise Inconsistent(f"signatures of {others}: expected those of survivors {list(survivors)}")
        if len(signatures) < roster.threshold:
            raise Inconsistent(
                f"{len(signatures)} signatures of the list of survivors: expected at least {roster.threshold}"
            )
        for client_id, signature in sorted(signatures.items()):
            check_signature(self._trusted, roster, client_id, binding, survivors, signature)
        self._accepted = True

    def check_accepted(self, survivors: tuple[str, ...]) -> None:
        """Raise an `Inconsistent` unless enough signatures of this list were accepted."""
        if not self._accepted or self._signed != survivors:
            raise Inconsistent(
                f"{self._client_id!r} was shown no signatures of the survivors {list(survivors)}: expected them before "
                "the unmasking"
            )


def check_signature(
    trusted: Mapping[str, bytes],
    roster: Roster,
    client_id: str,
    binding: bytes,
    survivors: Sequence[str],
    signature: bytes,
) -> None:
    """Raise an `Inconsistent` unless this is the client's signature of this list in this sum."""
    content = statement(roster, client_id, binding, survivors)
    valid = isinstance(signature, bytes) and len(signature) == SIGNATURE and client_id in trusted
    if not valid or not primitives.signed(trusted[client_id], signature, content):
        raise Inconsistent(f"{client_id!r} has not signed the survivors {list(survivors)} of this sum")
