"""The server's side of a federation of real sites, over any transport (`fedspan.wire.transport`).

It waits for sites and for answers no longer than the settings say, leaves out sites that stay silent, and checks every
answer before the round loop sees it. What a round is, and what becomes of
the answers, is the concern of `fedspan.federation.rounds` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.config import Config
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Answer, BroadcastFor, Question, Summed
from fedspan.methods.base import Method
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, ClientState, Tensors, Update
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.layout import Layout
from fedspan.privacy.running_sum import SumSettings
from fedspan.server.checks import Checks, problem
from fedspan.server.masked_sums import Setup, set_up, unmasked
from fedspan.server.registry import SiteRegistry
from fedspan.server.requests import ABSENT, Requests
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement, protocol
from fedspan.wire.transport import Port

__all__ = ["Coordinator"]


class Coordinator:
    """Sites that are reached through a port.

    Parameters
    ----------
    out
        The run's folder: who takes part is written there once, so that a resumed run asks the same clients.
    tell
        Called with a line for people whenever something happened to a site.
    """

    def __init__(self, port: Port, config: Config, method: Method, out: Path, notify: Callable[[str], None]) -> None:
        if method.info.pooled or method.info.alone:
            raise FedspanError(f"method.name = '{method.info.name}' is a control for one process: sites share no data")
        self.port, self.config, self.method, self.notify = port, config, method, notify
        self.registry = SiteRegistry(port, config, method, out / "sites.json", notify)
        self._requests = Requests(self.registry)
        self._initial: Tensors = {}
        self._raw: dict[int, Update] = {}
        self._needed = 0
        self._setup: Setup | None = None

    def gather(self) -> list[Client]:
        """Wait for the federation's sites; who they are, in the order of their ids.

        Raises
        ------
        ValueError
            When too few came in `deployment.wait` seconds.
        """
        return self.registry.gather()

    def agree(
        self, base: str, shapes: Mapping[str, Sequence[int]], initial: Tensors, clients: Sequence[Client]
    ) -> list[Client]:
        """The clients whose base is the server's own; the others are told why and not asked.

        Parameters
        ----------
        initial
            Heads and trained weights of the untouched base.
        """
        self._initial = initial
        return self.registry.agree(base, shapes, clients)

    def enrol(self) -> None:
        """Write down who takes part, where that has not been done by an earlier start of this run."""
        self.registry.enrol()

    def draw(self, drawn: Sequence[Client], clients: Sequence[Client], round_num: int) -> list[Client]:
        """Who is asked in a round for which `drawn` were drawn: they, but for those in quarantine, and some more where
        that is set."""
        self._needed = len(drawn)
        away = self.registry.away(round_num)
        chosen = [c for c in drawn if c.client_id not in away]
        wanted = len(drawn) + math.ceil(self.config.deployment.oversample * len(drawn))
        rest = [c for c in clients if c not in drawn and c.client_id not in away]
        order = np.random.default_rng([self.config.seed, 4, round_num]).permutation(len(rest))
        if (away or wanted > len(drawn)) and self.config.privacy.dp != "client":  # whose coins nothing replaces
            chosen += [rest[i] for i in order[: max(0, wanted - len(chosen))]]
        return chosen

    def ask(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor) -> Iterator[Answer]:
        """The answers in the clients' order, or as they come where the settings allow it."""
        checks = self._checks(question)
        messages = {
            c.client_id: self._message(question, c, broadcast_for(c), checks) for c in self._ready(question, clients)
        }
        waiting = sorted(c.client_id for c in clients)
        by_id = {c.client_id: c for c in clients}
        held: dict[str, Answer] = {c: problem(by_id[c], ABSENT) for c in waiting if c not in messages}
        ordered = self.config.deployment.order == "sorted"
        for client_id, reply in self._requests.go(question, messages, self._enough(question)):
            client = by_id[client_id]
            answer = checks.answer(client, *reply) if isinstance(reply, tuple) else problem(client, reply)
            if not ordered:
                waiting.remove(client_id)
                yield answer
                continue
            held[client_id] = answer
            while waiting and waiting[0] in held:
                yield held.pop(waiting.pop(0))
        yield from (held[client_id] for client_id in waiting)

    def sum(self, question: Question, clients: Sequence[Client], broadcast_for: BroadcastFor, layout: Layout) -> Summed:
        """The sum of the answers; under masks the server sees nothing else.

        Raises
        ------
        ValueError
            When fewer clients stayed than can unmask the sum.
        """
        checks = self._checks(question)
        p, by_id = self.config.privacy, {c.client_id: c for c in clients}
        ready = self._ready(question, clients)
        problems = self._keys(question, ready) if p.secure_sums else {}
        setup = self._setup if p.secure_sums else None
        index = setup.left.pop(0) if setup is not None else 0
        adding: Any = setup.aggregator.sum(index, layout.num_words) if setup is not None else None
        extra: dict[str, Any] = {"layout": layout.to_json(), "num_clients": len(ready), "index": index}
        messages: dict[str, bytes] = {}
        for client in ready:
            if client.client_id in problems or (setup is not None and client.client_id not in setup.clients):
                continue
            messages[client.client_id] = self._message(question, client, broadcast_for(client), checks, extra, setup)
        total = np.zeros(layout.num_words, dtype=np.uint64)
        answers: list[Answer] = []
        for client_id, reply in self._requests.go(question, messages, self._enough(question)):
            checked = checks.words(by_id[client_id], layout.num_words, *reply) if isinstance(reply, tuple) else reply
            if isinstance(checked, str):
                problems[client_id] = checked
                continue
            words, answer = checked
            try:
                if adding is not None:
                    adding.add(client_id, words)
                else:
                    total += words
            except ValueError as error:
                problems[client_id] = str(error)
                continue
            answers.append(answer)
        if setup is not None:
            total = unmasked(self._requests, question, self._head(question), setup, index, adding, self.notify)
        for client_id in sorted(by_id.keys() - {a.client.client_id for a in answers}):
            answers.append(problem(by_id[client_id], problems.get(client_id, ABSENT)))
        answers.sort(key=lambda a: a.client.client_id)
        if setup is not None and problems:
            setup.stale = True
        count = sum(a.problem is None for a in answers)
        if not count:
            return Summed(Partial(), 0.0, answers)
        partial, loss = layout.partial(FixedPoint(p.fraction_bits).decode(total), count)
        return Summed(partial, loss, answers)

    def states(self) -> Mapping[str, ClientState]:
        """Nothing: the sites keep their own."""
        return {}

    def costs(self) -> Mapping[str, Any]:
        """What the round cost on the wire."""
        return self._requests.costs()

    def _keys(self, question: Question, clients: Sequence[Client]) -> dict[str, str]:
        """Have secure sums ready for this round; what was wrong with whom."""
        if question.place[0] or (self._setup is not None and self._setup.serves(clients, question.place[1])):
            return {}
        p = self.config.privacy
        how = SumSettings(FixedPoint(p.fraction_bits), True, p.threshold)
        ahead = min(p.rounds_ahead, self.config.federation.rounds - question.round_num)
        self._setup, problems = set_up(self._requests, how, question, self._head(question), clients, ahead)
        return problems

    def _checks(self, question: Question) -> Checks:
        return Checks(self.config, self.method, question, self._initial, self._raw)

    def _head(self, question: Question) -> dict[str, Any]:
        """What every message of an exchange names."""
        return {
            "run": self.registry.run,
            "round": question.round_num,
            "number": question.number,
            "place": list(question.place),
            "keep": question.keep,
            "terms": agreement.digest(self.registry.terms),
            "base": self.registry.base,
            "rank": question.template.rank,
            "num_clients": question.template.num_clients,
        }

    def _message(
        self,
        question: Question,
        client: Client,
        sent: Broadcast,
        checks: Checks,
        extra: Mapping[str, Any] | None = None,
        setup: Setup | None = None,
    ) -> bytes:
        parcel = protocol.Parcel()
        seen, version = checks.patch_versions(client)
        head = {
            **self._head(question),
            "kind": "ask",
            "counted": question.counted.get(client.client_id, 0),
            "broadcast": protocol.put_broadcast(parcel, sent, checks.derived(client.rank), self.config.wire.down),
            "patch": protocol.put_patch(parcel, sent, seen, version),
        }
        checks.note(client, sent)
        if extra is not None:
            head["sum"] = dict(extra)
            if setup is not None:
                head["sum"]["session"] = setup.session
                shares = setup.handed.pop(client.client_id, None)
                if shares is not None:
                    head["sum"]["shares"] = {name: protocol.put_bytes(parcel, x) for name, x in shares.items()}
        return protocol.encode(head, parcel)

    def _ready(self, question: Question, clients: Sequence[Client]) -> list[Client]:
        """Those of the clients that can be reached, after the wait that the settings allow at the round's start."""
        wait = self.config.deployment.wait if question.place[0] == 0 else 0.0
        began = self.port.now()
        while True:
            here = self.registry.here(clients)
            if len(here) == len(clients) or self.port.now() - began >= wait:
                break
            self.registry.greet()
            self.port.sleep(self.config.deployment.poll)
        for client in clients:
            if client not in here:
                self.registry.note(client.client_id, question.round_num, missed=True)
        return here

    def _enough(self, question: Question) -> int | None:
        """How many answers are waited for: with over-sampling, no more than the round needs."""
        return self._needed if question.place[0] == 0 and self.config.deployment.oversample else None
