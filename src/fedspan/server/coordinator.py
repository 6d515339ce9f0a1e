"""The server's side of a federation of real sites, over any transport (`fedspan.wire.transport`).

It waits for sites and for answers no longer than the settings say, leaves out sites that stay silent, and checks every
answer before the round loop sees it. The course of a round, and the use made of the answers, are the concern of
`fedspan.federation.rounds` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.config import Config
from fedspan.federation import requirements
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Answer, BroadcastFor, Question, Summed
from fedspan.federation.held_out import Collected, HeldOutTerms
from fedspan.methods.base import Method
from fedspan.methods.folds import Partial
from fedspan.methods.messages import ClientState, Tensors, Update
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.sum_layout import SumLayout
from fedspan.server.broadcast_messages import BroadcastMessages, MessageForm, SumFields
from fedspan.server.checks import AnswerChecks, unusable
from fedspan.server.contents import SiteContents
from fedspan.server.early_replies import EarlyReplies, clear_early, in_order
from fedspan.server.evaluations import Evaluation
from fedspan.server.key_exchange import RunTerms
from fedspan.server.masked_sums import MaskedSums
from fedspan.server.regional_sums import RegionalQuestion, RegionalSums, RelayedMessages
from fedspan.server.registry import SiteRegistry
from fedspan.server.requests import NOT_CONNECTED, Problem, Reply, Requests
from fedspan.server.roster_plan import RosterPlan
from fedspan.server.sums import PlainSum, SumCollector, check_weights, known_weights
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement
from fedspan.wire.protocol import MessageTensors
from fedspan.wire.transport import Transport

__all__ = ["Coordinator"]


class Coordinator:
    """The sites of a run, which are reached through a transport.

    Parameters
    ----------
    out
        The run's folder: the list of clients is written there once, so that a resumed run asks the same ones.
    notify
        Called with a line for people whenever something happens to a site.
    trusted
        Public identity keys by client: keys for secure sums that are not signed with them are not passed on to the
        other sites, which would refuse the whole sum.
    """

    def __init__(
        self,
        transport: Transport,
        config: Config,
        method: Method,
        out: Path,
        notify: Callable[[str], None],
        trusted: Mapping[str, bytes] | None = None,
    ) -> None:
        requirements.check_between_sites(method)
        if config.privacy.server == "malicious" and not trusted and not config.deployment.regions:
            # It could not tell whose signature is false, and the other sites would refuse the whole sum.
            raise FedspanError(
                "privacy.server = 'malicious': the server has no public keys of the sites; expected sites.json in its "
                "folder (in Python: `trusted`)"
            )
        self.transport, self.method, self._config = transport, method, config
        self._seed, self._weighting, self._wire = config.seed, config.federation.weighting, config.wire
        self._deployment, self._privacy = config.deployment, config.privacy
        self._early, self._round_memory = out / ".early", config.engine.round_memory
        terms = agreement.terms(config)
        self._terms_digest = agreement.digest(terms)
        path = out / "sites.json"
        self.registry = SiteRegistry(transport, config.federation, config.deployment, terms, method, path, notify)
        self._requests = Requests(self.registry, config.wire.up)
        self._contents = SiteContents(self.registry, method)
        self._regional = RegionalSums(self._requests, config)
        least = requirements.least_in_sums(config.federation, config.privacy) if config.privacy.secure_sums else 2
        run_terms = RunTerms(config.privacy, config.federation.rounds, least, trusted)
        plan = RosterPlan(config.privacy, least, out / "sums.json", self.registry.notify)
        self._masked_sums = MaskedSums(self._requests, run_terms, plan, self.registry.notify)
        # Apart from those of training: an evaluation asks every client, whoever is in the round.
        self._evaluation_sums = MaskedSums(self._requests, run_terms, plan, self.registry.notify)
        clear_early(self._early)
        self._initial: Tensors = {}
        # Here and not in the checks of one exchange: a later exchange of a round asks about the same training result.
        self._results: dict[int, Update] = {}
        self._needed = 0
        """Answers that the current round needs."""

    def gather(self) -> list[Client]:
        """Wait for the federation's sites and return their clients, in the order of their ids.

        Raises
        ------
        FedspanError
            When too few came in `deployment.wait` seconds.
        """
        return self.registry.gather()

    def agree(
        self, base: str, labels: str, shapes: Mapping[str, Sequence[int]], initial: Tensors, clients: Sequence[Client]
    ) -> list[Client]:
        """Return the clients whose base and labels are the server's; the others are reported, and not asked any more.

        Parameters
        ----------
        base
            Digest of the server's untouched base.
        labels
            Digest of what the labels of the server's data mean, as `agreement.labels` gives it.
        initial
            Heads and trained weights of the untouched base.

        Raises
        ------
        FedspanError
            When fewer clients agree than `federation.min_success`.
        """
        self._initial = initial
        return self.registry.agree(base, labels, shapes, clients)

    def enrol(self) -> None:
        """Write down the clients that take part, unless an earlier start of this run has done so."""
        self.registry.enrol()

    def draw(self, drawn: Sequence[Client], clients: Sequence[Client], round_num: int) -> list[Client]:
        """Return the clients to ask in a round for which the sampler drew `drawn`.

        Clients in quarantine are replaced by others, and `deployment.oversample` adds some more.
        """
        self._needed = len(drawn)
        away = self.registry.quarantined(round_num)
        chosen = [c for c in drawn if c.client_id not in away]
        wanted = len(drawn) + math.ceil(self._deployment.oversample * len(drawn))
        # Client-level privacy is accounted for one independent coin per client and round. A replacement would have a
        # higher chance than its coin, and one that depends on the others, so the ε that is reported would be wrong.
        if self._privacy.dp == "client" or (not away and wanted == len(drawn)):
            return chosen
        rest = [c for c in clients if c not in drawn and c.client_id not in away]
        # A key of its own, so that the choice of replacements does not depend on the sampler's numbers.
        order = np.random.default_rng([self._seed, 4, round_num]).permutation(len(rest))
        return chosen + [rest[i] for i in order[: max(0, wanted - len(chosen))]]

    def ask(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """Yield the answers in the order of the clients' ids, or as they come where the settings allow it."""
        checks = self._checks(question)
        by_id = {c.client_id: c for c in clients}
        messages = self._messages(checks, self._ready(question, clients), broadcast_for, checks.answer_bytes)
        absent = dict.fromkeys(sorted(by_id.keys() - messages.sent.keys()), NOT_CONNECTED)
        replies = messages.replies(self._enough(question))
        if self._deployment.order == "sorted":
            room = self._round_memory
            limit = None if room == "auto" else int(room * 2**30)
            read = partial(self._requests.read, question)
            replies = in_order(replies, absent, sorted(by_id), EarlyReplies(self._early, limit, read))
        else:
            replies = chain(replies, absent.items())
        # Not a loop, whose variable would hold each answer while the next one comes.
        yield from starmap(lambda who, reply: checks.answer(by_id[who], reply), replies)

    def sum(
        self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor, layout: SumLayout
    ) -> Summed:
        """Return the sum of the answers; under masks the server sees nothing else.

        Raises
        ------
        FedspanError
            When fewer clients stayed than can unmask the sum.
        """
        ready, rank = self._ready(question, clients), max(client.rank for client in clients)
        total, answers, problems = self._added_up(question, ready, broadcast_for, layout, rank)
        # Counted before the others are entered as absent: the divisor is the number of vectors in the sum.
        count, known = len(answers), self._known_weights(client for client in ready if client.client_id in answers)
        for client in clients:
            if client.client_id not in answers:
                answers[client.client_id] = unusable(client, problems.get(client.client_id, NOT_CONNECTED))
        ordered = [answers[client_id] for client_id in sorted(answers)]
        if not count:
            return Summed(Partial(), 0.0, ordered)
        numbers = FixedPoint(self._privacy.fraction_bits).decode(total)
        check_weights(numbers, count, sum(known.values()) if len(known) == count else None)
        partial, loss = layout.partial(numbers, count)
        return Summed(partial, loss, ordered)

    def _added_up(
        self, question: Question, ready: Sequence[Client], broadcast_for: BroadcastFor, layout: SumLayout, rank: int
    ) -> tuple[Words, dict[str, Answer], Mapping[str, Problem]]:
        """Return the sum of the clients' words, the answers of those in it, and the problems of the others."""
        if self._config.deployment.regions:
            form = self._form(self._checks(question), lambda region: 8 * layout.num_words)
            message = RelayedMessages(self._requests, form, broadcast_for).of
            found = self._regional.collect(RegionalQuestion(question, form.heading, ready, message, layout, rank))
            return found.total, found.answers(ready, layout.num_words), found.problems
        while True:  # without the clients that were proved to lie, every time
            collector = self._collector(question, ready, layout, rank)
            answers = self._collect(question, ready, broadcast_for, (rank, layout.num_words), collector)
            total = collector.total()
            if total is not None:
                return total, answers, collector.problems

    def evaluate(
        self,
        question: Question,
        clients: Sequence[Client],
        broadcast_for: BroadcastFor,
        terms: HeldOutTerms,
        whole: bool,
    ) -> Collected:
        """Return the statistics of what these clients receive, on rows of their own; see `server.evaluations`.

        Raises
        ------
        FedspanError
            When fewer clients stayed than can unmask a sum of them.
        """
        sums = self._evaluation_sums if self._privacy.secure_sums else None
        fields = {"kind": "evaluate", "whole": whole}
        derived, down, size = self._checks(question).derived, self._wire.down, 8 * terms.size
        # What is judged between rounds is what the next round begins from, and what the last evaluation may ask about.
        form = MessageForm(
            question,
            self._heading(question),
            fields,
            derived,
            down,
            keep=not whole,
            answer_bytes=lambda _: size,
        )
        regional = self._regional if self._config.deployment.regions else None
        asking = Evaluation(self._requests, self._contents, form, terms, self._privacy, sums, regional)
        return asking.collect(clients, broadcast_for)

    def _collector(self, question: Question, ready: Sequence[Client], layout: SumLayout, rank: int) -> SumCollector:
        """Return what adds up the clients' parts, under masks or in the open."""
        if self._privacy.secure_sums:
            return self._masked_sums.begin(question, self._heading(question), ready, layout, rank)
        fixed_point = FixedPoint(self._privacy.fraction_bits)
        return PlainSum(layout.num_words, fixed_point, max(len(ready), 1), self._known_weights(ready))

    def _known_weights(self, clients: Iterable[Client]) -> dict[str, float]:
        """Return what each client counts for, where the server knows it."""
        return known_weights(self._config, clients)

    def states(self) -> Mapping[str, ClientState]:
        """Return nothing: the sites keep their own states."""
        return {}

    def costs(self) -> Mapping[str, Any]:
        """Return the bytes sent and the time waited since the last call."""
        return self._requests.costs()

    def _collect(
        self,
        question: Question,
        ready: Sequence[Client],
        broadcast_for: BroadcastFor,
        size: tuple[int, int],
        collector: SumCollector,
    ) -> dict[str, Answer]:
        """Ask for the parts of a sum and add those that are right; return the answers of the clients in it.

        Parameters
        ----------
        size
            The rank of the sum's layout, from which every site derives it, and the number of words.
        """
        checks, by_id, (rank, num_words) = self._checks(question), {c.client_id: c for c in ready}, size

        def sum_fields(client_id: str, outgoing: MessageTensors) -> dict[str, Any]:
            return {"rank": rank, **collector.message_fields(client_id, outgoing)}

        asked = [c for c in ready if c.client_id not in collector.problems]
        messages = self._messages(checks, asked, broadcast_for, lambda client_id: 8 * num_words, sum_fields)

        def added(client_id: str, reply: Reply | Problem) -> Answer | None:
            part = checks.words(by_id[client_id], num_words, reply) if isinstance(reply, Reply) else reply
            if isinstance(part, Problem):
                collector.leave_out(client_id, part)
                return None
            words, answer = part
            try:
                collector.add(client_id, words)
            except FedspanError as error:
                # One client's bad vector must not end the sum of all the others.
                collector.leave_out(client_id, Problem(str(error)))
                return None
            return answer

        # Not a loop, whose variable would hold each vector while the next one comes.
        answers = starmap(added, messages.replies(self._enough(question)))
        return {answer.client.client_id: answer for answer in answers if answer is not None}

    def _messages(
        self,
        checks: AnswerChecks,
        clients: Sequence[Client],
        broadcast_for: BroadcastFor,
        answer_bytes: Callable[[str], int],
        sum_fields: SumFields | None = None,
    ) -> BroadcastMessages:
        """Return the messages of an exchange of training, whose answers `checks` expects."""
        form = self._form(checks, answer_bytes)
        # Expected from the broadcast that is sent, so that what is asked for and what is accepted cannot differ.
        return BroadcastMessages(
            self._requests, self._contents, form, clients, broadcast_for, sum_fields, checks.expect
        )

    def _form(self, checks: AnswerChecks, answer_bytes: Callable[[str], int]) -> MessageForm:
        question, heading, down = checks.question, self._heading(checks.question), self._wire.down
        return MessageForm(question, heading, {"kind": "ask"}, checks.derived, down, answer_bytes=answer_bytes)

    def _checks(self, question: Question) -> AnswerChecks:
        return AnswerChecks(self.method, question, self._initial, self._results, self._weighting, self._wire.up)

    def _heading(self, question: Question) -> dict[str, Any]:
        """Return the fields that every message of an exchange has."""
        return {
            "run": self.registry.run,
            "round": question.round_num,
            "number": question.number,
            "place": list(question.place),
            "keep": question.keep,
            "terms": self._terms_digest,
            "base": self.registry.base,
            "rank": question.template.rank,
            "num_clients": question.template.num_clients,
        }

    def _ready(self, question: Question, clients: Sequence[Client]) -> list[Client]:
        """Return those of the clients that can be reached, after waiting for the others as long as the settings allow.

        Only a round's first exchange waits: a site that leaves later has probably lost the results asked about.
        """
        wait = self._deployment.wait if question.place[0] == 0 else 0.0
        began = self.transport.now()
        while True:
            ready = self.registry.reachable(clients)
            if len(ready) == len(clients) or self.transport.now() - began >= wait:
                break
            # A site that lost its connection may be back as a node of another name, which only a greeting tells.
            self.registry.greet()
            self.transport.sleep(self._deployment.poll)
        for client in clients:
            if client not in ready:
                self.registry.record(client.client_id, question.round_num, missed=True)
        return ready

    def _enough(self, question: Question) -> int | None:
        """Return the number of answers to wait for: with over-sampling, no more than the round needs.

        Later exchanges are waited for in full, since they ask only the clients whose first answer was in time.
        """
        return self._needed if question.place[0] == 0 and self._deployment.oversample else None
