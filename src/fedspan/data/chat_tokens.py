"""Conversations as tokens, with the places that the loss is on.

A conversation is tokenised as a whole, as transformers does. Where a token would lie across the border between a
prompt and an answer, the text is cut there, since generation has the prompt alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from fedspan.config import DataConfig
from fedspan.data.base_facts import BaseFacts
from fedspan.data.chat_template import Renderer, Rendering
from fedspan.data.conversations import Conversation
from fedspan.data.text_ids import end_tokens
from fedspan.support.errors import FedspanError

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the characters that each of them stands for."""


@dataclass(frozen=True, slots=True, eq=False)
class ChatRow:
    """One conversation as tokens.

    Shapes: t tokens.
    """

    ids: np.ndarray  # (t,) int64
    trained: np.ndarray  # (t,) bool, the assistant's turns
    prompt_length: int
    """Tokens before the last answer."""
    num_leading: int
    """Special tokens at its start, which are never cut."""

    def cut(self, max_length: int, counts: Counter[str]) -> ChatRow:
        """Return at most `max_length` tokens of it: the end of the prompt, and of an answer too long its start."""
        if len(self.ids) <= max_length:
            return self
        counts["prompts"] += 1
        answer = slice(self.prompt_length, None)
        kept = max(1, max_length - max(self.num_leading, 1))
        counts["answers"] += len(self.ids[answer]) > kept
        room = max(0, max_length - self.num_leading - len(self.ids[answer][:kept]))
        start = max(self.num_leading, self.prompt_length - room)

        def of(values: np.ndarray) -> np.ndarray:
            return np.concatenate(
                [values[: self.num_leading], values[start : self.prompt_length], values[answer][:kept]]
            )

        length = self.num_leading + self.prompt_length - start
        return ChatRow(of(self.ids), of(self.trained), length, self.num_leading)


