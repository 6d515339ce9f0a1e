"""A site's part in secure sums: its keys, its shares, its masked vectors, and its help to unmask."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fedspan.federation import requirements
from fedspan.privacy.fixed_point import Words
from fedspan.site.differencing import Differencing
from fedspan.site.errors import Refused
from fedspan.site.message_checks import RoundHeader
from fedspan.site.settings import SiteSettings
from fedspan.site.storage import SiteStorage
from fedspan.support.errors import FedspanError
from fedspan.wire.refusals import Code

if TYPE_CHECKING:  # this needs the extra `secure`
    from fedspan.privacy.primitives import Ed25519PrivateKey
    from fedspan.privacy.secure_sum import RoundParticipant

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Masked:
    """The update that this site has masked in one sum."""

    labels: tuple[int, int]
    """The round and exchange of the update."""
    vector: str
    """Digest of it, before it was masked."""

    @property
    def sum_name(self) -> str:
        """Return this site's own name of the sum in its run."""
        return f"{self.labels[0]}/{self.labels[1]}"


class SumParticipant:
    """The secure sums that a site has keys for: those of one set-up at a time.

    The keys are in memory only. A site that is restarted drops out of the sums that were set up before, instead of
    leaving secrets on its disk. The record of what each key has masked is beside the keys and lasts as long as they do.

    Parameters
    ----------
    max_sums
        The most sums that one set-up can be for.
    notify
        Called with a line for the people at this site.

    Raises
    ------
    FedspanError
        When the server may be malicious, and this site has no identity.
    """

    def __init__(
        self,
        settings: SiteSettings,
        client_id: str,
        storage: SiteStorage,
        max_sums: int,
        notify: Callable[[str], None],
    ) -> None:
        config = settings.config
        self._differencing = Differencing(config.privacy, storage, notify)
        self._identity, self._trusted = settings.identity, settings.trusted
        self._malicious = config.privacy.server == "malicious"
        if self._malicious and (self._identity is None or not self._trusted):
            raise FedspanError(
                f"privacy.server = 'malicious': the site {client_id!r} has no identity; expected `identity` in "
                "site.toml and the public keys of all sites in sites.json"
            )
        self._min_share = config.privacy.threshold
        own = next((len(ids) for ids in config.deployment.regions.values() if client_id in ids), None)
        secure = config.privacy.secure_sums
        self._least = requirements.least_in_sums(config.federation, config.privacy, own) if secure else 2
        self._client_id, self._storage, self._max_sums = client_id, storage, max_sums
        self._name: tuple[str, str] | None = None
        """Run and session of the set-up."""
        self._participant: RoundParticipant | None = None
        self._masked: dict[int, _Masked] = {}
        """By the number of the sum."""

    def advertise(self, header: RoundHeader, session: str, num_sums: int) -> bytes:
        """Make new keys for several sums and return the public ones; earlier keys are forgotten.

        Raises
        ------
        Refused
            For more sums than `privacy.rounds_ahead` rounds can have.
        """
        from fedspan.privacy.secure_sum import RoundParticipant  # which needs the extra `secure`

        if num_sums > self._max_sums:
            raise Refused(f"keys for {num_sums} sums at once: expected at most {self._max_sums}")
        name = f"{header.run}/{header.round_num}/{session}".encode()
        participant = RoundParticipant(name, self._client_id, num_sums, self._signer(), self._trusted, self._malicious)
        self._name, self._participant, self._masked = (header.run, session), participant, {}
        return participant.advertise()

    def share(self, run: str, session: str, keys: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Return shares of this site's secrets, sealed for each of the others.

        Raises
        ------
        Refused
            When fewer clients could unmask a sum, or be in one, than this site's own settings require. A server with as
            many accomplices among the clients as the threshold says can read a single client's vector, and the sum of a
            few says much about each. No sum is unmasked for fewer survivors than the threshold.
        """
        participant = self._of(run, session)
        if threshold < self._min_share * len(keys) - 1e-9:
            raise Refused(f"a threshold of {threshold} for {len(keys)} clients: expected privacy.threshold of them")
        if threshold < self._least:
            raise Refused(f"a sum of {threshold} clients or more: expected at least {self._least} in every sum")
        return participant.share(keys, threshold)

    def receive(self, run: str, session: str, shares: Mapping[str, bytes]) -> list[str]:
        """Take the others' shares for this site; return the clients whose shares are false."""
        return self._of(run, session).receive(shares)

    def settle(self, run: str, session: str, members: Sequence[str]) -> int:
        """Take part in sums of these clients, the same in all sums of a set-up; return their number.

        Raises
        ------
        Refused
            When they are others than before.
        """
        participant = self._of(run, session)
        if not participant.is_settled:
            participant.settle(members)
        elif tuple(sorted(members)) != participant.members:
            raise Refused(f"a sum of {sorted(members)}: expected {list(participant.members)}, as before")
        return len(participant.members)

    def mask(self, header: RoundHeader, session: str, index: int, words: Words, terms: bytes) -> Words:
        """Return one sum's vector under its masks, which are bound to the terms of the sum."""
        masked = self._of(header.run, session).mask(index, words, terms)
        digest = hashlib.sha256(words.data).hexdigest()
        self._masked[index] = _Masked((header.round_num, header.number), digest)
        return masked

    def sign(self, run: str, session: str, index: int, labels: tuple[int, int], survivors: Sequence[str]) -> bytes:
        """Return this site's signature of the survivors of one sum; of one list only.

        Raises
        ------
        Refused
            When this site has masked another update with these keys, or has signed another list.
        """
        participant, masked = self._of(run, session), self._masked_as(index, labels)
        self._differencing.check(run, masked.sum_name, survivors, warns=False)
        return _consistent(participant.sign_survivors, index, survivors)

    def unmask(
        self,
        run: str,
        session: str,
        index: int,
        labels: tuple[int, int],
        survivors: Sequence[str],
        signatures: Mapping[str, bytes],
    ) -> bytes:
        """Return this site's part in unmasking one sum.

        Parameters
        ----------
        labels
            The round and exchange that the message gives.
        signatures
            Of the list of survivors, where the server may be malicious.

        Raises
        ------
        Refused
            When this site has masked another update with these keys, a sum with this update was unmasked for other
            clients before, even in an earlier set-up or run, or too few clients have signed this list.
        """
        participant, masked = self._of(run, session), self._masked_as(index, labels)
        if self._malicious:
            # Before the list is recorded: a false one must not keep this site from helping with the true one.
            _consistent(participant.accept_survivors, index, survivors, signatures)
        self._differencing.check(run, masked.sum_name, survivors)
        self._storage.allow_unmasking(run, masked.sum_name, masked.vector, survivors)
        return participant.unmask(index, survivors)

    def _masked_as(self, index: int, labels: tuple[int, int]) -> _Masked:
        """Return the update that was masked in a sum, which must be that of this round and exchange."""
        masked = self._masked.get(index)
        if masked is None or masked.labels != labels:
            own = "nothing" if masked is None else masked.labels
            raise Refused(
                f"sum {index} as that of round {labels[0]}, exchange {labels[1]}: this site has masked {own} in it"
            )
        return masked

    def convict(
        self,
        run: str,
        session: str,
        index: int,
        dealer: str,
        commitments: Mapping[str, bytes],
        signature: bytes,
        shares: Mapping[str, bytes],
    ) -> None:
        """Take note that a client has dealt false shares for a sum, so that the others may repeat it without that one.

        Raises
        ------
        Refused
            When this is not proved.
        """
        if not self._of(run, session).convicts(index, dealer, commitments, signature, shares):
            raise Refused(f"no proof that the shares of {dealer!r} in sum {index} are false")
        masked = self._masked[index]
        self._storage.record_liar(run, masked.sum_name, masked.vector, dealer)

    def _of(self, run: str, session: str) -> RoundParticipant:
        if self._participant is None or self._name != (run, session):
            raise Refused("a secure sum that this site has no keys for: it was restarted, or joined late", Code.NO_KEYS)
        return self._participant

    def _signer(self) -> Ed25519PrivateKey | None:
        if self._identity is None:
            return None
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._identity)


def _consistent(step: Callable[..., T], *given: Any) -> T:
    """Take a step of the consistency round; where the survivors are in doubt, the server is told that this is why."""
    from fedspan.privacy.consistency import Inconsistent  # which needs the extra `secure`

    try:
        return step(*given)
    except Inconsistent as error:
        raise Refused(str(error), Code.INCONSISTENT) from None
