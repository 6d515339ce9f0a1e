"""One client's side of a federation, wherever it runs: its data and base in memory, its state on its own disk.

A site is asked in bytes and answers in bytes (`fedspan.wire.protocol`), whatever transport carries them. It checks
that a message belongs to this run, this base and these settings before it uses anything in it, and what it keeps
between rounds never leaves it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan.data import load as load_data
from fedspan.data.metric_blocks import Vector
from fedspan.federation import requirements
from fedspan.federation.held_out import HeldOutTerms
from fedspan.methods.base import Method
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.ledgers import ExampleLedgers
from fedspan.privacy.sum_layout import SumLayout, SumTerms
from fedspan.site import precision
from fedspan.site.contents import ContentStore
from fedspan.site.errors import Refused, code_of
from fedspan.site.held_out import held_out_of
from fedspan.site.incidents import refusal
from fedspan.site.loading import Loaded, client_of
from fedspan.site.local_work import LocalAnswer, LocalWork
from fedspan.site.logged import SiteLog
from fedspan.site.message_checks import MessageChecks, RoundHeader
from fedspan.site.settings import SiteSettings
from fedspan.site.storage import SiteStorage
from fedspan.site.sum_participant import SumParticipant
from fedspan.wire import agreement, protocol, schema
from fedspan.wire.contents import Lacking
from fedspan.wire.protocol import MessageTensors
from fedspan.wire.refusals import Code

__all__ = ["Site"]

Fields = dict[str, Any]
_Handler = Callable[[Mapping[str, Any], Sequence[Tensor], MessageTensors], Fields]


def _silent(line: str) -> None:
    pass


class Site:
    """Answers a server's messages about one client.

    Parameters
    ----------
    settings
        As `SiteSettings.read` returns them, or made by hand for a simulation.
    folder
        The folder that keeps the client's state.
    loaded
        The base and data, where another client of this process has loaded the same ones already.
    notify
        Called with lines that are meant for the people at this site only.
    """

    def __init__(
        self,
        settings: SiteSettings,
        folder: Path,
        loaded: Loaded | None = None,
        notify: Callable[[str], None] = _silent,
    ) -> None:
        self.settings, self.folder, self.notify = settings, folder, notify
        config = settings.config
        self.privacy, self._precision = config.privacy, config.wire.up
        self._regions, self._num_clients = config.deployment.regions, config.federation.num_clients
        torch.set_num_threads(config.threads)
        method: Method = requirements.chosen(config)
        corpus = load_data(config.data, config.data_seed)
        self.client = client_of(settings, corpus)
        self.loaded = Loaded.of(config, method, corpus, self.client.rank) if loaded is None else loaded
        for note in self.loaded.notes:
            notify(note)
        self.terms = agreement.terms(config)
        self._checks = MessageChecks(self.terms, max(self.client.rank, requirements.largest_rank(config.federation)))
        storage = SiteStorage(folder / "state")
        precision.settle(config, self.loaded, storage.folder, notify)
        privacy = config.privacy
        examples = None
        if privacy.dp == "example":
            setting = f"{agreement.digest(self.terms)} {self.loaded.base}"
            examples = ExampleLedgers(privacy, config.local.batch_size, folder, setting)
        self._contents = ContentStore(folder / "contents", config.wire.keep_mb * 2**20)
        self.work = LocalWork(config, method, self.client, self.loaded, storage, examples, self._contents)
        max_sums = privacy.rounds_ahead * len(method.exchanges)
        self._sums = SumParticipant(settings, self.client.client_id, storage, max_sums, self._say)
        # With keys of its own: an evaluation asks every client, whoever is in the rounds.
        self._evaluation_sums = SumParticipant(
            settings, self.client.client_id, storage, privacy.rounds_ahead, self._say
        )
        self._evaluation_number = len(method.exchanges)
        self._held_out = held_out_of(settings, method, self.client, corpus, self.loaded, examples)
        self._log = SiteLog(folder, self.client.client_id, settings, agreement.digest(self.terms), notify)
        self._handlers: Mapping[str, _Handler] = {
            "hello": self._hello,
            "ask": self._ask,
            "evaluate": self._evaluate,
            "advertise": self._advertise,
            "share": self._share,
            "receive": self._receive,
            "sign": self._sign,
            "unmask": self._unmask,
            "convict": self._convict,
        }

    def _say(self, line: str) -> None:
        self.notify(line)

    def answer(self, content: bytes) -> bytes:
        """Return the answer to one message; that there is none is an answer too.

        No error ends the process, which has a base in memory, and no text of an error leaves the site: it may quote
        the data. The server is told a code, and the incident's number, under which the text is in this site's log.
        """
        try:
            return self._log.answered(content, self._reply)
        except Exception as error:  # a message that cannot be written down is not acted on
            return refusal(self.client.client_id, code_of(error), error, self.notify)

    def _reply(self, content: bytes) -> bytes:
        try:
            return self._answered(content)
        except Exception as error:
            return refusal(self.client.client_id, code_of(error), error, self.notify)

    def _answered(self, content: bytes) -> bytes:
        head, tensors = protocol.decode(content)
        kind, message = schema.question(head)
        outgoing = MessageTensors()
        try:
            fields = self._handlers[kind](message, tensors, outgoing)
        except Lacking as error:
            fields = {"lacks": error.digests}
        fields |= {key: message[key] for key in ("run", "round", "number") if key in message}
        return protocol.encode({"client_id": self.client.client_id, **fields}, outgoing)

    def _hello(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        # Where only sums may be known, neither may the amount of data at one site. Example-level privacy counts it as
        # public: the rate of its samples depends on it, and so does the weight of the site's update.
        hidden = self.privacy.secure_sums or self.privacy.dp == "client"
        return {
            "rank": self.client.rank,
            "num_examples": None if hidden else self.client.num_examples,
            "base": self.loaded.base,
            "labels": self.loaded.labels,
            "holds": self._contents.digests(),
            "terms": self.terms,
            "shapes": agreement.shapes(self.loaded.context.model.modules(), self.loaded.initial),
        }

    def _ask(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        header = self._checks.check(message, self.loaded.base)
        # The site's own settings decide, not the message: the same question without its sum would otherwise be
        # answered with the bare update.
        if (self.privacy.secure_sums or self.privacy.fixed_point) != ("sum" in message):
            raise Refused("a question for this site's own update, where only sums may be known", Code.OWN_UPDATE)
        question = self.work.question(message, header)
        answer = self.work.answer(question, message, header, tensors)
        fields: Fields = {"seconds": answer.seconds, "optimizer_bytes": answer.optimizer_bytes}
        fields |= {"stored": answer.stored, "gone": self._contents.gone()}
        if "sum" in message:
            words = self._words(header, message["sum"], answer)
            fields["words"] = outgoing.put(torch.from_numpy(words.view(np.int64)))
        else:
            fields["train_loss"] = answer.train_loss if math.isfinite(answer.train_loss) else None
            fields["update"] = protocol.put_update(outgoing, answer.update, self._precision)
        return fields

    def _evaluate(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        header = self._checks.check(message, self.loaded.base)
        if self._held_out is None:
            raise Refused("a question about held-out rows, which evaluation.where keeps here", Code.OTHER_SETTINGS)
        if (self.privacy.secure_sums or self.privacy.fixed_point) != ("sum" in message):
            raise Refused("a question for this site's own statistics, where only sums may be known", Code.OWN_UPDATE)
        began = time.perf_counter()
        # Before anything is counted or masked: an evaluation whose tensors are lacking is asked for once more.
        model, stored = self.work.received_model(message, header, tensors, self.work.evaluation(message, header))
        vector = self._held_out.statistics(model, header, whole=message["whole"])
        fields: Fields = {"seconds": time.perf_counter() - began, "stored": stored, "gone": self._contents.gone()}
        if "sum" not in message:
            return {**fields, "statistics": outgoing.put(torch.from_numpy(vector.view(np.int64)))}
        words = self._summed_statistics(header, message["sum"], self._held_out.terms, vector)
        return {**fields, "words": outgoing.put(torch.from_numpy(words.view(np.int64)))}

    def _summed_statistics(
        self, header: RoundHeader, requested: Mapping[str, Any], held_out: HeldOutTerms, vector: Vector
    ) -> Words:
        """Return statistics as the words of a sum, masked where the settings say so."""
        point = FixedPoint(self.privacy.fraction_bits)
        if not self.privacy.secure_sums:
            return held_out.encoded(vector, point, requested["num_clients"])
        session, index = requested["session"], requested["index"]
        num_clients = self._evaluation_sums.settle(header.run, session, requested["members"])
        words = held_out.encoded(vector, point, self._room(num_clients))
        terms = self._sum_terms(header, requested["rank"], held_out.sum_layout())
        return self._evaluation_sums.mask(header, session, index, words, terms.digest())

    def _sum_terms(self, header: RoundHeader, rank: int, layout: SumLayout) -> SumTerms:
        return SumTerms(
            header.run,
            header.round_num,
            header.number,
            agreement.digest(self.terms),
            self.loaded.base,
            header.rank,
            header.num_clients,
            rank,
            layout,
        )

    def _room(self, num_members: int) -> int:
        """Return for how many clients a masked vector leaves room: those of the masks, and those of other regions.

        From the settings of this site alone. A server that chose it could find by refusals how large the vector is.
        """
        return max(num_members, self._num_clients) if self._regions else num_members

    def _sums_of(self, message: Mapping[str, Any]) -> SumParticipant:
        """Return the keys that a message is about: those of evaluations, or of training."""
        return self._evaluation_sums if message["number"] == self._evaluation_number else self._sums

    def _words(self, header: RoundHeader, requested: Mapping[str, Any], answer: LocalAnswer) -> Words:
        """Return the answer as the words of a sum, masked where the settings say so."""
        layout, fixed_point = answer.layout, FixedPoint(self.privacy.fraction_bits)
        assert layout is not None  # made for every question about a sum
        if not self.privacy.secure_sums:
            return self._encoded(layout, fixed_point, answer, requested["num_clients"])
        session, index = requested["session"], requested["index"]
        num_clients = self._sums.settle(header.run, session, requested["members"])
        words = self._encoded(layout, fixed_point, answer, self._room(num_clients))
        terms = self._sum_terms(header, requested["rank"], layout)
        return self._sums.mask(header, session, index, words, terms.digest())

    def _encoded(self, layout: SumLayout, point: FixedPoint, answer: LocalAnswer, num_clients: int) -> Words:
        try:
            return point.encode(layout.flatten(answer.update, answer.train_loss), num_clients)
        except ValueError as error:
            raise Refused(f"the update does not fit the fixed point of the sum ({error})", Code.UNFIT) from None

    def _advertise(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        header = self._checks.check(message, self.loaded.base)
        keys = self._sums_of(message).advertise(header, message["session"], message["num_sums"])
        return {"keys": protocol.put_bytes(outgoing, keys)}

    def _share(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        keys = _bytes_by_name(message["keys"], tensors)
        sealed = self._sums_of(message).share(message["run"], message["session"], keys, message["threshold"])
        return {"shares": {other: protocol.put_bytes(outgoing, content) for other, content in sealed.items()}}

    def _receive(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        shares = _bytes_by_name(message["shares"], tensors)
        return {"false": self._sums_of(message).receive(message["run"], message["session"], shares)}

    def _sign(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        run, session, survivors = message["run"], message["session"], message["survivors"]
        labels = message["round"], message["number"]
        signature = self._sums_of(message).sign(run, session, message["index"], labels, survivors)
        return {"signature": protocol.put_bytes(outgoing, signature)}

    def _unmask(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        run, session, survivors = message["run"], message["session"], message["survivors"]
        labels = message["round"], message["number"]
        signatures = _bytes_by_name(message.get("signatures", {}), tensors)
        shares = self._sums_of(message).unmask(run, session, message["index"], labels, survivors, signatures)
        return {"unmask": protocol.put_bytes(outgoing, shares)}

    def _convict(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        for dealer, proof in message["proofs"].items():
            commitments, shares = (_bytes_by_name(proof[key], tensors) for key in ("commitments", "shares"))
            signature = protocol.get_bytes(tensors, proof["signature"])
            run, session = message["run"], message["session"]
            self._sums_of(message).convict(run, session, message["index"], dealer, commitments, signature, shares)
            self.notify(f"{dealer} was proved to have dealt false shares: sums go on without it")
        return {}


def _bytes_by_name(indices: Mapping[str, int], tensors: Sequence[Tensor]) -> dict[str, bytes]:
    return {name: protocol.get_bytes(tensors, index) for name, index in indices.items()}
