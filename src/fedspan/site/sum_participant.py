"""A site's part in secure sums: its keys, its shares, its masked vectors, and its help to unmask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedspan.privacy.fixed_point import Words
from fedspan.site.errors import Refused
from fedspan.site.message_checks import RoundHeader
from fedspan.site.settings import SiteSettings
from fedspan.site.storage import SiteStorage
from fedspan.wire.refusals import Code

if TYPE_CHECKING:  # this needs the extra `secure`
    from fedspan.privacy.primitives import Ed25519PrivateKey
    from fedspan.privacy.secure_sum import RoundParticipant


class SumParticipant:
    """The secure sums that a site has keys for: those of one set-up at a time.

    The keys are in memory only. A site that is restarted drops out of the sums that were set up before, instead of
    leaving secrets on its disk.
    """

    def __init__(self, settings: SiteSettings, client_id: str, storage: SiteStorage) -> None:
        self._identity, self._trusted = settings.identity, settings.trusted
        self._min_share = settings.config.privacy.threshold
        self._client_id, self._storage = client_id, storage
        self._name: tuple[str, str] | None = None
        """Run and session of the set-up."""
        self._participant: RoundParticipant | None = None

    def advertise(self, header: RoundHeader, session: str, num_sums: int) -> bytes:
        """Make new keys for several sums and return the public ones; earlier keys are forgotten."""
        from fedspan.privacy.secure_sum import RoundParticipant  # which needs the extra `secure`

        name = f"{header.run}/{header.round_num}/{session}".encode()
        participant = RoundParticipant(name, self._client_id, num_sums, self._signer(), self._trusted)
        self._name, self._participant = (header.run, session), participant
        return participant.advertise()

    def share(self, run: str, session: str, keys: Mapping[str, bytes], threshold: int) -> dict[str, bytes]:
        """Return shares of this site's secrets, sealed for each of the others.

        Raises
        ------
        Refused
            When fewer clients could unmask a sum than this site's own settings require. A server with as many
            accomplices among the clients as the threshold says can read a single client's vector.
        """
        participant = self._of(run, session)
        if threshold < self._min_share * len(keys) - 1e-9:
            raise Refused(f"a threshold of {threshold} for {len(keys)} clients: expected privacy.threshold of them")
        return participant.share(keys, threshold)

    def mask(
        self, run: str, session: str, index: int, words: Words, shares: Mapping[str, bytes] | None = None
    ) -> Words:
        """Return one sum's vector under its masks.

        Parameters
        ----------
        shares
            The others' shares for this site, which come with the first vector after a set-up.
        """
        participant = self._of(run, session)
        if shares is not None:
            participant.receive(shares)
        return participant.mask(index, words)

    def unmask(self, run: str, session: str, index: int, sum_name: str, survivors: Sequence[str]) -> bytes:
        """Return this site's part in unmasking one sum.

        Raises
        ------
        Refused
            When the sum was unmasked for other clients before, even in an earlier set-up.
        """
        participant = self._of(run, session)
        self._storage.allow_unmasking(run, sum_name, survivors)
        return participant.unmask(index, survivors)

    def _of(self, run: str, session: str) -> RoundParticipant:
        if self._participant is None or self._name != (run, session):
            raise Refused("a secure sum that this site has no keys for: it was restarted, or joined late", Code.NO_KEYS)
        return self._participant

    def _signer(self) -> Ed25519PrivateKey | None:
        if self._identity is None:
            return None
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._identity)
