"""Special tokens stay out of the data: text that spells one is read as ordinary text.

Otherwise a row could end its own answer, open a turn of the assistant, or mask a word. Texts without such a spelling,
which are nearly all, are tokenised as they always are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TEXTS_AT_ONCE = 512  # while a tokenizer works, it takes far more memory than the ids that it returns
_PRIVATE = range(0xE000, 0xF8FF)
"""Code points that have no meaning, to stand for a special token while a template is filled in."""


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A special token that the tokenizer recognises in a text."""

    strips_before: bool = False
    """It takes the spaces before it with it."""
    strips_after: bool = False
    """It takes the spaces behind it with it."""


def special_tokens(tokenizer: Any) -> dict[str, SpecialToken]:
    """Return the special tokens of the tokenizer by their spelling, the longest first: one may begin with another."""
    found = {name: SpecialToken() for name in map(str, tokenizer.all_special_tokens)}
    for token in getattr(tokenizer, "added_tokens_decoder", {}).values():
        if token.special:
            found[token.content] = SpecialToken(bool(token.lstrip), bool(token.rstrip))
    return {name: found[name] for name in sorted(found, key=lambda name: (-len(name), name)) if name}


def plain_ids(
    tokenizer: Any, texts: Sequence[str], *, special: bool = False, split: bool = False, target: bool = False
) -> list[np.ndarray]:
    """Return the token ids of each text.

    Parameters
    ----------
    special
        With the tokens that the tokenizer puts before and after a text.
    split
        Special tokens that a text spells are read as ordinary text.
    target
        The texts are answers of an encoder-decoder, which a tokenizer may read otherwise than prompts.
    """
    # Only where it matters: not every tokenizer knows the option.
    options = {"split_special_tokens": True} if split else {}
    tokens: list[np.ndarray] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        chunk = list(texts[start : start + TEXTS_AT_ONCE])
        # verbose=False: no warning of sequences longer than the model's context, which are cut afterwards.
        side = {"text_target" if target else "text": chunk}
        ids = tokenizer(**side, add_special_tokens=special, verbose=False, **options)["input_ids"]
        tokens += [np.asarray(row, dtype=np.int64) for row in ids]
    return tokens


class Spelling:
    """The special tokens of a tokenizer, to be found in texts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._tokens = tokenizer, special_tokens(tokenizer)
        self._names = list(self._tokens)
        self._pattern = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def first(self, text: str) -> str | None:
        """Return the first special token that the text spells, or None."""
        found = self._pattern.search(text)
        return None if found is None else found.group()

    def ids(self, texts: Sequence[str], *, target: bool = False) -> list[np.ndarray]:
        """Return the token ids of each text, none of them special; `target` as in `plain_ids`."""
        odd = [i for i, text in enumerate(texts) if self._pattern.search(text)]
        tokens = plain_ids(self.tokenizer, texts, target=target)
        plain = plain_ids(self.tokenizer, [texts[i] for i in odd], split=True, target=target)
        for i, ids in zip(odd, plain, strict=True):
            tokens[i] = ids
        return tokens

    def template_ids(self, text: str, hidden: Hidden) -> np.ndarray:
        """Return the token ids of a filled-in template, in which the template's own special tokens are special.

        Parameters
        ----------
        hidden
            The spellings in its data, which were hidden while it was filled in.
        """
        # A tokenizer cuts a text at its special tokens before anything else, so the parts can be read one by one.
        parts: list[np.ndarray] = []
        end, strips = 0, False
        for found in [*self._pattern.finditer(text), None]:
            part = text[end:] if found is None else text[end : found.start()]
            token = None if found is None else self._tokens[found.group()]
            part = part.lstrip() if strips else part
            part = part.rstrip() if token is not None and token.strips_before else part
            if part:
                parts += plain_ids(self.tokenizer, [hidden.restored(part)], split=True)
            if found is not None and token is not None:
                parts.append(np.asarray([self.tokenizer.convert_tokens_to_ids(found.group())], dtype=np.int64))
                end, strips = found.end(), token.strips_after
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def hide(self, texts: Sequence[str]) -> tuple[list[str], Hidden | None]:
        """Return texts in which no special token is spelt, and what puts the spellings back."""
        if not any(map(self._pattern.search, texts)):
            return list(texts), None
        used = set("".join(texts))
        mark = next(chr(code) for code in _PRIVATE if chr(code) not in used)
        hidden = Hidden(mark, tuple(self._names))
        numbers = {name: i for i, name in enumerate(self._names)}
        return [self._pattern.sub(lambda m: f"{mark}{numbers[m.group()]}{mark}", text) for text in texts], hidden


class Hidden:
    """Spellings of special tokens that numbers between two private marks stand for."""

    def __init__(self, mark: str, names: tuple[str, ...]) -> None:
        self._names, self._pattern = names, re.compile(f"{mark}(\\d+){mark}")

    def restored(self, text: str) -> str:
        """Return the text with the spellings in their places."""
        return self._pattern.sub(lambda found: self._names[int(found.group(1))], text)
