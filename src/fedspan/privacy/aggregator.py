"""The server's side of one secure sum."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations, islice

import numpy as np

from fedspan.privacy import consistency, primitives
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.primitives import SECRET, SIGNATURE
from fedspan.privacy.roster import (
    COMMITTED,
    SEALED,
    AdvertisedKeys,
    DealersFailed,
    Roster,
    SumFailed,
    check_id,
    too_few,
)
from fedspan.support.errors import FedspanError

_MOST_CHOICES = 64
"""Choices of helpers that are tried for one secret. Those of an honest client all give it; a dishonest one could make
the server try for years."""


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
        self._commitments: dict[str, dict[str, bytes]] = {}
        """Dealer -> holder -> the commitments to the pair of shares."""
        self._signatures: dict[str, bytes] = {}
        self._members: tuple[str, ...] = ()
        self._without: Mapping[str, Collection[str]] = {}
        """Client -> the clients whose shares it does not hold, as it said."""
        self._added: set[str] = set()
        self._total: Words | None = None
        self._terms = b""
        self._closed = self._done = False
        self.liars: dict[str, str] = {}
        """Client -> the client of which it revealed another share than it was dealt."""
        if num_words is not None:
            self.expect(num_words)

    def expect(self, num_words: int, terms: bytes = b"") -> None:
        """Fix the length of the vectors, once, and the digest of the terms that the clients bind their masks to."""
        if self._total is not None or num_words < 1:
            raise ValueError(f"num_words = {num_words}: expected a positive number, once")
        self._total, self._terms = np.zeros(num_words, np.uint64), terms

    def check_advert(self, client_id: str, content: bytes, earlier: Mapping[str, bytes] | None = None) -> None:
        """Raise a FedspanError where one client's keys cannot be passed on to the others, who would refuse them all.

        Parameters
        ----------
        earlier
            The adverts that came before. A key can only be copied once it was sent, so of two equal ones the later is
            the copy.
        """
        advert = AdvertisedKeys.read(content, self.session, check_id(client_id), self._trusted)
        primitives.check_public_key(advert.channel_key)
        primitives.check_public_key(advert.mask_key)
        if advert.channel_key == advert.mask_key:
            raise FedspanError(f"the two keys of {client_id!r} are the same: expected two")
        for other, read in (earlier or {}).items():
            known = AdvertisedKeys.read(read, self.session, other, None)  # its signature was checked already
            if {advert.channel_key, advert.mask_key} & {known.channel_key, known.mask_key}:
                raise FedspanError(f"the keys of {client_id!r} are copied from {other!r}: expected its own")

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
        """Raise a FedspanError where one client's shares are not for each of the clients, or of another size.

        They are sealed, so the server can check no more than the signature of their commitments.
        """
        roster = self._listed()
        if sender not in roster.ids or set(shares) != set(roster.ids):
            raise FedspanError(f"shares from {sender!r}: expected one for each of {list(roster.ids)}")
        own = COMMITTED + (0 if self._trusted is None else SIGNATURE)
        sizes = {i: own if i == sender else SEALED + COMMITTED for i in roster.ids}
        if self._trusted is None and isinstance(shares[sender], bytes) and len(shares[sender]) == own + SIGNATURE:
            sizes[sender] += SIGNATURE  # of a site that signs, although nobody here can check it
        if any(not isinstance(s, bytes) or len(s) != sizes[i] for i, s in shares.items()):
            raise FedspanError(f"shares from {sender!r}: expected {SEALED + COMMITTED} bytes each, {own} for itself")
        if self._trusted is not None:
            commitments, signature = _apart(sender, shares)
            content = roster.signed_commitments(sender, commitments)
            if not primitives.signed(self._trusted[sender], signature, content):
                raise FedspanError(f"shares from {sender!r} are not signed by the identity that is known for it")

    def route(self, sent: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        """Take the sealed shares by sender and recipient; return them by recipient and sender."""
        if self._members:
            raise ValueError("the shares of this sum were routed already: expected once")
        for sender, shares in sorted(sent.items()):
            self.check_shares(sender, shares)
        if len(sent) < self.threshold:
            raise too_few(len(sent), self.threshold, "shared their secrets")
        apart = {sender: _apart(sender, shares) for sender, shares in sent.items()}
        self._commitments = {sender: commitments for sender, (commitments, _) in apart.items()}
        self._signatures = {sender: signature for sender, (_, signature) in apart.items()}
        self._members = tuple(sorted(sent))
        return {to: {sender: sent[sender][to] for sender in self._members if sender != to} for to in self._members}

    def settle(self, without: Mapping[str, Collection[str]]) -> dict[str, str]:
        """Fix the clients of the masks, as `Participant.settle` is to be told; return the dealers left out, and why.

        One false share says that its dealer or its holder lies, and not which. Only a dealer whose shares are held by
        fewer clients than the threshold is left out, since its secrets could not be restored.

        Parameters
        ----------
        without
            Client -> the clients whose shares are false, as it says; of all clients that have received theirs.
        """
        left: dict[str, str] = {}
        members = [u for u in self._members if u in without]
        while len(members) >= self.threshold:
            complaints = {u: [v for v in members if u in without[v]] for u in members}
            worst = max(members, key=lambda u: len(complaints[u]))
            if len(members) - len(complaints[worst]) >= self.threshold:
                break
            members.remove(worst)
            left[worst] = f"dealt false shares, as {', '.join(complaints[worst]) or 'nobody'} said"
        if len(members) < self.threshold:
            line = f"{len(members)} clients hold each other's shares, {self.threshold} were needed: the sum is given up"
            raise SumFailed(line, left)
        self._members, self._without = tuple(members), without
        return left

    @property
    def members(self) -> tuple[str, ...]:
        """Return the clients of the masks."""
        return self._members

    def add(self, client_id: str, masked: Words) -> None:
        """Add one client's masked vector to the running sum."""
        if self._total is None:
            raise ValueError("the length of the vectors is not known: expected a call of expect first")
        if client_id not in self._members:
            raise FedspanError(f"a vector from {client_id!r}: expected one of {list(self._members)}, which have shared")
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

    def check_signature(self, client_id: str, signature: bytes) -> None:
        """Raise a FedspanError unless a survivor has signed the list of survivors, where its identity is known."""
        if client_id not in self._added:
            raise FedspanError(f"a signature from {client_id!r}: expected one of {sorted(self._added)}")
        if self._trusted is not None:
            roster = self._listed()
            binding = roster.binding(self._terms, self._members)
            consistency.check_signature(self._trusted, roster, client_id, binding, sorted(self._added), signature)

    def check_answer(self, client_id: str, content: bytes) -> None:
        """Raise a FedspanError where one survivor's answer is of another sum or for other survivors.

        Which of its shares are true shows in `total`.
        """
        self._read(client_id, content)

    def total(self, answers: Mapping[str, bytes]) -> Words:
        """Return the sum without masks, from the survivors' answers: (num_words,) of uint64, once.

        A share that does not fit its dealer's commitment is not used, and `liars` names the client that revealed it:
        that client has said before that it holds the right one.

        Raises
        ------
        SumFailed
            When fewer true shares of a secret came than are needed.
        DealersFailed
            When the true shares of a secret do not give it: its dealer has lied about all of them.
        """
        roster = self._listed()
        if self._done or self._total is None:
            raise ValueError("this sum was unmasked already: expected once")
        survivors = self.survivors()
        secrets = self._restored_secrets(roster, answers)
        self._done = True
        binding = roster.binding(self._terms, self._members)
        plus: list[bytes] = []
        minus: list[bytes] = []
        for client_id, secret in secrets.items():
            if client_id in self._added:
                minus.append(roster.self_mask_key(secret, client_id, binding))
                continue
            # A survivor v < u has added the mask that it shares with u, one above has subtracted it.
            for other in survivors:
                sign = minus if other < client_id else plus
                sign.append(roster.pair_mask_key(secret, client_id, other, binding))
        primitives.add_masks(self._total, plus, minus)
        return self._total

    def evidence(self, dealer: str) -> tuple[dict[str, bytes], bytes]:
        """Return a dealer's commitments by holder and its signature of them, which prove what it dealt."""
        return dict(self._commitments[dealer]), self._signatures[dealer]

    def _restored_secrets(self, roster: Roster, answers: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return, checked, the seed of each client that stayed and the private key of each that left."""
        revealed = {client_id: self._read(client_id, content) for client_id, content in sorted(answers.items())}
        if len(revealed) < self.threshold:
            raise too_few(len(revealed), self.threshold, "helped to unmask")
        true = {u: self._true_shares(roster, u, revealed) for u in self._members}
        for client_id, shares in true.items():
            if len(shares) < self.threshold:
                count = f"{len(shares)} true shares of {client_id!r} came, {self.threshold} were needed"
                raise SumFailed(f"{count}: the sum is given up")
        restored = {u: self._restored(roster, u, shares) for u, shares in true.items()}
        proofs = {u: dict(islice(true[u].items(), self.threshold)) for u, secret in restored.items() if secret is None}
        if proofs:
            raise DealersFailed(proofs)
        return {u: secret for u, secret in restored.items() if secret is not None}

    def _true_shares(
        self, roster: Roster, dealer: str, revealed: Mapping[str, Mapping[str, bytes]]
    ) -> dict[str, bytes]:
        """Return the revealed shares of one client's secret that fit its commitments, by holder."""
        stayed, committed = dealer in self._added, self._commitments[dealer]
        true: dict[str, bytes] = {}
        for holder, shares in revealed.items():
            if dealer in self._without.get(holder, ()):
                continue
            if roster.is_committed(dealer, holder, shares[dealer], stayed, committed[holder]):
                true[holder] = shares[dealer]
            else:
                self.liars.setdefault(holder, dealer)
        return true

    def _restored(self, roster: Roster, dealer: str, shares: Mapping[str, bytes]) -> bytes | None:
        """Return the secret that some choice of these shares gives; None where no choice gives the right one."""
        for helpers in islice(combinations(shares, self.threshold), _MOST_CHOICES):
            secret = primitives.combine({roster.share_index(v): shares[v] for v in helpers})
            if roster.fits(dealer, secret, dealer in self._added):
                return secret
        return None

    def _read(self, client_id: str, content: bytes) -> dict[str, bytes]:
        """Return the shares of one answer, by the client of the masks that each belongs to."""
        if client_id not in self._added:
            raise FedspanError(f"an answer from {client_id!r}: expected one of {sorted(self._added)}")
        size = SECRET * (1 + len(self._members))
        if not isinstance(content, bytes) or len(content) != size:
            raise FedspanError(f"the answer of {client_id!r}: expected {size} bytes")
        if content[:SECRET] != self._listed().unmasking_header(client_id, self._added):
            raise FedspanError(f"the answer of {client_id!r} is of another sum, or for other survivors")
        return {u: content[SECRET * i : SECRET * (i + 1)] for i, u in enumerate(self._members, 1)}

    def _listed(self) -> Roster:
        if self._roster is None:
            raise ValueError("no keys were collected: expected a call of keys first")
        return self._roster


def _apart(sender: str, shares: Mapping[str, bytes]) -> tuple[dict[str, bytes], bytes]:
    """Return a dealer's commitments by holder, and its signature of them."""
    commitments = {i: content[:COMMITTED] if i == sender else content[SEALED:] for i, content in sorted(shares.items())}
    return commitments, shares[sender][COMMITTED:]
