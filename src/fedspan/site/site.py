"""One client's side of a federation, wherever it runs: its data and base in memory, its state on its own disk.

A site is asked in bytes and answers in bytes (`fedspan.wire.protocol`), whatever transport carries them. It checks
that a message belongs to this run, this base and these settings before it uses anything in it, and what it keeps
between rounds never leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan.data import load as load_data
from fedspan.federation import requirements
from fedspan.methods.base import Method
from fedspan.privacy.fixed_point import FixedPoint, Words
from fedspan.privacy.ledgers import ExampleLedgers
from fedspan.privacy.sum_layout import SumLayout, SumTerms
from fedspan.site import precision
from fedspan.site.errors import Refused, code_of
from fedspan.site.incidents import refusal
from fedspan.site.loading import Loaded, client_of
from fedspan.site.local_work import LocalAnswer, LocalWork
from fedspan.site.logged import SiteLog
from fedspan.site.message_checks import MessageChecks, RoundHeader
from fedspan.site.settings import SiteSettings
from fedspan.site.storage import SiteStorage
from fedspan.site.sum_participant import SumParticipant
from fedspan.wire import agreement, protocol, schema
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
        self.work = LocalWork(config, method, self.client, self.loaded, storage, examples)
        max_sums = privacy.rounds_ahead * len(method.exchanges)
        self._sums = SumParticipant(settings, self.client.client_id, storage, max_sums)
        self._log = SiteLog(folder, self.client.client_id, settings, agreement.digest(self.terms), notify)
        self._handlers: Mapping[str, _Handler] = {
            "hello": self._hello,
            "ask": self._ask,
            "advertise": self._advertise,
            "share": self._share,
            "receive": self._receive,
            "unmask": self._unmask,
            "convict": self._convict,
        }

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
        fields = self._handlers[kind](message, tensors, outgoing)
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
        if "sum" in message:
            words = self._words(header, message["sum"], answer)
            fields["words"] = outgoing.put(torch.from_numpy(words.view(np.int64)))
        else:
            fields["train_loss"] = answer.train_loss if math.isfinite(answer.train_loss) else None
            fields["update"] = protocol.put_update(outgoing, answer.update, self._precision)
        return fields

    def _words(self, header: RoundHeader, requested: Mapping[str, Any], answer: LocalAnswer) -> Words:
        """Return the answer as the words of a sum, masked where the settings say so."""
        layout, fixed_point = answer.layout, FixedPoint(self.privacy.fraction_bits)
        assert layout is not None  # made for every question about a sum
        if not self.privacy.secure_sums:
            return self._encoded(layout, fixed_point, answer, requested["num_clients"])
        session, index = requested["session"], requested["index"]
        num_clients = self._sums.settle(header.run, session, requested["members"])
        words = self._encoded(layout, fixed_point, answer, num_clients)
        terms = SumTerms(
            header.run,
            header.round_num,
            header.number,
            agreement.digest(self.terms),
            self.loaded.base,
            header.rank,
            header.num_clients,
            requested["rank"],
            layout,
        )
        return self._sums.mask(header, session, index, words, terms.digest())

    def _encoded(self, layout: SumLayout, point: FixedPoint, answer: LocalAnswer, num_clients: int) -> Words:
        try:
            return point.encode(layout.flatten(answer.update, answer.train_loss), num_clients)
        except ValueError as error:
            raise Refused(f"the update does not fit the fixed point of the sum ({error})", Code.UNFIT) from None

    def _advertise(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        header = self._checks.check(message, self.loaded.base)
        keys = self._sums.advertise(header, message["session"], message["num_sums"])
        return {"keys": protocol.put_bytes(outgoing, keys)}

    def _share(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        keys = _bytes_by_name(message["keys"], tensors)
        sealed = self._sums.share(message["run"], message["session"], keys, message["threshold"])
        return {"shares": {other: protocol.put_bytes(outgoing, content) for other, content in sealed.items()}}

    def _receive(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        shares = _bytes_by_name(message["shares"], tensors)
        return {"false": self._sums.receive(message["run"], message["session"], shares)}

    def _unmask(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        run, session, survivors = message["run"], message["session"], message["survivors"]
        labels = message["round"], message["number"]
        shares = self._sums.unmask(run, session, message["index"], labels, survivors)
        return {"unmask": protocol.put_bytes(outgoing, shares)}

    def _convict(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        for dealer, proof in message["proofs"].items():
            commitments, shares = (_bytes_by_name(proof[key], tensors) for key in ("commitments", "shares"))
            signature = protocol.get_bytes(tensors, proof["signature"])
            run, session = message["run"], message["session"]
            self._sums.convict(run, session, message["index"], dealer, commitments, signature, shares)
            self.notify(f"{dealer} was proved to have dealt false shares: sums go on without it")
        return {}


def _bytes_by_name(indices: Mapping[str, int], tensors: Sequence[Tensor]) -> dict[str, bytes]:
    return {name: protocol.get_bytes(tensors, index) for name, index in indices.items()}