@dataclass(slots=True)
class ChatEncoder:
    """Tokenises conversations for a causal model (:meth:`rows`) or for an encoder-decoder (:meth:`sources`)."""

    tokenizer: Any
    config: DataConfig
    base: BaseFacts
    """The facts that the base states."""
    leading: Sequence[int]
    """Special tokens that the tokenizer puts before a text; a chat template writes its own."""
    counts: Counter[str] = field(default_factory=Counter)
    """The parts left out, by kind."""
    ends: set[int] = field(default_factory=set)
    """The tokens that answers end with."""
    renderer: Renderer = field(init=False)

    def __post_init__(self) -> None:
        """Check the template's setting."""
        self.renderer = Renderer.of(self.tokenizer)
        given = self.config.template
        if given not in (DataConfig.model_fields["template"].default, "chat"):
            raise FedspanError(
                f"data.template = {given!r}: conversations are written by the tokenizer's chat template; "
                f"expected no data.template"
            )
        if given == "chat" and not self.renderer.templated:
            raise FedspanError("data.template = 'chat': this tokenizer has no chat template; expected no data.template")
        if self.config.system:
            raise FedspanError(
                f"data.system = {self.config.system!r}: conversations have system turns of their own; expected none"
            )
        if self.renderer.templated:
            self.leading = ()

    def rows(self, conversations: Sequence[Conversation]) -> Iterator[ChatRow]:
        """Yield every conversation as tokens, at most `data.max_length` of them.

        One that is too long loses its oldest exchanges, one after the other; if its last alone is too long, its
        prompt loses its start, and only an answer that is too long by itself loses its end.

        Raises
        ------
        FedspanError
            When nothing to be learnt is left of one.
        """
        for conversation in conversations:
            row = self._row(conversation)
            short = conversation
            while len(row.ids) > self.config.max_length and short.num_exchanges > 1:
                short = short.without_oldest()
                row = self._row(short)
            self._count_dropped(conversation, short)
            row = row.cut(self.config.max_length, self.counts)
            if not row.trained.any():
                raise FedspanError(
                    f"{conversation.where}: data.max_length = {self.config.max_length} leaves nothing that the loss is "
                    f"on: expected more"
                )
            yield row

    def sources(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """Return everything before the last answers, for an encoder: without their oldest exchanges where too long."""
        found = []
        for conversation in conversations:
            if not conversation.answer.trained:
                raise FedspanError(
                    f'{conversation.where}: its last turn has "weight": 0, and an encoder-decoder learns that alone: '
                    f"expected 1"
                )
            short = conversation
            tokens = self._source(short)
            while len(tokens) > self.config.max_length and short.num_exchanges > 1:
                short = short.without_oldest()
                tokens = self._source(short)
            self._count_dropped(conversation, short)
            self.counts["context"] += short.num_exchanges - 1
            found.append(tokens)
        return found

    def notes(self, num_conversations: int) -> tuple[str, ...]:
        """Return one line about what was left out, or nothing."""
        counts, limit = self.counts, f"data.max_length = {self.config.max_length}"
        parts = {
            "conversations": f"{counts['conversations']} lost their oldest turns ({counts['turns']} turns)",
            "prompts": f"{counts['prompts']} lost the start of their last prompt",
            "answers": f"{counts['answers']} lost the end of their last answer, and so the token that ends it",
        }
        said = [text for kind, text in parts.items() if counts[kind]]
        lines = [f"of {num_conversations} conversations, {'; '.join(said)} ({limit})"] if said else []
        if counts["context"]:
            lines.append(
                f"an encoder-decoder learns the last answer of a conversation: {counts['context']} earlier answers are "
                f"context only"
            )
        return tuple(lines)

    def _count_dropped(self, whole: Conversation, kept: Conversation) -> None:
        self.counts["conversations"] += kept is not whole
        self.counts["turns"] += len(whole.turns) - len(kept.turns)

    def _source(self, conversation: Conversation) -> np.ndarray:
        rendering = self.renderer.render(conversation)
        ids, _ = self._tokens(rendering.text[: rendering.prompt])
        return np.asarray(ids, dtype=np.int64)

    def _row(self, conversation: Conversation) -> ChatRow:
        rendering = self.renderer.render(conversation)
        ids, characters = self._whole(rendering)
        trained = np.zeros(len(ids), dtype=bool)
        places = np.asarray([start for start, _ in characters])
        answers = [turn for turn in conversation.turns if turn.role == "assistant"]
        for (start, stop), turn in zip(rendering.spans, answers, strict=True):
            if turn.trained:
                trained |= (places >= start) & (places < stop)
        prompt_length = int((places < rendering.prompt).sum())
        stop = int((places < rendering.spans[-1][1]).sum())
        ids, trained = ids[:stop], trained[:stop]  # nothing is learnt from what follows the last answer's end
        if not rendering.closed:
            end = end_tokens(self.tokenizer, self.base, None)[0]
            ids, trained = [*ids, end], np.append(trained, conversation.answer.trained)
        self.ends.add(ids[-1])
        leading = list(self.leading)
        if not leading and ids[0] == self.tokenizer.bos_token_id:  # a chat template writes it out
            leading, ids, trained = [ids[0]], ids[1:], trained[1:]
            prompt_length -= 1
        if prompt_length + len(leading) < 1:
            raise FedspanError(
                f"{conversation.where}: its prompt has no tokens: expected one or more before the answer"
            )
        before = len(leading)
        return ChatRow(
            np.asarray([*leading, *ids], dtype=np.int64),
            np.concatenate([np.zeros(before, dtype=bool), trained]),
            before + prompt_length,
            before,
        )

    def _whole(self, rendering: Rendering) -> Tokens:
        """Return the tokens of a rendering, none of which lies across the start of an answer."""
        text, borders = rendering.text, [start for start, _ in rendering.spans]
        if self.tokenizer.is_fast:
            ids, characters = self._tokens(text)
            prompt, _ = self._tokens(text[: rendering.prompt])
            crossing = any(start < place < stop for place in borders for start, stop in characters)
            if not crossing and ids[: len(prompt)] == prompt:
                return ids, characters
        ids, characters = [], []
        places = [0, *(place for span in rendering.spans for place in span), len(text)]
        for start, stop in pairwise(places):
            part, _ = self._tokens(text[start:stop])
            ids += part
            characters += [(start, stop)] * len(part)
        return ids, characters

    def _tokens(self, text: str) -> Tokens:
        """Return the tokens of a text, in which special tokens of the data itself stay text."""
        ids: list[int] = []
        characters: list[tuple[int, int]] = []
        fast = self.tokenizer.is_fast
        for piece, place, as_text in self.renderer.pieces(text):
            options: dict[str, Any] = {"split_special_tokens": True} if as_text else {}
            # verbose=False: no warning of sequences longer than the model's context, which are cut afterwards.
            found = self.tokenizer(
                piece, add_special_tokens=False, return_offsets_mapping=fast, verbose=False, **options
            )
            part = list(found["input_ids"])
            ids += part
            if as_text or not fast:  # the token stands for one character of the rendering
                characters += [(place, place + 1)] * len(part)
            else:
                characters += [(place + start, place + stop) for start, stop in found["offset_mapping"]]
        return ids, characters
