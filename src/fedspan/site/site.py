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
from fedspan.privacy.sum_layout import SumLayout
from fedspan.site.errors import Refused, code_of
from fedspan.site.incidents import refusal
from fedspan.site.loading import Loaded, client_of
from fedspan.site.local_work import LocalAnswer, LocalWork
from fedspan.site.message_checks import MessageChecks
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
        corpus = load_data(config.data, config.seed)
        self.client = client_of(settings, corpus)
        self.loaded = Loaded.of(config, method, corpus, self.client.rank) if loaded is None else loaded
        self.terms = agreement.terms(config)
        self._checks = MessageChecks(self.terms, max(self.client.rank, requirements.largest_rank(config.federation)))
        storage = SiteStorage(folder / "state")
        privacy = config.privacy
        examples = ExampleLedgers(privacy, config.local.batch_size, folder) if privacy.dp == "example" else None
        self.work = LocalWork(config, method, self.client, self.loaded, storage, examples)
        self._sums = SumParticipant(settings, self.client.client_id, storage)
        self._handlers: Mapping[str, _Handler] = {
            "hello": self._hello,
            "ask": self._ask,
            "advertise": self._advertise,
            "share": self._share,
            "unmask": self._unmask,
        }

    def answer(self, content: bytes) -> bytes:
        """Return the answer to one message; that there is none is an answer too.

        No error ends the process, which has a base in memory, and no text of an error leaves the site: it may quote
        the data. The server is told a code, and the incident's number, under which the text is in this site's log.
        """
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
        # Where only sums may be known, neither may the amount of data at one site.
        hidden = self.privacy.secure_sums or self.privacy.dp != "none"
        return {
            "rank": self.client.rank,
            "num_examples": None if hidden else self.client.num_examples,
            "base": self.loaded.base,
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
            words = self._words(header.run, message["sum"], answer, tensors)
            fields["words"] = outgoing.put(torch.from_numpy(words.view(np.int64)))
        else:
            fields["train_loss"] = answer.train_loss if math.isfinite(answer.train_loss) else None
            fields["update"] = protocol.put_update(outgoing, answer.update, self._precision)
        return fields

    def _words(self, run: str, requested: Mapping[str, Any], answer: LocalAnswer, tensors: Sequence[Tensor]) -> Words:
        """Return the answer as the words of a sum, masked where the settings say so."""
        layout, fixed_point = SumLayout.from_json(requested["layout"]), FixedPoint(self.privacy.fraction_bits)
        try:
            numbers = layout.flatten(answer.update, answer.train_loss)
            words = fixed_point.encode(numbers, requested["num_clients"])
        except ValueError as error:
            raise Refused(f"the update does not fit the fixed point of the sum ({error})", Code.UNFIT) from None
        if not self.privacy.secure_sums:
            return words
        shares = _bytes_by_name(requested["shares"], tensors) if "shares" in requested else None
        return self._sums.mask(run, requested["session"], requested["index"], words, shares)

    def _advertise(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        header = self._checks.check(message, self.loaded.base)
        keys = self._sums.advertise(header, message["session"], message["num_sums"])
        return {"keys": protocol.put_bytes(outgoing, keys)}

    def _share(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        keys = _bytes_by_name(message["keys"], tensors)
        sealed = self._sums.share(message["run"], message["session"], keys, message["threshold"])
        return {"shares": {other: protocol.put_bytes(outgoing, content) for other, content in sealed.items()}}

    def _unmask(self, message: Mapping[str, Any], tensors: Sequence[Tensor], outgoing: MessageTensors) -> Fields:
        sum_name = f"{message['round']}/{message['place'][0]}"
        run, session, survivors = message["run"], message["session"], message["survivors"]
        shares = self._sums.unmask(run, session, message["index"], sum_name, survivors)
        return {"unmask": protocol.put_bytes(outgoing, shares)}


def _bytes_by_name(indices: Mapping[str, int], tensors: Sequence[Tensor]) -> dict[str, bytes]:
    return {name: protocol.get_bytes(tensors, index) for name, index in indices.items()}
