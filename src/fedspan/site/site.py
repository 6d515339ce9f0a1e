"""One client's side of a federation, wherever it runs: its data and base in memory, its state on its own disk.

A site is asked in bytes and answers in bytes (`fedspan.wire.protocol`); who carries them is not its concern. It checks
that a message belongs to this run, this base and these settings before it uses anything of it, and what it keeps
between rounds never leaves it.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan.client.executors import InlineExecutor, WorkContext
from fedspan.client.setup import base_model, device_of, encoded
from fedspan.client.training import Assignment, LocalResult, num_steps
from fedspan.config import Config
from fedspan.data import Corpus
from fedspan.data import load as load_data
from fedspan.federation import requirements
from fedspan.federation.clients import Client, make_clients
from fedspan.federation.exchange import Question, begin, respond, unlearnt
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, ClientState, Request, Tensors
from fedspan.privacy.fixed_point import FixedPoint
from fedspan.privacy.spending import Examples
from fedspan.privacy.summing import Layout
from fedspan.site.settings import Settings
from fedspan.site.storage import Refused, SiteStorage
from fedspan.support.errors import FedspanError
from fedspan.wire import agreement, protocol
from fedspan.wire.precision import Precision

__all__ = ["Loaded", "Refused", "Settings", "Site"]


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Loaded:
    """The base and the data in memory."""

    context: WorkContext
    initial: Tensors
    """Heads and trained weights of the untouched base."""
    base: str
    """The untouched base's digest."""

    @classmethod
    def of(cls, config: Config, method: Method, corpus: Corpus, max_rank: int) -> Loaded:
        """Read and built as the configuration says."""
        processor, data = encoded(config, corpus)
        model = base_model(config, method, corpus, data, max_rank=max_rank, device=device_of(config.device))
        return cls(WorkContext(config, model, data, processor, corpus.metrics), model.dense(), model.digest())


