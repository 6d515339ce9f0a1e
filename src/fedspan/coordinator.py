"""The server's side of a federation of real sites, over any transport (`fedspan.port`).

It waits for sites and for answers no longer than the settings say, leaves out sites that stay silent, and checks every
answer before the round loop sees it. What a round is, and what becomes of the answers, is `fedspan.rounds`' alone.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan import agreement, protocol
from fedspan.checkpoint import write_bytes
from fedspan.config import Config
from fedspan.federation import Client
from fedspan.methods.base import Method
from fedspan.methods.folds import Partial
from fedspan.methods.messages import Broadcast, ClientState, Factors, Request, Tensors, Update
from fedspan.narrow import packed_bytes
from fedspan.port import Delivery, Port
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.summing import Layout, Sum
from fedspan.sites import Answer, Question, Summed, Tell, begin, unlearnt

_NONE = np.zeros(0, dtype=np.int64)
_AGAIN = 2.0
"""Seconds after which a node that could not say hello is asked once more."""

_Wanted = tuple[Mapping[str, tuple[int, ...]], Mapping[str, float]]
"""Shapes and scalings of an answer."""
Reply = tuple[dict[str, Any], list[Tensor], int]
"""Head, tensors and bytes of an answer."""


class _Missing(str):
    """Why nothing came of a question, which speaks of the line and not of the client."""


_ABSENT = _Missing("is not connected")


@dataclass(slots=True)
class _Member:
    """What is known of one site."""

    node: str
    client: Client
    shapes: Mapping[str, Sequence[int]]
    base: str
    missed: int = 0
    """Answers in a row that did not come."""
    absent_until: int = 0
    """The round before which it is not asked."""


@dataclass(slots=True)
class _Costs:
    wire_up: int = 0
    wire_down: int = 0
    trips: int = 0
    waited_seconds: float = 0.0
    """From the sending of messages until the last answer that was waited for."""
    slowest_seconds: float = 0.0
    """Of it, how long the busiest site was at work, trip by trip: the rest is the way there and back."""


@dataclass(slots=True)
class _Setup:
    """The secure sums of one round."""

    session: str
    aggregator: Any
    handed: Mapping[str, Mapping[str, bytes]]


class Coordinator:
    """Sites that are reached through a port.

    Parameters
    ----------
    out
        The run's folder: who takes part is written there once, so that a resumed run asks the same clients.
    tell
        Called with a line for people whenever something happened to a site.
    """

    def __init__(self, port: Port, config: Config, method: Method, out: Path, tell: Callable[[str], None]) -> None:
        if method.info.pooled or method.info.alone:
            raise ValueError(f"method.name = '{method.info.name}' is a control for one process: sites share no data")
        self.port, self.config, self.method, self.tell = port, config, method, tell
        self.terms = agreement.terms(config)
        self.members: dict[str, _Member] = {}
        self._greeted: dict[str, float] = {}
        """Node -> when it was last asked who it is."""
        self._refused: dict[str, str] = {}
        """Node -> why it is not a member."""
        self._roll = out / "sites.json"
        self._run = ""
        self._kept: list[Client] = []
        self._base = ""
        self._costs = _Costs()
        self._needed = 0
        self._setup: _Setup | None = None
        self.initial: Tensors = {}
        """Heads and trained weights of the untouched base."""
        self.raw: dict[int, Update] = {}
        """By rank, the shapes of what training, or a gradient, last came to."""

    # Who takes part

    def gather(self) -> list[Client]:
        """Wait for the federation's sites; who they are, in the order of their ids.

        Raises
        ------
        ValueError
            When too few came in `deployment.wait` seconds.
        """
        f, wait = self.config.federation, self.config.deployment.wait
        expected = self._enrolled()
        wanted = len(expected) if expected else f.num_clients
        began = self.port.now()
        self.tell(f"waiting for {wanted} sites, at most {wait:g} s")
        while len(self.members) < wanted and self.port.now() - began < wait:
            self._greet()
            self.port.sleep(self.config.deployment.poll)
        fewest = max(f.min_clients, f.min_success)
        if len(self.members) < fewest:
            reasons = "".join(f"; {reason}" for reason in list(self._refused.values())[:3])
            raise ValueError(
                f"{len(self.members)} of {wanted} sites came within deployment.wait = {wait:g} s: expected at least "
                f"{fewest}{reasons}"
            )
        if expected:
            return expected
        return [self.members[name].client for name in sorted(self.members)]

    def agree(
        self, base: str, shapes: Mapping[str, Sequence[int]], initial: Tensors, clients: list[Client]
    ) -> list[Client]:
        """The clients whose base is the server's own; the others are told why and not asked."""
        self._base, self.initial = base, initial
        kept: list[Client] = []
        for client in clients:
            member = self.members.get(client.client_id)
            problem = None if member is None else self._disagreement(member, shapes)
            if problem is None:
                kept.append(client)
            else:
                self.members.pop(client.client_id)
                self.tell(f"{client.client_id} is left out: {problem}")
                self._refused[client.client_id] = f"{client.client_id}: {problem}"
        if len(kept) < max(1, self.config.federation.min_success):
            raise ValueError(f"{len(kept)} sites agree with the server: {'; '.join(self._refused.values())}")
        self._kept = kept
        return kept

    def _disagreement(self, member: _Member, shapes: Mapping[str, Sequence[int]]) -> str | None:
        for name in sorted(shapes.keys() | member.shapes.keys()):
            own, other = shapes.get(name), member.shapes.get(name)
            if own is None or other is None or list(own) != list(other):
                return f"its model holds {name} as {other}, the server's as {None if own is None else list(own)}"
        if member.base != self._base:
            return "its base weights are not the server's, to the bit: expected the same files and types"
        return None

    def _enrolled(self) -> list[Client]:
        """The clients of an earlier start of this run."""
        if not self._roll.exists():
            return []
        told = json.loads(self._roll.read_text(encoding="utf-8"))
        self._run = told["run"]
        return [Client(c["client_id"], c["rank"], _NONE, _NONE, c["num_examples"]) for c in told["clients"]]

    def enrol(self) -> None:
        """Write down who takes part, where that has not been done by an earlier start of this run."""
        if self._run:
            return
        self._run = secrets.token_hex(8)
        listed = [{"client_id": c.client_id, "rank": c.rank, "num_examples": c.num_examples} for c in self._kept]
        write_bytes(self._roll, json.dumps({"run": self._run, "clients": listed}, indent=2).encode())

    def _greet(self) -> None:
        """Ask the nodes that are not known yet who they are."""
        now = self.port.now()
        known = {member.node for member in self.members.values()}
        new = [n for n in self.port.nodes() if n not in known and now - self._greeted.get(n, -math.inf) >= _AGAIN]
        if not new:
            return
        content = protocol.encode({"kind": "hello"}, protocol.Parcel())
        tickets = dict(zip(self.port.send([(n, content) for n in new], self.config.deployment.wait), new, strict=True))
        began = self.port.now()
        # One that is still reading its base answers when it has; the others must not wait for it much longer.
        while tickets and self.port.now() - began < min(60.0, self.config.deployment.wait):
            for delivery in self.port.poll():
                node = tickets.pop(delivery.ticket, None)
                if node is not None:
                    self._greeted[node] = self.port.now()
                    self._welcome(node, delivery)
            self.port.sleep(self.config.deployment.poll)
        self.port.forget(list(tickets))
        for node in tickets.values():
            self._greeted[node] = self.port.now()
            self._refused[node] = f"node {node} does not answer"

    def _welcome(self, node: str, delivery: Delivery) -> None:
        """Take in whoever said hello, unless something is wrong with it."""
        try:
            if delivery.content is None:
                raise ValueError(delivery.error or "no answer")
            told, _ = protocol.decode(delivery.content)
            if "problem" in told:
                raise ValueError(told["problem"])
            client_id, rank, count = told["client_id"], told["rank"], told["num_examples"]
            if not isinstance(client_id, str) or type(rank) is not int or rank < 1:
                raise ValueError(f"a site says client_id {client_id!r} and rank {rank!r}")
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{client_id} says that it has {count!r} examples")
            differs = agreement.difference(self.terms, told["terms"])
            if differs is not None:
                raise ValueError(f"{client_id}: {differs}")
            if not self.method.info.hetero_rank and any(m.client.rank != rank for m in self.members.values()):
                raise ValueError(f"{client_id} has rank {rank}: {self.method.info.name} needs one rank for all")
            shapes, base = dict(told["shapes"]), str(told["base"])
        except (ValueError, KeyError, TypeError) as error:
            self._refused[node] = f"node {node}: {' '.join(str(error).split())}"
            self.tell(f"a node is not taken in: {self._refused[node]}")
            return
        held = self.members.get(client_id)
        if held is not None and held.node in self.port.nodes():
            self._refused[node] = f"node {node}: {client_id} is here already, as another node"
            self.tell(self._refused[node])
            return
        self._refused.pop(node, None)
        client = Client(client_id, rank, _NONE, _NONE, 1 if count is None else count)
        if held is not None and (rank, client.num_examples) != (held.client.rank, held.client.num_examples):
            self._refused[node] = f"node {node}: {client_id} came back with another rank or other data"
            return
        self.members[client_id] = _Member(node, client, shapes, base)
        self.tell(f"{client_id} is here, rank {rank}")

    def draw(self, drawn: Sequence[Client], clients: Sequence[Client], round_num: int) -> list[Client]:
        """Who is asked in a round for which `drawn` were drawn: they, but for those in quarantine, and some more where
        that is set."""
        self._needed = len(drawn)
        away = {name for name, m in self.members.items() if m.absent_until > round_num}
        chosen = [c for c in drawn if c.client_id not in away]
        wanted = len(drawn) + math.ceil(self.config.deployment.oversample * len(drawn))
        rest = [c for c in clients if c not in drawn and c.client_id not in away]
        order = np.random.default_rng([self.config.seed, 4, round_num]).permutation(len(rest))
        if (away or wanted > len(drawn)) and self.config.privacy.dp != "client":  # whose coins nothing replaces
            chosen += [rest[i] for i in order[: max(0, wanted - len(chosen))]]
        return chosen

    # One exchange

    def ask(self, question: Question, clients: Sequence[Client], tell: Tell) -> Iterator[Answer]:
        """The answers in the clients' order, or as they come where the settings allow it."""
        checks = _Checks(self, question)
        messages = {c.client_id: self._message(question, c, tell(c), checks) for c in self._ready(question, clients)}
        waiting = sorted(c.client_id for c in clients)
        by_id = {c.client_id: c for c in clients}
        held: dict[str, Answer] = {c: _problem(by_id[c], _ABSENT) for c in waiting if c not in messages}
        ordered = self.config.deployment.order == "sorted"
        for client_id, reply in self._trip(question, messages, self._enough(question)):
            client = by_id[client_id]
            answer = checks.answer(client, *reply) if isinstance(reply, tuple) else _problem(client, reply)
            if not ordered:
                waiting.remove(client_id)
                yield answer
                continue
            held[client_id] = answer
            while waiting and waiting[0] in held:
                yield held.pop(waiting.pop(0))
        yield from (held[client_id] for client_id in waiting)

    def sum(self, question: Question, clients: Sequence[Client], tell: Tell, layout: Layout) -> Summed:
        """The sum of the answers; under masks the server sees nothing else.

        Raises
        ------
        ValueError
            When fewer clients stayed than can unmask the sum.
        """
        checks = _Checks(self, question)
        masked, arithmetic = self.config.privacy.secure_sums, FixedPoint(self.config.privacy.fraction_bits)
        by_id = {c.client_id: c for c in clients}
        problems: dict[str, str] = {}
        ready = self._ready(question, clients)
        if masked and question.place[0] == 0:
            problems |= self._set_up(question, ready)
        setup = self._setup if masked else None
        extra: dict[str, Any] = {"layout": layout.to_json(), "num_clients": len(ready), "index": question.place[0]}
        messages: dict[str, bytes] = {}
        for client in ready:
            if client.client_id in problems or (setup is not None and client.client_id not in setup.handed):
                continue
            messages[client.client_id] = self._message(question, client, tell(client), checks, extra, setup)
        adding: Any = setup.aggregator.sum(question.place[0], layout.num_words) if setup is not None else None
        total = np.zeros(layout.num_words, dtype=np.uint64)
        answers: list[Answer] = []
        for client_id, reply in self._trip(question, messages, self._enough(question)):
            told = checks.words(client_id, layout.num_words, *reply) if isinstance(reply, tuple) else reply
            if isinstance(told, str):
                problems[client_id] = told
                continue
            words, answer = told
            try:
                if adding is not None:
                    adding.add(client_id, words)
                else:
                    total += words
            except ValueError as error:
                problems[client_id] = str(error)
                continue
            answers.append(replace(answer, client=by_id[client_id]))
        if setup is not None:
            total = self._unmasked(question, setup, adding)
        for client_id in sorted(by_id.keys() - {a.client.client_id for a in answers}):
            answers.append(_problem(by_id[client_id], problems.get(client_id, _ABSENT)))
        answers.sort(key=lambda a: a.client.client_id)
        count = sum(a.problem is None for a in answers)
        if not count:
            return Summed(Partial(), 0.0, answers)
        partial, loss = layout.partial(arithmetic.decode(total), count)
        return Summed(partial, loss, answers)

    def states(self) -> Mapping[str, ClientState]:
        """Nothing: the sites keep their own."""
        return {}

    def costs(self) -> Mapping[str, Any]:
        """What the round cost on the wire."""
        costs, self._costs = self._costs, _Costs()
        return {
            "wire_up": costs.wire_up,
            "wire_down": costs.wire_down,
            "trips": costs.trips,
            "waited_seconds": costs.waited_seconds,
            "slowest_seconds": costs.slowest_seconds,
        }

    # Secure sums

    def _set_up(self, question: Question, clients: Sequence[Client]) -> dict[str, str]:
        """Keys and shares for the sums of this round; what was wrong with whom."""
        from fedspan.privacy.secure_sum import RoundAggregator  # which needs the extra `secure`

        p, session = self.config.privacy, secrets.token_hex(8)
        how = Sum(FixedPoint(p.fraction_bits), True, p.threshold)
        threshold = how.needed(len(clients))
        whole = f"{self._run}/{question.round_num}/{session}".encode()
        aggregator = RoundAggregator(whole, threshold, question.place[1])
        problems: dict[str, str] = {}

        def collect(
            head: Mapping[str, Any], to: Sequence[str], read: Callable[..., Any], tensors: protocol.Parcel
        ) -> dict[str, Any]:
            found: dict[str, Any] = {}
            told = {**self._head(question), "session": session, **head}
            contents = {c: protocol.encode({**told, "counted": question.counted.get(c, 0)}, tensors) for c in to}
            for client_id, reply in self._trip(question, contents, len(contents)):
                try:
                    if isinstance(reply, str):
                        raise ValueError(reply)
                    found[client_id] = read(client_id, reply[0], reply[1])
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    problems[client_id] = " ".join(str(error).split())
            return found

        def advert(client_id: str, told: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
            content = protocol.get_bytes(tensors, told["keys"])
            aggregator.check_advert(client_id, content)
            return content

        def shares(client_id: str, told: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, bytes]:
            sealed = {other: protocol.get_bytes(tensors, place) for other, place in told["shares"].items()}
            aggregator.check_shares(client_id, sealed)
            return sealed

        ids = [c.client_id for c in clients]
        adverts = collect(
            {"kind": "advertise", "num_sums": question.place[1]},
            ids,
            advert,
            protocol.Parcel(),
        )
        keys = aggregator.keys(adverts)
        parcel = protocol.Parcel()
        told = {name: protocol.put_bytes(parcel, content) for name, content in keys.items()}
        sealed = collect(
            {"kind": "share", "keys": told, "threshold": threshold},
            sorted(adverts),
            shares,
            parcel,
        )
        self._setup = _Setup(session, aggregator, aggregator.route(sealed))
        return problems

    def _unmasked(self, question: Question, setup: _Setup, adding: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
        survivors = adding.survivors()
        head = {"kind": "unmask", "session": setup.session, "index": question.place[0], "survivors": survivors}
        content = protocol.encode({**self._head(question), **head}, protocol.Parcel())
        answers: dict[str, bytes] = {}
        for client_id, reply in self._trip(question, dict.fromkeys(survivors, content), len(survivors)):
            try:
                if isinstance(reply, str):
                    raise ValueError(reply)
                told = protocol.get_bytes(reply[1], reply[0]["unmask"])
                adding.check_answer(client_id, told)
                answers[client_id] = told
            except (ValueError, KeyError, TypeError, IndexError) as error:
                self.tell(f"{client_id} does not help to unmask the sum: {' '.join(str(error).split())}")
        total: np.ndarray[Any, np.dtype[np.uint64]] = adding.total(answers)
        return total

    # Messages

    def _head(self, question: Question) -> dict[str, Any]:
        """What every message of an exchange names."""
        return {
            "run": self._run,
            "round": question.round_num,
            "number": question.number,
            "place": list(question.place),
            "keep": question.keep,
            "terms": agreement.digest(self.terms),
            "base": self._base,
            "rank": question.template.rank,
            "num_clients": question.template.num_clients,
        }

    def _message(
        self,
        question: Question,
        client: Client,
        sent: Broadcast,
        checks: _Checks,
        extra: Mapping[str, Any] | None = None,
        setup: _Setup | None = None,
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
                if question.place[0] == 0:
                    handed = setup.handed[client.client_id]
                    head["sum"]["shares"] = {
                        other: protocol.put_bytes(parcel, content) for other, content in handed.items()
                    }
        return protocol.encode(head, parcel)

    def _ready(self, question: Question, clients: Sequence[Client]) -> list[Client]:
        """Those of the clients that can be reached, after the wait that the settings allow at the round's start."""
        wait = self.config.deployment.wait if question.place[0] == 0 else 0.0
        began = self.port.now()
        while True:
            nodes = set(self.port.nodes())
            here = [c for c in clients if (m := self.members.get(c.client_id)) is not None and m.node in nodes]
            if len(here) == len(clients) or self.port.now() - began >= wait:
                return here
            self._greet()
            self.port.sleep(self.config.deployment.poll)

    def _enough(self, question: Question) -> int:
        """How many answers are waited for: with over-sampling, no more than the round needs."""
        return self._needed if question.place[0] == 0 and self.config.deployment.oversample else 10**9

    def _trip(
        self, question: Question, messages: Mapping[str, bytes], enough: int
    ) -> Iterator[tuple[str, Reply | str]]:
        """Send everyone its message; answers as they come, or why there is none. Each client once."""
        d = self.config.deployment
        began = self.port.now()
        self._costs.trips += 1
        self._costs.wire_down += sum(map(len, messages.values()))
        tickets = dict(
            zip(
                self.port.send([(self.members[c].node, content) for c, content in messages.items()], d.deadline),
                messages,
                strict=True,
            )
        )
        got, slowest = 0, 0.0
        while tickets and got < enough and self.port.now() - began < d.deadline:
            for delivery in self.port.poll():
                client_id = tickets.pop(delivery.ticket, None)
                if client_id is None:
                    continue
                reply = self._read(client_id, question, delivery)
                self._note(client_id, question, missed=delivery.content is None)
                if not isinstance(reply, str):
                    got += 1
                    slowest = max(slowest, _busy(reply[0]))
                yield client_id, reply
            if tickets and got < enough:
                self.port.sleep(d.poll)
        self.port.forget(list(tickets))
        self._costs.waited_seconds += self.port.now() - began
        self._costs.slowest_seconds += slowest
        for client_id in tickets.values():
            late = got >= enough
            if not late:
                self._note(client_id, question, missed=True)
            reason = "was not waited for" if late else f"did not answer within {d.deadline:g} s"
            yield client_id, _Missing(reason)

    def _read(self, client_id: str, question: Question, delivery: Delivery) -> Reply | str:
        """An answer that belongs to what was asked, or what is wrong with it."""
        if delivery.content is None:
            return _Missing(delivery.error or "gave no answer")
        self._costs.wire_up += len(delivery.content)
        try:
            told, tensors = protocol.decode(delivery.content)
        except ValueError as error:
            return f"sent {error}"
        if told.get("client_id") != client_id:
            return f"answered as {told.get('client_id')!r}"
        if "problem" in told:
            return str(told["problem"])
        for key, own in (("run", self._run), ("round", question.round_num), ("number", question.number)):
            if told.get(key) != own:
                return f"answered for {key} {told.get(key)!r}: expected {own!r}"
        return told, tensors, len(delivery.content)

    def _note(self, client_id: str, question: Question, missed: bool) -> None:
        member, d = self.members[client_id], self.config.deployment
        member.missed = member.missed + 1 if missed else 0
        if member.missed >= d.patience:
            member.missed, member.absent_until = 0, question.round_num + 1 + d.quarantine
            self.tell(f"{client_id} has been silent {d.patience} times: left out for {d.quarantine} rounds")


@dataclass(slots=True)
class _Checks:
    """What the answers of one exchange must look like."""

    coordinator: Coordinator
    question: Question
    _derived: dict[int, Broadcast] = field(default_factory=dict)
    _wanted: dict[str, _Wanted] = field(default_factory=dict)
    _by_broadcast: dict[int, tuple[Broadcast, _Wanted]] = field(default_factory=dict)

    def derived(self, rank: int) -> Broadcast:
        """What a site of that rank works out by itself."""
        if rank not in self._derived:
            q, method = self.question, self.coordinator.method
            state = replace(method.init(q.template, self.coordinator.initial), round_num=q.round_num)
            self._derived[rank] = method.broadcast(state, Request(rank))
        return self._derived[rank]

    def patch_versions(self, client: Client) -> tuple[int, int]:
        """What the client holds, and what it will hold."""
        return self.question.seen.get(client.client_id, 0), self.question.version

    def note(self, client: Client, sent: Broadcast) -> None:
        """Remember what an answer to this must hold."""
        key = id(sent)
        if key not in self._by_broadcast:
            q, method = self.question, self.coordinator.method
            started = begin(method, q, sent, None)
            raw = self.coordinator.raw
            if q.exchange.ask != "again":
                raw[client.rank] = unlearnt(q.template, started)
            told = method.encode(raw[client.rank], started, None)[0]
            self._by_broadcast[key] = (sent, (protocol.shapes(told), _scalings(told)))
        self._wanted[client.client_id] = self._by_broadcast[key][1]

    def answer(self, client: Client, told: Mapping[str, Any], tensors: Sequence[Tensor], size: int) -> Answer:
        """One client's update, or what is wrong with it."""
        try:
            update = protocol.get_update(told["update"], tensors, client.client_id)
            loss = math.nan if told["train_loss"] is None else float(told["train_loss"])
            seconds, held = float(told["seconds"]), int(told["optimizer_bytes"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return _problem(client, f"sent a damaged update ({type(error).__name__}: {error})")
        problem = self._problem(client, update)
        if problem is not None:
            return _problem(client, problem)
        kind = self.coordinator.config.wire.up
        return Answer(
            client,
            update,
            weight=update.num_examples,
            train_loss=loss,
            seconds=seconds,
            bytes_up=packed_bytes(update, kind),
            optimizer_bytes=held,
        )

    def words(
        self, client_id: str, num_words: int, told: Mapping[str, Any], tensors: Sequence[Tensor], size: int
    ) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], Answer] | str:
        """One client's part of a sum, or what is wrong with it."""
        try:
            vector, seconds, held = tensors[told["words"]], float(told["seconds"]), int(told["optimizer_bytes"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return f"sent a damaged vector ({type(error).__name__}: {error})"
        if vector.dtype != torch.int64 or tuple(vector.shape) != (num_words,):
            return f"sent a vector of {vector.dtype} in shape {tuple(vector.shape)}: expected {num_words} words"
        client = self.coordinator.members[client_id].client
        answer = Answer(client, None, seconds=seconds, bytes_up=8 * num_words, optimizer_bytes=held)
        return vector.contiguous().numpy().view(np.uint64), answer

    def _problem(self, client: Client, update: Update) -> str | None:
        wanted, scalings = self._wanted[client.client_id]
        for name, scaling in _scalings(update).items():
            if scaling != scalings.get(name):
                return f"scales its factors of {name} by {scaling:g}: expected {scalings.get(name, 1.0):g}"
        got = protocol.shapes(update)
        moments = {name: shape for name, shape in got.items() if name.startswith("moments/")}
        got = {name: shape for name, shape in got.items() if name not in moments}
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith("moments/")}
        if got.keys() != wanted.keys():
            return f"names {sorted(got.keys() ^ wanted.keys())[0]}, which was not asked for or is missing"
        for name, shape in got.items():
            if shape != wanted[name]:
                return f"{name} has shape {shape}, expected {wanted[name]}"
        for name, shape in moments.items():
            trained = wanted.get("dense/" + name.removeprefix("moments/"))
            if trained is None or math.prod(shape) > math.prod(trained):
                return f"{name} has shape {shape}: expected the second moments of a trained weight"
        for payload in (*update.modules.values(), update.dense, update.moments):
            for value in _tensors(payload):
                if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                    return "what it sent holds NaN or infinity, or no numbers"
        weight = client.weight(self.coordinator.config.federation.weighting)
        if update.num_examples != weight:
            return f"counts as {update.num_examples:g} examples: it said {weight:g} when it came"
        return None


def _scalings(update: Update) -> dict[str, float]:
    """Every module's scaling, where it is one of factors."""
    return {name: p.scaling for name, p in update.modules.items() if isinstance(p, Factors)}


def _tensors(payload: Any) -> list[Tensor]:
    if isinstance(payload, Mapping):
        return list(payload.values())
    values = getattr(payload, "values", None)
    return list(values.values()) if values is not None else [payload.b, payload.a]


def _busy(told: Mapping[str, Any]) -> float:
    seconds = told.get("seconds", 0.0)
    return float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else 0.0


def _problem(client: Client, reason: str) -> Answer:
    return Answer(client, None, reason, isinstance(reason, _Missing), 0.0)
