"""The server's side of a federation of real sites, over any transport (`fedspan.wire.transport`).

It waits for sites and for answers no longer than the settings say, leaves out sites that stay silent, and checks every
answer before the round loop sees it. The course of a round, and the use made of the answers, are the concern of
`fedspan.federation.rounds` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fedspan.methods.messages import Broadcast, ClientState, Tensors, Update
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.sum_layout import SumLayout
from fedspan.server.checks import AnswerChecks, unusable
from fedspan.server.contents import SiteContents
from fedspan.server.evaluations import Evaluation
from fedspan.server.key_exchange import RunTerms
from fedspan.server.masked_sums import MaskedSums
from fedspan.server.regional_sums import RegionalSums, RelayedMessages
from fedspan.server.registry import SiteRegistry
from fedspan.server.requests import NOT_CONNECTED, Problem, Reply, Requests
from fedspan.server.roster_plan import RosterPlan
from fedspan.server.sums import PlainSum, SumCollector, check_weights, known_weights
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement, protocol
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
        if method.info.pooled or method.info.alone:
            raise FedspanError(f"method.name = '{method.info.name}' is a control for one process: sites share no data")
        if config.privacy.server == "malicious" and not trusted and not config.deployment.regions:
            # It could not tell whose signature is false, and the other sites would refuse the whole sum.
            raise FedspanError(
                "privacy.server = 'malicious': the server has no public keys of the sites; expected sites.json in its "
                "folder (in Python: `trusted`)"
            )
        self.transport, self.method, self._config = transport, method, config
        self._seed, self._weighting, self._wire = config.seed, config.federation.weighting, config.wire
        self._deployment, self._privacy = config.deployment, config.privacy
        terms = agreement.terms(config)
        self._terms_digest = agreement.digest(terms)
        path = out / "sites.json"
        self.registry = SiteRegistry(transport, config.federation, config.deployment, terms, method, path, notify)
        self._requests = Requests(self.registry, config.wire.up)
        self._contents = SiteContents(self.registry, method)
        self._payload_down = 0
        """Bytes of tensors in the messages since the costs were last read."""
        regions = config.deployment.regions
        self._regional = RegionalSums(self._requests, config)
        least = 2
        if config.privacy.secure_sums:
            least = requirements.least_in_sums(config.federation, config.privacy, regions)
        run_terms = RunTerms(config.privacy, config.federation.rounds, least, trusted)
        plan = RosterPlan(config.privacy, least, out / "sums.json", self.registry.notify)
        self._masked_sums = MaskedSums(self._requests, run_terms, plan, self.registry.notify)
        # Apart from those of training: an evaluation asks every client, whoever is in the round.
        self._evaluation_sums = MaskedSums(self._requests, run_terms, plan, self.registry.notify)
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
        messages = _Messages(self, question, checks, self._ready(question, clients), broadcast_for)
        absent = {who: unusable(by_id[who], NOT_CONNECTED) for who in sorted(by_id.keys() - messages.sent.keys())}
        answers = (
            checks.update(by_id[who], reply) if isinstance(reply, Reply) else unusable(by_id[who], reply)
            for who, reply in self._replies(question, messages)
        )
        if self._deployment.order == "sorted":
            yield from _in_order(answers, absent, sorted(by_id))
        else:
            yield from answers
            yield from absent.values()

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
            checks, made = self._checks(question), RelayedMessages(broadcast_for)

            def message(client: Client) -> bytes:
                seen = checks.patch_versions(client)[0]
                return made.of(client, seen, lambda sent: self._message(question, client, sent, checks, relayed=True))

            found = self._regional.collect(question, self._heading(question), ready, message, layout, rank)
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
        regional = self._regional if self._config.deployment.regions else None
        heading = self._heading(question)
        asking = Evaluation(self._requests, question, heading, terms, whole, self._privacy, sums, regional)
        checks = self._checks(question)
        return asking.collect(clients, broadcast_for, checks.derived, self._wire.down)

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
        payload, self._payload_down = self._payload_down, 0
        return {**self._requests.costs(), "payload_down": payload}

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
        messages = _Messages(self, question, checks, asked, broadcast_for, sum_fields)
        answers: dict[str, Answer] = {}
        for client_id, reply in self._replies(question, messages):
            part = checks.words(by_id[client_id], num_words, reply) if isinstance(reply, Reply) else reply
            if isinstance(part, Problem):
                collector.leave_out(client_id, part)
                continue
            words, answer = part
            try:
                collector.add(client_id, words)
            except FedspanError as error:
                # One client's bad vector must not end the sum of all the others.
                collector.leave_out(client_id, Problem(str(error)))
            else:
                answers[client_id] = answer
        return answers

    def _replies(self, question: Question, messages: _Messages) -> Iterator[tuple[str, Reply | Problem]]:
        """Send the messages and yield the replies, after noting what the sites hold now."""
        for client_id, reply in self._requests.exchange(question, messages, self._enough(question), messages.whole):
            if isinstance(reply, Reply):
                self._contents.answered(client_id, reply.header.get("stored", False))
            yield client_id, reply

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

    def _message(
        self,
        question: Question,
        client: Client,
        sent: Broadcast,
        checks: AnswerChecks,
        sum_fields: Callable[[str, MessageTensors], dict[str, Any]] | None = None,
        relayed: bool = False,
    ) -> bytes:
        """Return the message that asks one client, and have `checks` expect its answer.

        Parameters
        ----------
        relayed
            It goes to a region, for all of its clients that are sent the same: with every tensor in it.
        sum_fields
            (client, the message's tensors) -> the description of the sum that it is to take part in; None: the client
            is asked for its own update.
        """
        outgoing, derived = MessageTensors(), checks.derived(client.rank)
        seen, version = checks.patch_versions(client)
        described = protocol.put_broadcast(outgoing, sent, derived, self._wire.down)
        head = {
            **self._heading(question),
            "kind": "ask",
            "counted": question.counted.get(client.client_id, 0),
            "broadcast": described,
            "patch": protocol.put_patch(outgoing, sent, seen, version),
        }
        if relayed:
            head |= {"counted": 0, "held": [], "store": []}
        else:
            head |= self._contents.name(question, client.client_id, sent, derived, described, outgoing)
        # From the broadcast that is sent, so that what is asked for and what is accepted cannot differ.
        checks.expect(client, sent)
        if sum_fields is not None:
            head["sum"] = sum_fields(client.client_id, outgoing)
        self._payload_down += outgoing.payload()
        return protocol.encode(head, outgoing)

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


class _Messages(Mapping[str, bytes]):
    """The messages of one exchange by client, each made when it is looked up, and again where it is sent once more."""

    def __init__(
        self,
        coordinator: Coordinator,
        question: Question,
        checks: AnswerChecks,
        clients: Sequence[Client],
        broadcast_for: BroadcastFor,
        sum_fields: Callable[[str, MessageTensors], dict[str, Any]] | None = None,
    ) -> None:
        self._coordinator, self._question, self._checks = coordinator, question, checks
        self._clients, self._sum_fields = {c.client_id: c for c in clients}, sum_fields
        coordinator._contents.begin(question)
        self.sent = {c.client_id: broadcast_for(c) for c in clients}
        """By client."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.sent)

    def __len__(self) -> int:
        return len(self.sent)

    def __getitem__(self, client_id: str) -> bytes:
        client, sent = self._clients[client_id], self.sent[client_id]
        return self._coordinator._message(self._question, client, sent, self._checks, self._sum_fields)

    def whole(self, client_id: str) -> bytes:
        """Return a client's message with all of its tensors."""
        self._coordinator._contents.forget(client_id)
        return self[client_id]


def _in_order(answers: Iterable[Answer], early: dict[str, Answer], ids: list[str]) -> Iterator[Answer]:
    """Yield answers in the order of `ids`, each as soon as all before it are known.

    Floating-point sums depend on their order, and the order of arrival is never the same twice.

    Parameters
    ----------
    early
        The answers that are known beforehand.
    ids
        Every client, in order.
    """
    waiting, known = list(ids), dict(early)
    for answer in answers:
        known[answer.client.client_id] = answer
        while waiting and waiting[0] in known:
            yield known.pop(waiting.pop(0))
    yield from (known[client_id] for client_id in waiting)
