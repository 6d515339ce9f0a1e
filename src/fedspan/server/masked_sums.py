"""The messages of secure sums on the server: keys and shares before the masked vectors, unmasking after them.

A secure sum takes five round trips: the clients' keys, the shares of their secrets, their delivery, the masked vectors,
and the unmasking. The first three do not depend on the vectors, so they are made for several rounds at once
(`fedspan.server.key_exchange`), with fresh keys for every sum: each of the rounds that follow takes three less. Where
the server may be malicious, the sites sign the list of survivors before they unmask: one round trip more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedspan.federation.clients import Client
from fedspan.federation.exchange import Question
from fedspan.privacy.fixed_point import Words
from fedspan.privacy.sum_layout import SumLayout, SumTerms
from fedspan.server.key_exchange import Heading, KeyExchange, KeySetup, RunTerms, read_all
from fedspan.server.requests import Problem, Reply, Requests
from fedspan.server.roster_plan import WAITS, RosterPlan
from fedspan.wire import protocol
from fedspan.wire.protocol import MessageTensors

if TYPE_CHECKING:  # this needs the extra `secure`
    from fedspan.privacy.aggregator import Aggregator


class MaskedSums:
    """Secure sums over the rounds of a run, with the key set-up that several of them share.

    Parameters
    ----------
    terms
        What a sum's masks are bound to, beside its exchange and layout.
    plan
        The sites of the run's sums so far.
    notify
        Called with a line for people when a client does not do its part, or lies.
    """

    def __init__(self, requests: Requests, terms: RunTerms, plan: RosterPlan, notify: Callable[[str], None]) -> None:
        self._plan = plan
        self._requests, self._terms, self._notify = requests, terms, notify
        self._setup: KeySetup | None = None
        self._excluded: dict[str, Problem] = {}
        """Clients that dealt false shares: they have no part in any later sum of this process."""

    def begin(
        self, question: Question, heading: Heading, clients: Sequence[Client], layout: SumLayout, rank: int
    ) -> MaskedSum:
        """Begin the sum of an exchange, after setting up keys where this round has none.

        Parameters
        ----------
        clients
            The clients that can be reached.
        rank
            The largest of the clients that were asked for, whose layout it is.

        Raises
        ------
        FedspanError
            When too few clients are left after the set-up, or the sum would be over nearly the same clients as an
            earlier one.
        """
        place, num_exchanges = question.place
        problems: dict[str, Problem] = {}
        clients = [client for client in clients if client.client_id not in self._excluded]
        ids, without = [client.client_id for client in clients], self._excluded.keys()
        chosen = self._plan.choose(question.round_num, question.number, ids, without)
        waiting = {who: Problem(WAITS, absent=True) for who in ids if who not in chosen}
        clients = [client for client in clients if client.client_id in chosen]
        # Only a round's first exchange may change the set-up: all sums of a round are over the same roster.
        if self._setup is None or (place == 0 and not self._setup.serves(clients, num_exchanges)):
            # An evaluation comes after the last round, too.
            ahead = max(1, min(self._terms.privacy.rounds_ahead, self._terms.num_rounds - question.round_num))
            exchange = KeyExchange(self._requests, self._terms, question, heading, self._notify)
            self._setup = exchange.run(clients, ahead * num_exchanges)
            self._excluded |= exchange.excluded
            problems = exchange.problems
        terms = SumTerms(
            heading["run"],
            question.round_num,
            question.number,
            heading["terms"],
            heading["base"],
            question.template.rank,
            question.template.num_clients,
            rank,
            layout,
        )
        aggregator = self._setup.take(layout.num_words, terms.digest())
        return MaskedSum(self, self._requests, question, heading, self._setup, aggregator, problems, waiting)

    def check_roster(self, question: Question, survivors: Sequence[str]) -> None:
        """Check that a sum is not over nearly the same clients as an earlier one, before it is unmasked."""
        self._plan.check(question.round_num, question.number, survivors, self._excluded.keys())

    @property
    def signed_survivors(self) -> bool:
        """Return whether the sites sign the list of survivors."""
        return self._terms.signed_survivors

    @property
    def excluded(self) -> Mapping[str, Problem]:
        """Return the clients that have no part in any later sum, and why."""
        return self._excluded

    def notify(self, line: str) -> None:
        """Tell people something."""
        self._notify(line)

    def exclude(self, blamed: Mapping[str, str]) -> None:
        """Leave clients out of all later sums, which begin with a new set-up."""
        self._excluded |= {client_id: Problem(fault) for client_id, fault in blamed.items()}
        self._setup = None


class MaskedSum:
    """One secure sum: it sees masked vectors only, and learns their sum and nothing else.

    Parameters
    ----------
    setup
        The keys and shares.
    taken
        The number of the sum in it, which is used up, and its server's side.
    problems
        The clients that failed in the set-up.
    waiting
        The clients that are not asked, so that the sum is not over nearly the same clients as an earlier one.
    """

    def __init__(
        self,
        sums: MaskedSums,
        requests: Requests,
        question: Question,
        heading: Heading,
        setup: KeySetup,
        taken: tuple[int, Aggregator],
        problems: Mapping[str, Problem],
        waiting: Mapping[str, Problem],
    ) -> None:
        self._sums, self._requests, self._question, self._heading = sums, requests, question, heading
        self._setup, (self._index, self._aggregator) = setup, taken
        self.problems: dict[str, Problem] = {**sums.excluded, **waiting}
        for client_id, problem in problems.items():
            self.leave_out(client_id, problem)

    def message_fields(self, client_id: str, outgoing: MessageTensors) -> dict[str, Any]:
        """Return the session, the clients of the masks and the number of the sum."""
        return {"index": self._index, "session": self._setup.session, "members": list(self._aggregator.members)}

    def add(self, client_id: str, words: Words) -> None:
        """Add one client's masked vector.

        Raises
        ------
        FedspanError
            When the client has no part in the masks, or its vector the wrong length.
        """
        self._aggregator.add(client_id, words)

    def leave_out(self, client_id: str, problem: Problem) -> None:
        """Record that a client's vector is not in the sum, and that the client may have lost its keys."""
        self.problems[client_id] = problem
        self._setup.stale = True

    def total(self) -> Words | None:
        """Unmask the sum of the vectors that came, with the help of the clients that sent them.

        Returns
        -------
        np.ndarray or None
            None: clients dealt shares that do not give their secrets, and are left out from now on. The sites have
            been shown the proof, and will help with the same sum without them.

        Raises
        ------
        SumFailed
            When fewer clients than the threshold sent a vector, or helped.
        TooNear
            When the sum is over nearly the same clients as an earlier one.
        """
        from fedspan.privacy.roster import DealersFailed  # which needs the extra `secure`

        # The survivors are named once, and no vector is added from here on. Were another choice of clients ever
        # unmasked, the difference of the two sums would be the vectors of the clients in which they differ. The sites
        # do not rely on this: each refuses a second choice (`SiteStorage.allow_unmasking`).
        survivors = self._aggregator.survivors()
        self._sums.check_roster(self._question, survivors)
        answers = self._unmasking(survivors)
        try:
            return self._aggregator.total(answers)
        except DealersFailed as error:
            # Without signatures nobody could be shown what a client has dealt.
            if not all(self._aggregator.evidence(dealer)[1] for dealer in error.proofs):
                raise
            self._show(error.proofs, [who for who in survivors if who not in error.proofs])
            self._sums.notify(f"{error}; it begins again without {', '.join(error.blamed)}")
            self._sums.exclude(error.blamed)
            return None
        finally:
            for liar, dealer in self._aggregator.liars.items():
                self._sums.notify(
                    f"{liar} revealed a share of {dealer}'s secret that it was not dealt: it was not used"
                )

    def _unmasking(self, survivors: Sequence[str]) -> dict[str, bytes]:
        """Return the survivors' answers; its vector stays in the sum where one does not help."""
        fields: dict[str, Any] = {"survivors": list(survivors)}
        outgoing, asked = MessageTensors(), survivors
        if self._sums.signed_survivors:
            signatures = self._ask("sign", fields, MessageTensors(), survivors, self._read_signature)
            self._check_signed(len(signatures))
            placed = {who: protocol.put_bytes(outgoing, signature) for who, signature in signatures.items()}
            # A site that has not signed reveals nothing.
            fields, asked = {**fields, "signatures": placed}, list(signatures)
        return self._ask("unmask", fields, outgoing, asked, self._read_unmasking)

    def _check_signed(self, count: int) -> None:
        from fedspan.privacy.roster import too_few  # which needs the extra `secure`

        if count < self._aggregator.threshold:
            raise too_few(count, self._aggregator.threshold, "signed the list of survivors")

    def _ask(
        self,
        kind: str,
        fields: Mapping[str, Any],
        outgoing: MessageTensors,
        clients: Sequence[str],
        read: Callable[[str, Reply], bytes],
    ) -> dict[str, bytes]:
        """Send the clients one message about this sum; return what `read` makes of the answers that came."""
        fields = {"kind": kind, "session": self._setup.session, "index": self._index, **fields}
        content = protocol.encode({**self._heading, **fields}, outgoing)
        answers: dict[str, bytes] = {}
        replies = self._requests.exchange(self._question, dict.fromkeys(clients, content))
        for client_id, answer in read_all(replies, read):
            if isinstance(answer, Problem):
                self._setup.stale = True
                self._sums.notify(f"{client_id} does not help to unmask the sum: {answer.reason}")
            else:
                answers[client_id] = answer
        return answers

    def _read_signature(self, client_id: str, reply: Reply) -> bytes:
        signature = protocol.get_bytes(reply.tensors, reply.header["signature"])
        self._aggregator.check_signature(client_id, signature)
        return signature

    def _read_unmasking(self, client_id: str, reply: Reply) -> bytes:
        shares = protocol.get_bytes(reply.tensors, reply.header["unmask"])
        self._aggregator.check_answer(client_id, shares)
        return shares

    def _show(self, proofs: Mapping[str, Mapping[str, bytes]], clients: Sequence[str]) -> None:
        """Send the other clients the proof that these have dealt false shares."""
        outgoing = MessageTensors()

        def put(parts: Mapping[str, bytes]) -> dict[str, int]:
            return {who: protocol.put_bytes(outgoing, part) for who, part in parts.items()}

        described: dict[str, Any] = {}
        for dealer, shares in proofs.items():
            commitments, signature = self._aggregator.evidence(dealer)
            described[dealer] = {
                "commitments": put(commitments),
                "signature": protocol.put_bytes(outgoing, signature),
                "shares": put(shares),
            }
        fields = {"kind": "convict", "session": self._setup.session, "index": self._index, "proofs": described}
        content = protocol.encode({**self._heading, **fields}, outgoing)
        for client_id, reply in self._requests.exchange(self._question, dict.fromkeys(clients, content)):
            if isinstance(reply, Problem):
                self._sums.notify(f"{client_id} does not accept the proof of false shares: {reply.reason}")
