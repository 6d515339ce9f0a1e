"""One evaluation by a federation's sites: every site is sent what it would train from, and answers with statistics.

Where only sums may be known, a site's statistics are its part of a sum of their own, under masks where the settings say
so. The keys of these sums are apart from those of training, since other sites take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedspan.config import PrivacyConfig
from fedspan.data.metric_blocks import Vector
from fedspan.federation.clients import Client
from fedspan.federation.exchange import BroadcastFor
from fedspan.federation.held_out import Collected, HeldOutTerms
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.server.broadcast_messages import BroadcastMessages, MessageForm, SumFields
from fedspan.server.contents import SiteContents
from fedspan.server.masked_sums import MaskedSums
from fedspan.server.regional_sums import RegionalQuestion, RegionalSums, RelayedMessages
from fedspan.server.requests import NOT_CONNECTED, Problem, Reply, Requests
from fedspan.server.sums import PlainSum, SumCollector, check_weights
from fedspan.support.errors import FedspanError
from fedspan.wire.protocol import DAMAGED, MessageTensors


@dataclass(slots=True)
class Evaluation:
    """One evaluation, from its messages to what came back."""

    requests: Requests
    contents: SiteContents
    form: MessageForm
    terms: HeldOutTerms
    privacy: PrivacyConfig
    masked: MaskedSums | None
    """Makes the sums of evaluations, where they are under masks."""
    regional: RegionalSums | None = None
    """Asks the servers of regions, where the federation has some."""
    problems: dict[str, Problem] = field(default_factory=dict)
    """Client -> the reason why it is not in the figures."""

    def collect(self, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Collected:
        """Ask those of the clients that can be reached; nobody is waited for who is not there.

        Raises
        ------
        FedspanError
            When fewer clients stayed than can unmask the sum, or the sum is not one of statistics.
        """
        registry = self.requests.registry
        registry.greet()
        away = registry.quarantined(self.form.question.round_num)
        ready = [client for client in registry.reachable(clients) if client.client_id not in away]
        self.problems = {client.client_id: NOT_CONNECTED for client in clients if client not in ready}
        if self.regional is not None:
            found = self._regions_sum(self.regional, ready, broadcast_for)
        else:
            found = self._sum(ready, broadcast_for) if self.terms.sums else self._open(ready, broadcast_for)
        reasons = {name: problem.reason for name, problem in sorted(self.problems.items())}
        return Collected(found.by_client, found.total, found.num_clients, reasons)

    def _messages(
        self, asked: Sequence[Client], broadcast_for: BroadcastFor, sum_fields: SumFields | None = None
    ) -> BroadcastMessages:
        return BroadcastMessages(self.requests, self.contents, self.form, asked, broadcast_for, sum_fields)

    def _open(self, ready: Sequence[Client], broadcast_for: BroadcastFor) -> Collected:
        by_client: dict[str, Vector] = {}
        for client_id, reply in self._messages(ready, broadcast_for).replies():
            vector = self._vector(reply) if isinstance(reply, Reply) else reply
            if isinstance(vector, Problem):
                self.problems[client_id] = vector
            else:
                by_client[client_id] = vector
        return Collected(by_client, None, len(by_client))

    def _vector(self, reply: Reply) -> Vector | Problem:
        """Return one client's statistics, or the problem with them."""
        try:
            words = _words(reply, "statistics", self.terms.size)
        except DAMAGED as error:
            return Problem(f"sent damaged statistics ({type(error).__name__}: {error})")
        vector = words.view(np.float64)
        problem = self.terms.problem(vector)
        return vector if problem is None else Problem(problem)

    def _sum(self, ready: Sequence[Client], broadcast_for: BroadcastFor) -> Collected:
        if not ready:
            return Collected()
        rank = max(client.rank for client in ready)
        total: Words | None = None
        answered: list[str] = []
        while total is None:  # without the clients that were proved to lie, every time
            collector = self._collector(ready, rank)

            def fields(client_id: str, outgoing: MessageTensors, collector: SumCollector = collector) -> dict[str, Any]:
                return {"rank": rank, **collector.message_fields(client_id, outgoing)}

            asked = [client for client in ready if client.client_id not in collector.problems]
            answered = self._added(self._messages(asked, broadcast_for, fields), collector)
            total = collector.total()
        self.problems |= {name: problem for name, problem in collector.problems.items() if name not in answered}
        return self._of_total(total, answered)

    def _regions_sum(self, regional: RegionalSums, ready: Sequence[Client], broadcast_for: BroadcastFor) -> Collected:
        """Return the sum of what the regions answer with, each for its own clients."""
        if not ready:
            return Collected()
        rank, ones = max(client.rank for client in ready), {client.client_id: 1.0 for client in ready}
        layout = self.terms.sum_layout()
        message, form = RelayedMessages(self.requests, self.form, broadcast_for).of, self.form
        found = regional.collect(RegionalQuestion(form.question, form.heading, ready, message, layout, rank, ones))
        self.problems |= found.problems
        return self._of_total(found.total, list(found.shares))

    def _of_total(self, total: Words, answered: Sequence[str]) -> Collected:
        """Return the statistics in the sum of these clients' words."""
        if not answered:
            return Collected()
        numbers = FixedPoint(self.privacy.fraction_bits).decode(total)
        check_weights(numbers, len(answered), float(len(answered)))
        vector = self.terms.of_sum(numbers)
        if (problem := self.terms.problem_of_sum(vector)) is not None:
            raise FedspanError(f"the sum of {len(answered)} clients is not one of statistics: it {problem}")
        return Collected({}, vector, len(answered))

    def _collector(self, ready: Sequence[Client], rank: int) -> SumCollector:
        layout = self.terms.sum_layout()
        if self.masked is not None:
            return self.masked.begin(self.form.question, self.form.heading, ready, layout, rank)
        point = FixedPoint(self.privacy.fraction_bits)
        return PlainSum(layout.num_words, point, len(ready), {client.client_id: 1.0 for client in ready})

    def _added(self, messages: BroadcastMessages, collector: SumCollector) -> list[str]:
        """Ask for the parts of a sum and add those that are right; return the clients in it."""
        answered: list[str] = []
        for client_id, reply in messages.replies():
            if isinstance(reply, Problem):
                collector.leave_out(client_id, reply)
                continue
            try:
                collector.add(client_id, _words(reply, "words", self.terms.sum_layout().num_words))
            except DAMAGED as error:
                collector.leave_out(client_id, Problem(f"sent a damaged vector ({type(error).__name__}: {error})"))
            else:
                answered.append(client_id)
        return answered


def _words(reply: Reply, name: str, size: int) -> Words:
    """Return the numbers of an answer, as the 64-bit words in which they travel.

    Raises
    ------
    FedspanError
        When they are of another type or number.
    """
    header: dict[str, Any] = dict(reply.header)
    vector = reply.tensors[header[name]]
    if str(vector.dtype) != "torch.int64" or tuple(vector.shape) != (size,):
        raise FedspanError(f"{vector.dtype} in shape {tuple(vector.shape)}: expected {size} words")
    words: Words = vector.contiguous().numpy().view(np.uint64)
    return words
