"""What an answer must look like before the round loop sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedspan.config import Config
from fedspan.federation.clients import Client
from fedspan.federation.exchange import Answer, Question, begin, unlearnt
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast, Request, Tensors, Update
from fedspan.privacy.fixed_point import Words
from fedspan.server.requests import Missing
from fedspan.wire import protocol
from fedspan.wire.precision import packed_bytes
from fedspan.wire.sizes import payload_tensors

_Wanted = tuple[Mapping[str, tuple[int, ...]], Mapping[str, float]]
"""Shapes and scalings of an answer."""
DAMAGED = (ValueError, KeyError, TypeError, IndexError)
"""What reading a head that lies comes to."""


@dataclass(slots=True)
class Checks:
    """What the answers of one exchange must look like."""

    config: Config
    method: Method
    question: Question
    initial: Tensors
    """Heads and trained weights of the untouched base."""
    raw: dict[int, Update]
    """By rank, the shapes of what training, or a gradient, last came to: later exchanges of a round ask about it."""
    _derived: dict[int, Broadcast] = field(default_factory=dict)
    _wanted: dict[str, _Wanted] = field(default_factory=dict)
    _by_broadcast: dict[int, tuple[Broadcast, _Wanted]] = field(default_factory=dict)

    def derived(self, rank: int) -> Broadcast:
        """What a site of that rank works out by itself."""
        if rank not in self._derived:
            q, method = self.question, self.method
            state = replace(method.init(q.template, self.initial), round_num=q.round_num)
            self._derived[rank] = method.broadcast(state, Request(rank))
        return self._derived[rank]

    def patch_versions(self, client: Client) -> tuple[int, int]:
        """What the client holds, and what it will hold."""
        return self.question.seen.get(client.client_id, 0), self.question.version

    def note(self, client: Client, sent: Broadcast) -> None:
        """Remember what an answer to this must hold."""
        key = id(sent)
        if key not in self._by_broadcast:
            q, method = self.question, self.method
            started = begin(method, q, sent, None)
            if q.exchange.ask != "again":
                self.raw[client.rank] = unlearnt(q.template, started)
            header = method.encode(self.raw[client.rank], started, None)[0]
            self._by_broadcast[key] = (sent, (protocol.shapes(header), header.scalings()))
        self._wanted[client.client_id] = self._by_broadcast[key][1]

    def answer(self, client: Client, header: Mapping[str, Any], tensors: Sequence[Tensor]) -> Answer:
        """One client's update, or what is wrong with it."""
        try:
            update = protocol.get_update(header["update"], tensors, client.client_id)
            loss = math.nan if header["train_loss"] is None else float(header["train_loss"])
            seconds, held = float(header["seconds"]), int(header["optimizer_bytes"])
        except DAMAGED as error:
            return problem(client, f"sent a damaged update ({type(error).__name__}: {error})")
        wrong = self._wrong(client, update)
        if wrong is not None:
            return problem(client, wrong)
        kind = self.config.wire.up
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
        self, client: Client, num_words: int, header: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> tuple[Words, Answer] | str:
        """One client's part of a sum, or what is wrong with it."""
        try:
            vector, seconds, held = tensors[header["words"]], float(header["seconds"]), int(header["optimizer_bytes"])
        except DAMAGED as error:
            return f"sent a damaged vector ({type(error).__name__}: {error})"
        if vector.dtype != torch.int64 or tuple(vector.shape) != (num_words,):
            return f"sent a vector of {vector.dtype} in shape {tuple(vector.shape)}: expected {num_words} words"
        answer = Answer(
            client, None, train_loss=math.nan, seconds=seconds, bytes_up=8 * num_words, optimizer_bytes=held
        )
        return vector.contiguous().numpy().view(np.uint64), answer

    def _wrong(self, client: Client, update: Update) -> str | None:
        wanted, scalings = self._wanted[client.client_id]
        for name, scaling in update.scalings().items():
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
        for value in payload_tensors(update):
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                return "what it sent holds NaN or infinity, or no numbers"
        weight = client.weight(self.config.federation.weighting)
        if update.num_examples != weight:
            return f"counts as {update.num_examples:g} examples: it said {weight:g} when it came"
        return None


def problem(client: Client, reason: str) -> Answer:
    """No answer, and why."""
    return Answer(client, None, reason, isinstance(reason, Missing), 0.0)
