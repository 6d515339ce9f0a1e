"""Examples as tensors: tokenised or processed once, then batched by direct indexing.

Tokens of all rows lie one after the other in a flat tensor; a batch is one gather from it.
Shapes: N rows, b rows of a batch, t the tokens of its longest row.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedspan.config import DataConfig
from fedspan.data.base_facts import NOTHING_STATED, BaseFacts
from fedspan.data.chat import ChatFormat
from fedspan.data.chat_tokens import ChatEncoder
from fedspan.data.conversations import Conversation, conversations_of
from fedspan.data.encoder_decoder import DecoderStart, PromptsAndAnswers, encode_pairs
from fedspan.data.rows import Kind, Rows
from fedspan.data.special_tokens import TEXTS_AT_ONCE, Spelling
from fedspan.data.text_ids import (
    DATE_NOTE,
    added_tokens,
    chat_format,
    check_end_counts,
    check_known,
    classified_ids,
    end_tokens,
    padding_token,
    prompt_ids,
    special_note,
)
from fedspan.support.errors import FedspanError, first_line

IGNORED = -100  # the label that cross_entropy leaves out of the loss
_IMAGES_AT_ONCE = 256

Indices = Sequence[int] | np.ndarray | Tensor
_AnyTexts = TypeVar("_AnyTexts", "_Texts", PromptsAndAnswers)


@dataclass(frozen=True, slots=True, eq=False)
class _Texts:
    """Token sequences: row i is ``tokens[starts[i] : starts[i] + lengths[i]]``, its prompt the first part."""

    tokens: Tensor  # (sum of lengths + longest,), the tail being padding so that a gather never leaves it
    types: Tensor | None  # the same shape, for tokenizers with token types
    starts: Tensor  # (N,)
    lengths: Tensor  # (N,)
    prompt_lengths: Tensor | None  # (N,), instruction data
    pad: int
    ends: tuple[int, ...] = ()  # tokens that end an answer, instruction data; the first ends those that are trained on
    num_positions: int | None = None  # the longest sequence that the base takes, where that is known
    answers: Tensor | None = None  # as tokens, true where the loss is; None: at everything after the prompt

    def right_padded(self, rows: Tensor) -> dict[str, Tensor]:
        """Return whole sequences for training, with labels at the answer tokens alone."""
        lengths = self.lengths[rows]
        places = torch.arange(int(lengths.max()))  # (t,)
        mask = places < lengths[:, None]  # (b, t)
        flat = self.starts[rows][:, None] + places
        ids = self.tokens[flat].masked_fill_(~mask, self.pad)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if self.types is not None:
            batch["token_type_ids"] = self.types[flat].masked_fill_(~mask, 0)
        if self.prompt_lengths is not None:
            later = places >= self.prompt_lengths[rows][:, None]
            answer = mask & (later if self.answers is None else self.answers[flat])
            batch["labels"] = ids.masked_fill(~answer, IGNORED)
        return batch

    def prompts(self, rows: Tensor) -> dict[str, Tensor]:
        """Return prompts that all end at the last position, where generation continues."""
        assert self.prompt_lengths is not None
        lengths = self.prompt_lengths[rows]
        longest = int(lengths.max())
        places = torch.arange(longest) - (longest - lengths)[:, None]  # (b, t), negative in the padding
        mask = places >= 0
        ids = self.tokens[self.starts[rows][:, None] + places.clamp_(min=0)]
        return {"input_ids": ids.masked_fill_(~mask, self.pad), "attention_mask": mask.long()}


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Examples as tensors, ready for a model, or a view of some of them. Made by :func:`encode`.

    Attributes
    ----------
    kind
        The kind of all examples.
    rows
        (len,) rows of the shared storage that this view shows.
    all_targets, all_fields
        Targets and fields of every row of the storage, as in :class:`fedspan.data.rows.Rows`.
    texts
        The token sequences of text data.
    pixels
        (N, channels, height, width) float32, of image data.
    labels
        (N,) int64 class ids, or float32 for regression; None for instruction data.
    notes
        Lines on how the data was read where that may surprise.
    """

    kind: Kind
    rows: Tensor
    all_targets: Sequence[Any]
    all_fields: Sequence[str]
    texts: _Texts | PromptsAndAnswers | None
    pixels: Tensor | None
    labels: Tensor | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Indices) -> dict[str, Tensor]:
        """Return the training batch of the rows at `indices` (at least one), as a model's ``forward`` takes it.

        Returns
        -------
        dict
            Text: ``input_ids``, ``attention_mask`` (and ``token_type_ids`` where the tokenizer has them),
            each (b, t) and padded on the right; images: ``pixel_values`` (b, channels, height, width).
            ``labels`` is (b, t) with -100 outside the answer for instruction data, otherwise (b,). For an
            encoder-decoder the labels have the answers' own length, and there is ``decoder_input_ids``.
        """
        rows = self._rows(indices)
        if self.texts is not None:
            batch = self.texts.right_padded(rows)
        else:
            assert self.pixels is not None
            batch = {"pixel_values": self.pixels[rows]}
        if self.labels is not None:
            batch["labels"] = self.labels[rows]
        return batch

    def prompts(self, indices: Indices) -> dict[str, Tensor]:
        """Return the prompts of instruction data, padded on the left for generation.

        Token by token they are the sequences of :meth:`batch` up to the answer; of a conversation, the last one.

        Returns
        -------
        dict
            ``input_ids`` and ``attention_mask``, each (b, t). For an encoder-decoder these are padded on the right,
            and ``decoder_input_ids`` begin the answer.

        Raises
        ------
        ValueError
            For other data.
        """
        if self.texts is None or self.texts.prompt_lengths is None:
            raise ValueError(f"{self.kind} data has no prompts: expected instruction data")
        return self.texts.prompts(self._rows(indices))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (len,) int64; images count as 1."""
        return torch.ones_like(self.rows) if self.texts is None else self.texts.lengths[self.rows]

    def extent(self) -> tuple[int, int, int | None]:
        """Return the largest token id, the tokens of the longest row and the largest token type of a text data set.

        The type is None where the tokenizer has no types.
        """
        assert self.texts is not None
        types = self.texts.types
        largest_type = None if types is None else int(types.max())
        return max(int(self.texts.tokens.max()), self.texts.pad), int(self.texts.lengths.max()), largest_type

    @property
    def references(self) -> list[Any]:
        """The answers, class ids or numbers that predictions are compared with."""
        return [self.all_targets[row] for row in self.rows.tolist()]

    @property
    def targets(self) -> np.ndarray:
        """The references as an array, as a label-skewed partition takes it."""
        return np.asarray(self.references)

    @property
    def fields(self) -> list[str]:
        """The task, category or source of each row, or ``""``."""
        return [self.all_fields[row] for row in self.rows.tolist()]

    def subset(self, indices: Indices) -> Encoded:
        """Return a view of the rows at `indices` (possibly none); the tensors are shared, not copied."""
        return replace(self, rows=self._rows(indices))

    def _rows(self, indices: Indices) -> Tensor:
        return self.rows[torch.as_tensor(indices, dtype=torch.int64)]


def encode(
    rows: Rows,
    processor: Any,
    config: DataConfig,
    base: BaseFacts = NOTHING_STATED,
    *,
    decoder: DecoderStart | None = None,
) -> Encoded:
    """Tokenise (or process) all rows once.

    Instruction data: the prompt is ``template`` filled in, or one user turn of the tokenizer's chat template;
    prompt and answer are tokenised separately, as in generation, and the answer's end token follows it: the token
    that ends an assistant's turn in the chat template, otherwise the tokenizer's end token, or the base's first one
    where the base does not end texts with the tokenizer's.
    Special tokens are written by the template and the tokenizer alone: a text that spells one is ordinary text.
    A row that is too long loses the start of its prompt (but never leading special tokens, and at least one
    token stays before the answer); only an answer that is too long by itself is cut, at its end.
    Conversations: see :class:`fedspan.data.chat_tokens.ChatEncoder`. For an encoder-decoder, prompt and answer are
    sequences of their own, each of at most ``max_length`` tokens.
    Classification: the tokenizer's own truncation to ``max_length``. A tokenizer without a padding token pads
    with its end token, or 0 if it has neither; the attention mask makes the choice harmless.
    Images: grey ones are given three equal channels before the model's own processor.

    Parameters
    ----------
    rows
        At least one example.
    processor
        A tokenizer or image processor of transformers.
    config
        ``template``, ``system`` and ``max_length``.
    base
        The facts that the base states.
    decoder
        The start of an encoder-decoder's answers; None for any other model.

    Raises
    ------
    FedspanError
        For an unusable template, a tokenizer that lacks what is needed or knows none of the text, or rows without
        tokens.
    """
    if not len(rows):
        raise FedspanError("no rows to encode: expected at least one")
    texts: _Texts | PromptsAndAnswers | None = None
    pixels = None
    notes: tuple[str, ...] = ()
    if rows.kind == "instruction":
        if config.max_length < 2:
            raise FedspanError(f"data.max_length = {config.max_length}: expected 2 or more for instruction data")
        conversations = conversations_of(rows)
        if conversations is not None:
            texts, notes = _encode_conversations(rows, conversations, processor, config, base, decoder)
        elif decoder is not None:
            texts, notes = _encode_pairs(rows, processor, config, base, decoder)
        else:
            texts, notes = _encode_instructions(rows, processor, config, base)
    elif rows.kind == "classification":
        texts, notes = _encode_texts(rows, processor, config, base)
    else:
        pixels = _encode_images(rows.inputs, processor)
    labels = None
    if rows.kind != "instruction":
        regression = any(isinstance(target, float) for target in rows.targets)
        labels = torch.tensor(rows.targets, dtype=torch.float32 if regression else torch.int64)
    return Encoded(rows.kind, torch.arange(len(rows)), rows.targets, rows.fields, texts, pixels, labels, notes)


def _encode_pairs(
    rows: Rows, tokenizer: Any, config: DataConfig, base: BaseFacts, decoder: DecoderStart
) -> tuple[PromptsAndAnswers, tuple[str, ...]]:
    """Encode instruction data for an encoder-decoder."""
    chat = chat_format(tokenizer, config, base)
    spelling = Spelling(tokenizer)
    prompts = prompt_ids(rows.inputs, _filler(config.template, chat), spelling)
    limit, bare = config.max_length, chat is not None
    texts, notes = encode_pairs(prompts, rows.targets, spelling, base, limit, decoder, bare)
    return _with_ends(texts, tokenizer, base), (*_notes_of_instructions(rows, spelling, chat), *notes)


def _encode_conversations(
    rows: Rows,
    conversations: list[Conversation],
    tokenizer: Any,
    config: DataConfig,
    base: BaseFacts,
    decoder: DecoderStart | None,
) -> tuple[_Texts | PromptsAndAnswers, tuple[str, ...]]:
    chat = ChatEncoder(tokenizer, config, base, added_tokens(tokenizer)[0])
    spelling = Spelling(tokenizer)
    notes = special_note(spelling, [turn.content for talk in conversations for turn in talk.turns])
    notes += (DATE_NOTE,) if chat.renderer.prints_date(conversations[0]) else ()
    texts: _Texts | PromptsAndAnswers
    if decoder is None:
        texts = _with_ends(_of_conversations(chat, conversations, base), tokenizer, base)
    else:
        sources = chat.sources(conversations)
        bare = chat.renderer.templated
        pairs, cut = encode_pairs(sources, rows.targets, spelling, base, config.max_length, decoder, bare)
        texts, notes = _with_ends(pairs, tokenizer, base), notes + cut
    return texts, (*notes, *chat.notes(len(rows)))


def _with_ends(texts: _AnyTexts, tokenizer: Any, base: BaseFacts) -> _AnyTexts:
    """Return the texts with the tokens that end an answer in generation beside those that are trained on."""
    ends = (*texts.ends, *base.end_tokens, tokenizer.eos_token_id)
    return replace(texts, ends=tuple(dict.fromkeys(end for end in ends if end is not None)))


def _of_conversations(chat: ChatEncoder, conversations: list[Conversation], base: BaseFacts) -> _Texts:
    rows = chat.rows(conversations)
    check_known(chat.tokenizer, [row.ids for row in rows])
    prompt_lengths = torch.tensor([row.prompt_length for row in rows])
    texts = _flat([row.ids for row in rows], None, prompt_lengths, chat.tokenizer, base, tuple(sorted(chat.ends)))
    tail = np.zeros(int(texts.lengths.max()), dtype=bool)
    answers = torch.from_numpy(np.concatenate([*(row.trained for row in rows), tail]))
    return replace(texts, answers=answers)


def fill(template: str, inputs: Sequence[tuple[str, str]], tokenizer: Any) -> list[str]:
    """Return the prompts of (instruction, input) pairs as text.

    Raises
    ------
    FedspanError
        If the template names anything but {instruction} and {input}, or neither, or is ``chat`` and the
        tokenizer has no chat template.
    """
    chat = ChatFormat.of(tokenizer) if template == "chat" else None
    return list(map(_filler(template, chat), inputs))


def _filler(template: str, chat: ChatFormat | None) -> Callable[[Sequence[str]], str]:
    """Return what makes a prompt of an (instruction, input) pair."""
    if chat is not None:
        return lambda pair: chat.prompt("\n\n".join(part for part in pair if part))
    _check_template(template)
    return lambda pair: template.format(instruction=pair[0], input=pair[1])


def _check_template(template: str) -> None:
    try:
        places = [place[1:] for place in string.Formatter().parse(template) if place[1] is not None]
    except ValueError as error:
        raise FedspanError(f"data.template = {template!r}: {error}") from None
    names = {name for name, _, _ in places}
    if any(form or conversion for _, form, conversion in places):
        # A width of a billion would fill the memory.
        raise FedspanError(f"data.template = {template!r}: expected {{instruction}} and {{input}} without a format")
    if not names or not names <= {"instruction", "input"}:
        raise FedspanError(
            f"data.template = {template!r}: expected {{instruction}}, {{input}} or both, and no other name"
        )


def _encode_instructions(
    rows: Rows, tokenizer: Any, config: DataConfig, base: BaseFacts
) -> tuple[_Texts, tuple[str, ...]]:
    chat = chat_format(tokenizer, config, base)
    ends = end_tokens(tokenizer, base, chat)
    leading = [] if chat is not None else list(added_tokens(tokenizer)[0])
    spelling = Spelling(tokenizer)
    prompts = prompt_ids(rows.inputs, _filler(config.template, chat), spelling)
    answers = spelling.ids(rows.targets)
    check_known(tokenizer, [*prompts, *answers])
    sequences: list[np.ndarray] = []
    prompt_lengths: list[int] = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        special = leading
        if special and prompt[: len(special)].tolist() == special:  # the template writes them out too
            prompt = prompt[len(special) :]
        if not special and len(prompt) and prompt[0] == tokenizer.bos_token_id:  # a chat template writes it out
            special, prompt = [int(prompt[0])], prompt[1:]
        if not special and not len(prompt):
            raise FedspanError(f"the prompt of row {row} has no tokens: expected at least one before the answer")
        sequence, prompt_length = _fitted(special, prompt, np.append(answer, ends[0]), config.max_length)
        sequences.append(sequence)
        prompt_lengths.append(prompt_length)
    notes = _notes_of_instructions(rows, spelling, chat)
    return _flat(sequences, None, torch.tensor(prompt_lengths), tokenizer, base, ends), notes


def _notes_of_instructions(rows: Rows, spelling: Spelling, chat: ChatFormat | None) -> tuple[str, ...]:
    notes = special_note(spelling, [*(text for pair in rows.inputs for text in pair), *rows.targets])
    return (*notes, DATE_NOTE) if chat is not None and chat.uses_date else notes


def _fitted(special: list[int], prompt: np.ndarray, answer: np.ndarray, max_length: int) -> tuple[np.ndarray, int]:
    """Return a row of at most `max_length` tokens, and the length of its prompt."""
    answer = answer[: max(1, max_length - (len(special) or 1))]
    room = max_length - len(special) - len(answer)
    prompt = prompt[max(0, len(prompt) - room) :]
    return np.concatenate([np.asarray(special, dtype=np.int64), prompt, answer]), len(special) + len(prompt)


def _encode_texts(rows: Rows, tokenizer: Any, config: DataConfig, base: BaseFacts) -> tuple[_Texts, tuple[str, ...]]:
    columns = [list(column) for column in zip(*rows.inputs, strict=True)]
    sequences: list[np.ndarray] = []
    types: list[np.ndarray] = []
    spelling = Spelling(tokenizer)
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        chunk = [column[start : start + TEXTS_AT_ONCE] for column in columns]
        for ids, kinds in classified_ids(tokenizer, chunk, config.max_length, spelling):
            sequences.append(ids)
            types += [] if kinds is None else [kinds]
    for row, sequence in enumerate(sequences, 1):
        if not len(sequence):
            raise FedspanError(f"the text of row {row} has no tokens: expected at least one")
    check_known(tokenizer, sequences)
    texts = _flat(sequences, types or None, None, tokenizer, base)
    if base.classifies_at is not None:
        check_end_counts(sequences, texts.pad, base.classifies_at)
    return texts, special_note(spelling, [text for column in columns for text in column])


def _flat(
    sequences: Sequence[np.ndarray],
    types: Sequence[np.ndarray] | None,
    prompt_lengths: Tensor | None,
    tokenizer: Any,
    base: BaseFacts,
    ends: tuple[int, ...] = (),
) -> _Texts:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return _Texts(
        tokens=_joined(sequences, int(lengths.max())),
        types=None if types is None else _joined(types, int(lengths.max())),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        pad=padding_token(tokenizer, base),
        ends=ends,
        num_positions=base.num_positions,
    )


def _joined(sequences: Sequence[np.ndarray], tail: int) -> Tensor:
    return torch.from_numpy(np.concatenate([*sequences, np.zeros(tail, dtype=np.int64)]))


def _encode_images(images: Sequence[Any] | np.ndarray, processor: Any) -> Tensor:
    parts: list[Tensor] = []
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        coloured = [
            np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
            for image in images[start : start + _IMAGES_AT_ONCE]
        ]
        try:
            # Stated, because an image three pixels high could be taken for one with channels first.
            processed = processor(images=coloured, return_tensors="pt", input_data_format="channels_last")
        except ValueError as error:
            raise FedspanError(
                f"the image processor failed on images {start}..{start + len(coloured) - 1} "
                f"({_sizes(coloured)}): {first_line(error)}"
            ) from None
        parts.append(processed["pixel_values"].to(torch.float32))
    if len({part.shape[1:] for part in parts}) != 1:
        raise FedspanError(f"images differ in size ({_sizes(images)}) and the processor does not resize them")
    return torch.cat(parts)


def _sizes(images: Iterable[Any]) -> str:
    shapes = sorted({image.shape[:2] for image in images})
    return ", ".join(f"{height}x{width}" for height, width in shapes[:4]) + (", …" if len(shapes) > 4 else "")
