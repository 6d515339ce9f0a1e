"""The server of one region: it greets its sites, passes on what they are asked, and answers with their sum.

Upwards it speaks as a site does, in bytes that are answered by bytes; downwards it is a server with a transport, a
registry, and secure sums of its own. It knows neither base nor data, and does not read the tensors that it passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedspan.config import Config
from fedspan.federation import requirements
from fedspan.federation.clients import Client
from fedspan.regions.kept_answer import KeptAnswer, fingerprint
from fedspan.regions.relayed_question import RelayedQuestion
from fedspan.regions.sums_of_run import SumsOfRun
from fedspan.server.regional_sums import GREETING
from fedspan.server.registry import Member, SiteRegistry
from fedspan.server.requests import NOT_CONNECTED, MadeWhenSent, Problem, Reply, Requests
from fedspan.server.sums import SumCollector, words_of
from fedspan.site.errors import Refused, code_of
from fedspan.site.incidents import refusal
from fedspan.site.logged import SiteLog
from fedspan.site.settings import SiteSettings
from fedspan.support.errors import FedspanError, one_line
from fedspan.wire import agreement, protocol, schema
from fedspan.wire.protocol import MessageTensors
from fedspan.wire.refusals import Code
from fedspan.wire.transport import Transport

Fields = dict[str, Any]
_NEVER = 2**31


class RegionalServer:
    """Answers the messages of the server above about the sites of one region.

    Parameters
    ----------
    name
        The region, one of `deployment.regions`.
    transport
        Reaches the region's sites.
    folder
        Keeps which sites were in which sums, for a server that is started again.
    notify
        Called with lines for the people at this server.
    trusted
        Public identity keys of the region's sites, as of `Coordinator`.
    uplink
        The folder of its way up, whose `events.jsonl` has every message of the server above; none: there is no such
        log. What it says to its own sites is in the log of its transport (`fedspan.server.logged_transport`).

    Raises
    ------
    FedspanError
        When the settings name no such region, or the method cannot be summed region by region.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        transport: Transport,
        folder: Path,
        notify: Callable[[str], None],
        trusted: Mapping[str, bytes] | None = None,
        uplink: Path | None = None,
    ) -> None:
        regions = config.deployment.regions
        if name not in regions:
            expected = f"one of {', '.join(regions)}" if regions else "deployment.regions with its clients"
            raise FedspanError(f"the region {name!r}: expected {expected}")
        if config.privacy.server == "malicious" and not trusted:
            raise FedspanError(
                "privacy.server = 'malicious': the region's server has no public keys of its sites; expected "
                "sites.json in its folder (in Python: `trusted`)"
            )
        self.name, self._clients = name, regions[name]
        self._config, self._folder, self._trusted = config, folder, trusted
        method = requirements.chosen(config)
        self._evaluation = len(method.exchanges)
        self._terms = agreement.digest(agreement.terms(config))
        # Below it there are no regions: every site answers for itself. It is the server above that leaves out silent
        # sites, and it waits for this server's greetings, which therefore take half as long at most.
        wait = min(config.deployment.wait / 2, GREETING)
        below = config.deployment.model_copy(update={"regions": {}, "wait": wait, "patience": _NEVER})
        self._registry = SiteRegistry(
            transport, config.federation, below, agreement.terms(config), method, folder / "sites.json", notify
        )
        self._notify = self._registry.notify
        self._requests = Requests(self._registry)
        self._sums: SumsOfRun | None = None
        self._kept: KeptAnswer | None = None
        self._log: SiteLog | None = None
        if uplink is not None:
            own = SiteSettings(config, name, trusted=trusted)
            self._log = SiteLog(uplink, name, own, self._terms, self._notify)
        self._handlers: Mapping[str, Callable[[Mapping[str, Any], Sequence[Tensor], MessageTensors], Fields]] = {
            "hello": self._hello,
            "relay": self._relay,
        }

    def answer(self, content: bytes) -> bytes:
        """Return the answer to one message; that there is none is an answer too, as of a site."""
        try:
            return self._reply(content) if self._log is None else self._log.answered(content, self._reply)
        except Exception as error:  # a message that cannot be written down is not acted on
            return refusal(self.name, code_of(error), error, self._notify)

    def _reply(self, content: bytes) -> bytes:
        try:
            head, tensors = protocol.decode(content)
            kind, message = schema.question(head)
            if kind not in self._handlers:
                raise Refused(f"a message of kind {kind!r} for a region: expected one of {', '.join(self._handlers)}")
            outgoing = MessageTensors()
            fields = self._handlers[kind](message, tensors, outgoing)
            fields |= {key: message[key] for key in ("run", "round", "number") if key in message}
            return protocol.encode({"client_id": self.name, **fields}, outgoing)
        except Exception as error:
            return refusal(self.name, code_of(error), error, self._notify)

    def _hello(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        """Introduce the sites that are here; what several of them have in common is described once."""
        self._registry.greet()
        forms: list[dict[str, Any]] = []
        members: list[dict[str, Any]] = []
        secret = self._config.privacy.secure_sums or self._config.privacy.dp == "client"
        for client_id, member in sorted(self._own_members().items()):
            form = {
                "terms": dict(member.terms),
                "shapes": {name: list(shape) for name, shape in member.shapes.items()},
                "base": member.base,
                "labels": member.labels,
            }
            if form not in forms:
                forms.append(form)
            members.append(
                {
                    "client_id": client_id,
                    "rank": member.client.rank,
                    "num_examples": None if secret else member.client.num_examples,
                    "form": forms.index(form),
                }
            )
        return {"members": members, "forms": forms}

    def _own_members(self) -> dict[str, Member]:
        return {who: member for who, member in self._registry.members.items() if who in self._clients}

    def _relay(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        if message["terms"] != self._terms:
            raise Refused("a question for other settings than this region's", Code.OTHER_SETTINGS)
        asked = RelayedQuestion.read(message, tensors)
        if strange := sorted(asked.messages.keys() - set(self._clients)):
            raise Refused(f"a question to {', '.join(strange[:3])}, which {self.name} has not: deployment.regions")
        mark = fingerprint(message, asked.contents)
        if self._kept is not None and self._kept.question == mark:
            self._notify(f"round {message['round'] + 1}: the same question once more, which has the same answer")
            return {**self._kept.fields, "words": outgoing.put(self._kept.words)}
        self._kept = None
        words, fields = self._answer_to(asked)
        if words is None:
            return fields
        if not fields["relayed"]["problems"]:  # whoever was absent is asked again, with the question
            self._kept = KeptAnswer(mark, fields, words)
        return {**fields, "words": outgoing.put(words)}

    def _answer_to(self, asked: RelayedQuestion) -> tuple[Tensor | None, Fields]:
        """Ask the sites, and return their sum as it travels with the other fields of the answer."""
        began = self._registry.transport.now()
        # A site that came back as another node is a member still, under the node that it had.
        if len(self._reachable(asked)) < len(asked.messages):
            self._registry.greet()
        words, answers, problems = self._summed(asked, self._sums_of(asked.run))
        described = {who: (p.reason, p.absent) for who, p in problems.items()}
        seconds = self._registry.transport.now() - began
        return words, {"seconds": seconds, "relayed": {"answers": answers, "problems": described}}

    def _sums_of(self, run: str) -> SumsOfRun:
        if self._sums is None or self._sums.run != run:
            self._registry.run = run
            self._sums = SumsOfRun(
                run, self._config, len(self._clients), self._requests, self._folder, self._trusted, self._notify
            )
        return self._sums

    def _reachable(self, asked: RelayedQuestion) -> list[Client]:
        members = self._own_members()
        return self._registry.reachable([members[who].client for who in asked.messages if who in members])

    def _summed(
        self, asked: RelayedQuestion, sums: SumsOfRun
    ) -> tuple[Tensor | None, dict[str, tuple[float, int]], dict[str, Problem]]:
        """Return the sum as it travels, who is in it, and the problems of the others.

        Where there is no sum, such as one of too few sites, nobody is in it, and each has the reason for its problem.
        """
        ready = self._reachable(asked)
        problems = {who: NOT_CONNECTED for who in asked.messages.keys() - {c.client_id for c in ready}}
        answers: dict[str, tuple[float, int]] = {}
        try:
            total = None
            while total is None and ready:  # without the clients that were proved to lie, every time
                collector = sums.begin(asked, ready, evaluation=asked.question.number == self._evaluation)
                answers = self._collected(asked, [c.client_id for c in ready], collector)
                total = collector.total()
                problems |= {c.client_id: collector.problems.get(c.client_id, NOT_CONNECTED) for c in ready}
        except FedspanError as error:
            self._notify(f"round {asked.question.round_num + 1}: no sum of the region {self.name}: {one_line(error)}")
            return None, {}, {**{c.client_id: Problem(str(error)) for c in ready}, **problems}
        words = sums.tensor_of(total) if total is not None and answers else None
        return words, answers, {who: problem for who, problem in problems.items() if who not in answers}

    def _collected(
        self, asked: RelayedQuestion, ids: Sequence[str], collector: SumCollector
    ) -> dict[str, tuple[float, int]]:
        """Ask the sites for their parts and add those that are right; return the seconds and bytes of the sites."""
        messages = MadeWhenSent(
            [who for who in ids if who not in collector.problems], lambda who: asked.content(who, collector)
        )
        answers: dict[str, tuple[float, int]] = {}
        for who, reply in self._requests.exchange(asked.question, messages):
            added = reply if isinstance(reply, Problem) else self._added(asked, who, reply, collector)
            if isinstance(added, Problem):
                collector.leave_out(who, added)
            else:
                answers[who] = added
        return answers

    @staticmethod
    def _added(asked: RelayedQuestion, who: str, reply: Reply, collector: SumCollector) -> tuple[float, int] | Problem:
        try:
            collector.add(who, words_of(reply, asked.layout.num_words))
        except FedspanError as error:
            return Problem(str(error))
        return reply.header.get("seconds", 0.0), reply.header.get("optimizer_bytes", 0)
