"""Conversations as text: the base's chat template, or a plain form, and where the assistant's turns lie in it.

The plain form, for tokenizers without a chat template, with the end token written out behind every answer::

    SYSTEM

    User:
    QUESTION

    Assistant:
    ANSWER</s>

    User:
    …

Text of the data must not become a special token of the tokenizer. Special tokens that occur in it are replaced, before
it is rendered, by one private-use character each, which `data.chat_tokens` turns back into plain text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedspan.data.chat import ANOTHER_DATE, template_options
from fedspan.data.conversations import Conversation, Turn
from fedspan.data.special_tokens import special_tokens
from fedspan.support.errors import FedspanError, first_line

_HELD = 0xF0000
"""The first of the private-use characters that stand for special tokens in the data's own text."""
_OPEN, _CLOSE = chr(0x10FFF0), chr(0x10FFF1)
"""The marks around an answer whose place in a rendering is looked for."""
_RESERVED = re.compile("[\U000f0000-\U0010ffff]")
_HELD_APART = re.compile("([\U000f0000-\U0010ffff])")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text."""

    text: str
    """With private-use characters for the special tokens of the data itself."""
    spans: tuple[Span, ...]
    """The characters of each turn of the assistant with the token that ends it, in order."""
    prompt: int
    """Characters before the last of them."""
    closed: bool
    """A special token ends the last of them."""


@dataclass(frozen=True, slots=True)
class Renderer:
    """A tokenizer's way of writing conversations."""

    tokenizer: Any
    specials: tuple[str, ...]
    """Every special token, the longest first."""

    @classmethod
    def of(cls, tokenizer: Any) -> Renderer:
        """Return that of a tokenizer."""
        return cls(tokenizer, tuple(special_tokens(tokenizer)))

    @property
    def templated(self) -> bool:
        """True where the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def render(self, conversation: Conversation) -> Rendering:
        """Return a conversation as text.

        Raises
        ------
        FedspanError
            When the template refuses the conversation, or the assistant's turns cannot be told apart in its text.
        """
        held = replace(conversation, turns=tuple(self._hold(turn, conversation.where) for turn in conversation.turns))
        if not self.templated:
            return self._plain(held)
        text = self._fill(held, held.turns)
        prompt = self._fill(held, held.turns[:-1], answering=True)
        spans = self._by_prefixes(held, text)
        if spans is None:
            spans = self._by_template(held, text)
            if spans is not None and not text.startswith(prompt):
                prompt = text[: spans[-1][0]]  # the template says itself where the answer begins
        if spans is None:
            spans = self._by_marks(held, text)
        if spans is None or not text.startswith(prompt) or spans[-1][1] <= len(prompt):
            raise FedspanError(
                f"{held.where}: the chat template writes earlier turns differently once later ones follow, so the "
                f"assistant's turns cannot be told apart: expected a template that only adds text, or marks them by "
                f"{{% generation %}}"
            )
        spans = (*spans[:-1], (len(prompt), spans[-1][1]))
        return Rendering(text, spans, len(prompt), text[: spans[-1][1]].endswith(self.specials))

    def prints_date(self, conversation: Conversation) -> bool:
        """Return whether the template prints today's date in a conversation."""
        if not self.templated:
            return False
        other = template_options(self.tokenizer, False, ANOTHER_DATE)
        return bool(
            self._fill(conversation, conversation.turns) != self._fill(conversation, conversation.turns, **other)
        )

    def pieces(self, text: str) -> list[tuple[str, int, bool]]:
        """Return a rendering in parts: text, its place in the rendering, and whether it is a special token as text."""
        found, place = [], 0
        for part in _HELD_APART.split(text):
            if _RESERVED.match(part):
                found.append((self.specials[ord(part) - _HELD], place, True))
            elif part:
                found.append((part, place, False))
            place += len(part)
        return found

    def _hold(self, turn: Turn, where: str) -> Turn:
        if _RESERVED.search(turn.content):
            raise FedspanError(f"{where} has a private-use character above U+F0000: expected text without")
        content = turn.content
        for i, name in enumerate(self.specials):
            content = content.replace(name, chr(_HELD + i))
        return replace(turn, content=content)

    def _plain(self, conversation: Conversation) -> Rendering:
        end = self.tokenizer.eos_token or ""
        text, spans = "".join(f"{turn.content}\n\n" for turn in conversation.system), []
        for turn in conversation.turns[len(conversation.system) :]:
            if turn.role == "user":
                text += f"User:\n{turn.content}\n\nAssistant:\n"
                continue
            spans.append((len(text), len(text) + len(turn.content) + len(end)))
            text += f"{turn.content}{end}\n\n"
        text = text[: spans[-1][1]]
        return Rendering(text, tuple(spans), spans[-1][0], bool(end))

    def _fill(self, conversation: Conversation, turns: Sequence[Turn], answering: bool = False, **options: Any) -> Any:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(
                messages, **{**template_options(self.tokenizer, answering), **options}
            )
        except Exception as error:  # jinja's errors, those that a template raises, and those of its own mistakes
            raise FedspanError(f"{conversation.where}: the chat template refuses it ({first_line(error)})") from None

    def _by_prefixes(self, conversation: Conversation, text: str) -> tuple[Span, ...] | None:
        """Return the text that each turn of the assistant adds, or None where a rendering is no start of the whole."""
        spans = []
        for i, turn in enumerate(conversation.turns):
            if turn.role != "assistant":
                continue
            before = self._fill(conversation, conversation.turns[:i], answering=True)
            through = self._fill(conversation, conversation.turns[: i + 1])
            if not (text.startswith(before) and text.startswith(through) and through.startswith(before)):
                return None
            spans.append((len(before), self._end(text, len(before), len(through))))
        return tuple(spans)

    def _end(self, text: str, start: int, stop: int) -> int:
        """Return the end of the last special token in a turn's text, if only spaces follow it, else the text's end."""
        piece = text[start:stop].rstrip()
        return start + len(piece) if piece.endswith(self.specials) else stop

    def _by_template(self, conversation: Conversation, text: str) -> tuple[Span, ...] | None:
        """Return what the template marks by {% generation %}, or None where it marks nothing."""
        template = self.tokenizer.chat_template
        if not isinstance(template, str) or not _GENERATION.search(template) or not self.tokenizer.is_fast:
            return None
        marked = self._fill(
            conversation,
            conversation.turns,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        before = False
        for inside, (start, stop) in zip(marked["assistant_masks"], marked["offset_mapping"], strict=True):
            if inside:
                spans.append((spans.pop()[0] if before else start, stop))
            before = bool(inside)
        return tuple(spans) if len(spans) == conversation.num_exchanges else None

    def _by_marks(self, conversation: Conversation, text: str) -> tuple[Span, ...] | None:
        """Return where answers between marks come out, or None where the text depends on more than their places."""
        marked = [
            replace(turn, content=f"{_OPEN}{turn.content}{_CLOSE}") if turn.role == "assistant" else turn
            for turn in conversation.turns
        ]
        parts = re.split(f"[{_OPEN}{_CLOSE}]", self._fill(conversation, marked))
        if "".join(parts) != text or len(parts) != 2 * conversation.num_exchanges + 1:
            return None
        spans, place = [], 0
        for i, part in enumerate(parts):
            place += len(part)
            if i % 2:
                spans.append((place - len(part), place + self._closing(parts[i + 1])))
        return tuple(spans)

    def _closing(self, text: str) -> int:
        """Return the length of the special token that text begins with, spaces before it included, or 0."""
        bare = text.lstrip()
        name = next((name for name in self.specials if bare.startswith(name)), "")
        return len(text) - len(bare) + len(name) if name else 0