class Site:
    """Answers a server's messages about one client.

    Parameters
    ----------
    given
        As `Settings.read` has it, or made by hand for a simulation.
    folder
        Where the client's state is kept.
    loaded
        The base and data, where another client of this process has loaded the same ones already.
    say
        Told what is for the site's own eyes.
    """

    def __init__(
        self, given: Settings, folder: Path, loaded: Loaded | None = None, say: Callable[[str], None] = _silent
    ) -> None:
        self.given, self.folder, self.say = given, folder, say
        self.config = given.config
        torch.set_num_threads(given.config.threads)
        self.method: Method = requirements.chosen(given.config)
        corpus = load_data(given.config.data, given.config.seed)
        self.client = self._client(corpus)
        self.loaded = Loaded.of(given.config, self.method, corpus, self.client.rank) if loaded is None else loaded
        self.executor = InlineExecutor(self.loaded.context)
        self._derived: Broadcast | None = None
        self.terms = agreement.terms(given.config)
        self._storage = SiteStorage(folder / "state")
        self._examples = Examples(given.config, folder) if given.config.privacy.dp == "example" else None
        self._learnt: LocalResult | None = None
        self._state: ClientState | None = None
        self._newest_round: tuple[str, int] = ("", 0)
        """Run and newest count of rounds that the server has named."""
        self._sums: Any = None
        """The secure sums of the round at hand, and the session that they belong to."""

    def _client(self, corpus: Corpus) -> Client:
        given, config = self.given, self.config
        if not given.own_data:
            found = {c.client_id: c for c in make_clients(config, corpus)}
            if given.client_id not in found:
                raise FedspanError(f"client_id = {given.client_id!r}: expected one of {', '.join(sorted(found))}")
            client = found[given.client_id]
            return client if given.rank is None else replace(client, rank=given.rank)
        ranks = (
            {config.federation.ranks} if isinstance(config.federation.ranks, int) else set(requirements.ranks(config))
        )
        if given.rank is None and len(ranks) != 1:
            raise FedspanError(f"{given.client_id} has no rank: expected `rank` in its site.toml, since ranks differ")
        rows = np.arange(len(corpus.train))
        rng = np.random.default_rng([config.seed, 3, zlib.crc32(given.client_id.encode())])
        kept = round(len(rows) * config.data.client_holdout)
        order = rng.permutation(rows)
        rank = given.rank if given.rank is not None else next(iter(ranks))
        return Client(given.client_id, rank, np.sort(order[kept:]), np.sort(order[:kept]))

    def answer(self, content: bytes) -> bytes:
        """The answer to one message; what is wrong with it is an answer too."""
        parcel = protocol.MessageTensors()
        try:
            message, tensors = protocol.decode(content)
            kinds: Mapping[str, Callable[..., dict[str, Any]]] = {
                "hello": self._hello,
                "ask": self._ask,
                "advertise": self._advertise,
                "share": self._share,
                "unmask": self._unmask,
            }
            kind = message.get("kind")
            if not isinstance(kind, str) or kind not in kinds:
                raise Refused(f"a message of kind {kind!r}: expected one of {', '.join(kinds)}")
            header = kinds[kind](message, tensors, parcel)
            header |= {key: message[key] for key in ("run", "round", "number") if key in message}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            line = " ".join(str(error).split()) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            parcel = protocol.MessageTensors()
            header = {"problem": line}
        return protocol.encode({"client_id": self.client.client_id, **header}, parcel)

    def _hello(
        self, message: Mapping[str, Any], tensors: Sequence[Tensor], parcel: protocol.MessageTensors
    ) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.loaded.context.model.modules().items()}
        shapes |= {f"dense {name}": list(t.shape) for name, t in self.loaded.initial.items()}
        hidden = self.config.privacy.secure_sums or self.config.privacy.dp != "none"
        return {
            "rank": self.client.rank,
            # How much data a site has is its own business where only sums may be known.
            "num_examples": None if hidden else self.client.num_examples,
            "base": self.loaded.base,
            "terms": self.terms,
            "shapes": shapes,
        }

    def _check(self, message: Mapping[str, Any]) -> None:
        """That a message belongs to this federation, and is not an old one.

        Raises
        ------
        Refused
            When it does not.
        """
        for key, own in (("terms", agreement.digest(self.terms)), ("base", self.loaded.base)):
            if message.get(key) != own:
                raise Refused(
                    f"a message for other {'settings' if key == 'terms' else 'base weights'}: say hello first"
                )
        run, round_num, counted = message["run"], message["round"], message["counted"]
        if not isinstance(run, str) or not run.isalnum() or type(round_num) is not int or type(counted) is not int:
            raise Refused(f"run {run!r}, round {round_num!r}, counted {counted!r}: expected a name and two counts")
        known_run, newest = self._newest_round
        if run == known_run and not counted >= newest:
            raise Refused(f"a message from before round {newest}, which this site has seen finished")
        for key in ("number", "rank", "num_clients"):
            if type(message[key]) is not int or not 0 <= message[key] < 2**31:
                raise Refused(f"{key} = {message[key]!r}: expected a count")
        if counted > round_num or round_num < 0:
            raise Refused(f"round {round_num} after {counted} finished rounds: expected the next one")
        self._newest_round = (run, counted)

    def _ask(
        self, message: Mapping[str, Any], tensors: Sequence[Tensor], parcel: protocol.MessageTensors
    ) -> dict[str, Any]:
        self._check(message)
        p = self.config.privacy
        if (p.secure_sums or p.fixed_point) != ("sum" in message):
            raise Refused("a question for this site's own update, where only sums may be known: its settings forbid it")
        question = self._question(message)
        sent = self._received(message, tensors, question)
        first = question.exchange.ask != "again"
        if question.place[0] == 0:
            self._state = self._remembered(message["run"], message["counted"], question)
        began = time.perf_counter()
        if first:
            started = begin(self.method, question, sent, self._state)
            self._learnt = self._work(started, question.round_num)
        else:
            started = sent
        if self._learnt is None:
            raise Refused("a question about what this site learnt, which it does not hold any more")
        # What is rounded on the way is rounded here, so that it is the very update that arrives.
        precision = Precision("float32")
        weight = self.client.weight(self.config.federation.weighting)
        said = respond(self.method, question, self._learnt, started, self._state, precision, weight)
        seconds = time.perf_counter() - began
        if said.problem is not None:
            raise Refused(said.problem)
        assert said.update is not None
        if said.kept is not None:
            self._state = said.kept
            self._storage.keep(message["run"], question.round_num + 1, said.kept)
        header: dict[str, Any] = {"seconds": seconds, "optimizer_bytes": self._learnt.optimizer_bytes}
        if "sum" in message:
            words = self._words(message["sum"], said.update, self._learnt.train_loss, tensors)
            header["words"] = parcel.put(torch.from_numpy(words.view(np.int64)))
        else:
            loss = self._learnt.train_loss
            header["train_loss"] = loss if math.isfinite(loss) else None
            header["update"] = protocol.put_update(parcel, said.update, self.config.wire.up)
        if not question.keep:
            self._learnt = None
        return header

    def _remembered(self, run: str, counted: int, question: Question) -> ClientState | None:
        """This client's state after the last round whose answer counted."""
        state = self._storage.state(run, counted)
        if state is None and counted and self._derived is not None:
            started = begin(self.method, question, self._derived, None)
            if self.method.encode(unlearnt(question.template, started), started, None)[1] is not None:
                raise Refused(f"the server counts on this site's state after round {counted}, which it does not hold")
        return state

    def _question(self, message: Mapping[str, Any]) -> Question:
        number, (place, of) = message["number"], message["place"]
        if not 0 <= number < len(self.method.exchanges):
            raise Refused(f"exchange {number}: {self.method.info.name} has {len(self.method.exchanges)}")
        model, a = self.loaded.context.model, self.config.adapter
        template = model.template(message["rank"], a.alpha, a.rslora, self.config.seed, message["num_clients"])
        exchange = self.method.exchanges[number]
        return Question(template, message["round"], number, exchange, (place, of), bool(message["keep"]))

    def _received(self, message: Mapping[str, Any], tensors: Sequence[Tensor], question: Question) -> Broadcast:
        """What was sent, whole again."""
        if question.place[0] == 0 or self._derived is None:
            state = self.method.init(question.template, self.loaded.initial)
            state = replace(state, round_num=question.round_num)
            self._derived = self.method.broadcast(state, Request(self.client.rank))
        patch = self._storage.patch(message["run"], message["patch"], protocol.get_news(message["patch"], tensors))
        return protocol.get_broadcast(message["broadcast"], tensors, self._derived, patch)

    def _work(self, started: Broadcast, round_num: int) -> LocalResult:
        client, config = self.client, self.config
        self.loaded.context.model.check_fits(started)
        steps = num_steps(config.local, client.num_examples)
        weight = client.weight(config.federation.weighting)
        secret = None
        if self._examples is not None:
            secret = self._examples.charge(client.client_id, client.num_examples, steps)
        assignment = Assignment(client.client_id, started, client.indices, steps, weight, secret)
        engine = "cohort" if config.engine.name == "cohort" else "sequential"
        ((result, _),) = self.executor.train([assignment], round_num, engine)
        return result

    def _words(
        self, header: Mapping[str, Any], update: Any, train_loss: float, tensors: Sequence[Tensor]
    ) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The answer as words of a sum, masked where the settings ask for it."""
        p = self.config.privacy
        layout = Layout.from_json(header["layout"])
        try:
            words = FixedPoint(p.fraction_bits).encode(layout.flatten(update, train_loss), header["num_clients"])
        except ValueError as error:
            # The line names a number of this client's, which is nobody's business.
            self.say(str(error))
            raise Refused("what it learnt does not fit the fixed point of the sum") from None
        if not p.secure_sums:
            return words
        sums = self._secure(header["session"])
        if "shares" in header:
            sums.receive(_bytes_by_name(header["shares"], tensors))
        masked: np.ndarray[Any, np.dtype[np.uint64]] = sums.mask(header["index"], words)
        return masked

    def _secure(self, session: str) -> Any:
        """This site's side of the secure sums of that name."""
        if self._sums is None or self._sums[0] != session:
            raise Refused("a secure sum that this site has no keys for: it was restarted, or joined too late")
        return self._sums[1]

    def _advertise(
        self, message: Mapping[str, Any], tensors: Sequence[Tensor], parcel: protocol.MessageTensors
    ) -> dict[str, Any]:
        from fedspan.privacy.secure_sum import RoundParticipant  # which needs the extra `secure`

        self._check(message)
        session = message["session"]
        signer = None
        if self.given.identity is not None:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

            signer = Ed25519PrivateKey.from_private_bytes(self.given.identity)
        whole = f"{message['run']}/{message['round']}/{session}".encode()
        sums = RoundParticipant(whole, self.client.client_id, message["num_sums"], signer, self.given.trusted)
        self._sums = (session, sums)
        return {"keys": protocol.put_bytes(parcel, sums.advertise())}

    def _share(
        self, message: Mapping[str, Any], tensors: Sequence[Tensor], parcel: protocol.MessageTensors
    ) -> dict[str, Any]:
        sums = self._secure(message["session"])
        num_clients, threshold = len(message["keys"]), message["threshold"]
        if threshold < self.config.privacy.threshold * num_clients - 1e-9:
            raise Refused(f"a threshold of {threshold} for {num_clients} clients: expected privacy.threshold of them")
        sealed = sums.share(_bytes_by_name(message["keys"], tensors), threshold)
        return {"shares": {other: protocol.put_bytes(parcel, content) for other, content in sealed.items()}}

    def _unmask(
        self, message: Mapping[str, Any], tensors: Sequence[Tensor], parcel: protocol.MessageTensors
    ) -> dict[str, Any]:
        sums = self._secure(message["session"])
        self._storage.unmasking(message["run"], f"{message['round']}/{message['place'][0]}", message["survivors"])
        return {"unmask": protocol.put_bytes(parcel, sums.unmask(message["index"], message["survivors"]))}


def _bytes_by_name(places: Mapping[str, int], tensors: Sequence[Tensor]) -> dict[str, bytes]:
    return {name: protocol.get_bytes(tensors, place) for name, place in places.items()}
