"""Prompts for an encoder and answers for a decoder, tokenised once.

Shapes: N rows, b rows of a batch, s the tokens of its longest prompt, u of its longest answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedspan.data.base_facts import BaseFacts
from fedspan.data.special_tokens import TEXTS_AT_ONCE, Spelling
from fedspan.data.text_ids import LOOKED_AT, added_tokens, check_known, cut_note, end_tokens, padding_token
from fedspan.data.token_rows import TokenRows
from fedspan.support.errors import FedspanError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class DecoderStart:
    """The tokens that a base's decoder is given before it writes an answer."""

    token: int
    """The decoder's first input, in training as in generation."""
    forced: int | None = None
    """The first token of every answer, which the base demands in generation."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sequences:
    """Token sequences: row i is ``tokens[starts[i] : starts[i] + lengths[i]]``."""

    tokens: Tensor  # (sum of lengths + longest,) int32, the tail being padding so that a gather never leaves it
    starts: Tensor  # (N,)
    lengths: Tensor  # (N,)

    @classmethod
    def of(cls, rows: TokenRows) -> _Sequences:
        lengths = rows.lengths()
        return cls(rows.flat(int(lengths.max())), lengths.cumsum(0) - lengths, lengths)

    def padded(self, rows: Tensor, pad: int) -> tuple[Tensor, Tensor]:
        """Return the rows padded on the right, and where they are real, each (b, longest)."""
        lengths = self.lengths[rows]
        places = torch.arange(int(lengths.max()))
        real = places < lengths[:, None]
        return self.tokens[self.starts[rows][:, None] + places].long().masked_fill_(~real, pad), real


@dataclass(frozen=True, slots=True, eq=False)
class PromptsAndAnswers:
    """Instruction data for an encoder-decoder."""

    sources: _Sequences
    targets: _Sequences
    start: DecoderStart
    leading: tuple[int, ...]
    """Special tokens that the tokenizer puts before every answer, such as a language."""
    pad: int
    ends: tuple[int, ...] = ()
    """Tokens that end an answer."""
    num_positions: int | None = None
    """None: a decoder's answer does not share its positions with the prompt."""
    types: None = None
    """Neither side has token types."""

    @property
    def tokens(self) -> Tensor:
        """All tokens of both sides."""
        return torch.cat([self.sources.tokens, self.targets.tokens])

    @property
    def lengths(self) -> Tensor:
        """Tokens of the prompt or of the answer, whichever are more: (N,)."""
        return torch.maximum(self.sources.lengths, self.targets.lengths)

    @property
    def prompt_lengths(self) -> Tensor:
        """Tokens of the prompt: (N,)."""
        return self.sources.lengths

    def right_padded(self, rows: Tensor) -> dict[str, Tensor]:
        """Return prompts (b, s) for the encoder; for the decoder, answers as labels and moved by one place (b, u)."""
        batch = self._prompts(rows)
        answers, real = self.targets.padded(rows, self.pad)
        first = torch.full((len(rows), 1), self.start.token)
        batch["decoder_input_ids"] = torch.cat([first, answers[:, :-1]], dim=1)
        batch["labels"] = answers.masked_fill(~real, IGNORED)
        return batch

    def prompts(self, rows: Tensor) -> dict[str, Tensor]:
        """Return prompts (b, s), and the tokens that the decoder is given before it writes, (b, 1 or more).

        These are the same in training: what the tokenizer puts before every answer is not the model's to choose.
        """
        given = [self.start.token, *self.leading]
        if not self.leading and self.start.forced is not None:
            given.append(self.start.forced)
        return self._prompts(rows) | {"decoder_input_ids": torch.tensor(given).repeat(len(rows), 1)}

    def _prompts(self, rows: Tensor) -> dict[str, Tensor]:
        # On the right, since an encoder may count its positions from the first token, padding or not.
        ids, real = self.sources.padded(rows, self.pad)
        return {"input_ids": ids, "attention_mask": real.long()}


def encode_pairs(
    prompts: Sequence[np.ndarray],
    answers: Sequence[str],
    spelling: Spelling,
    base: BaseFacts,
    max_length: int,
    start: DecoderStart,
    bare: bool = False,
) -> tuple[PromptsAndAnswers, tuple[str, ...]]:
    """Return the tokens of prompts and answers, each with the special tokens that the tokenizer adds, and notes.

    A prompt of more than `max_length` tokens loses its start, but none of the special tokens around it; an answer of
    more tokens loses its end. An end token that the tokenizer does not add follows the answer.

    Parameters
    ----------
    prompts
        As tokens.
    answers
        Texts, in which special tokens are plain text.
    base
        The facts that the base states.
    bare
        The prompts hold their special tokens already, as a chat template writes them.

    Raises
    ------
    FedspanError
        When neither the tokenizer nor the base has an end token, or a prompt has no tokens.
    """
    tokenizer = spelling.tokenizer
    before, after = ((), ()) if bare else added_tokens(tokenizer)
    leading, trailing = added_tokens(tokenizer, target=True)
    if leading[:1] == (start.token,):
        leading = leading[1:]  # the decoder is given it already
    ends = end_tokens(tokenizer, base, None)
    end = next((end for end in ends if end in trailing), ends[0])
    if end not in trailing:
        trailing = (*trailing, end)
    room = max(1, max_length - len(before) - len(after))
    counts: Counter[str] = Counter()
    sources, targets = TokenRows(), TokenRows()
    for row, prompt in enumerate(prompts, 1):
        counts["prompts"] += len(prompt) > room
        source = _joined(before, prompt[max(0, len(prompt) - room) :], after)
        if not len(source):
            raise FedspanError(f"the prompt of row {row} has no tokens: expected at least one")
        sources.append(source)
    looked_at = list(prompts[:LOOKED_AT])
    for begin in range(0, len(answers), TEXTS_AT_ONCE):
        own = spelling.ids(answers[begin : begin + TEXTS_AT_ONCE], target=True)
        looked_at += own[: LOOKED_AT - len(looked_at)]
        for answer in own:
            target = _joined(leading, answer, trailing)
            counts["answers"] += len(target) > max_length
            targets.append(target[:max_length])
    check_known(tokenizer, looked_at)
    sides = _Sequences.of(sources), _Sequences.of(targets)
    texts = PromptsAndAnswers(*sides, start, leading, padding_token(tokenizer, base), (end,))
    return texts, cut_note(counts, len(answers), max_length)


def _joined(before: Sequence[int], tokens: np.ndarray, after: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.asarray(before, dtype=np.int64), tokens, np.asarray(after, dtype=np.int64)])
