"""The encoding of rows: their texts tokenised, or their images processed, once."""

from __future__ import annotations

import string
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedspan.config import DataConfig
from fedspan.data.base_facts import NOTHING_STATED, BaseFacts
from fedspan.data.chat import ChatFormat
from fedspan.data.chat_tokens import ChatEncoder
from fedspan.data.conversations import Conversation, conversations_of
from fedspan.data.encoded import Encoded, Texts
from fedspan.data.encoder_decoder import DecoderStart, PromptsAndAnswers, encode_pairs
from fedspan.data.rows import Rows
from fedspan.data.special_tokens import TEXTS_AT_ONCE, Spelling
from fedspan.data.text_ids import (
    DATE_NOTE,
    LOOKED_AT,
    added_tokens,
    chat_format,
    check_end_counts,
    check_known,
    check_room,
    classified_ids,
    cut_note,
    end_tokens,
    padding_token,
    prompt_ids,
    special_note,
)
from fedspan.data.token_rows import TokenRows
from fedspan.support.errors import FedspanError, first_line
from fedspan.support.tokenizer_threads import all_cores

_IMAGES_AT_ONCE = 256
_AnyTexts = TypeVar("_AnyTexts", Texts, PromptsAndAnswers)


@all_cores()
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
    texts: Texts | PromptsAndAnswers | None = None
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
    filled, prompts = _filler(config.template, chat), TokenRows()
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        for prompt in prompt_ids(rows.inputs[start : start + TEXTS_AT_ONCE], filled, spelling):
            prompts.append(prompt)
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
) -> tuple[Texts | PromptsAndAnswers, tuple[str, ...]]:
    chat = ChatEncoder(tokenizer, config, base, added_tokens(tokenizer)[0])
    spelling = Spelling(tokenizer)
    notes = special_note(spelling, [turn.content for talk in conversations for turn in talk.turns])
    notes += (DATE_NOTE,) if chat.renderer.prints_date(conversations[0]) else ()
    texts: Texts | PromptsAndAnswers
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


def _of_conversations(chat: ChatEncoder, conversations: list[Conversation], base: BaseFacts) -> Texts:
    sequences, trained, prompt_lengths = TokenRows(), TokenRows("b"), array("q")
    for row in chat.rows(conversations):
        sequences.append(row.ids)
        trained.append(row.trained)
        prompt_lengths.append(row.prompt_length)
    check_known(chat.tokenizer, sequences)
    texts = _flat(sequences, None, torch.tensor(prompt_lengths), chat.tokenizer, base, tuple(sorted(chat.ends)))
    return replace(texts, answers=trained.flat(int(texts.lengths.max())).view(torch.bool))


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
) -> tuple[Texts, tuple[str, ...]]:
    chat = chat_format(tokenizer, config, base)
    ends = end_tokens(tokenizer, base, chat)
    leading = [] if chat is not None else list(added_tokens(tokenizer)[0])
    spelling = Spelling(tokenizer)
    sequences, prompt_lengths = TokenRows(), array("q")
    counts: Counter[str] = Counter()
    for row, (prompt, answer) in enumerate(_prompts_and_answers(rows, _filler(config.template, chat), spelling), 1):
        special = leading
        if special and prompt[: len(special)].tolist() == special:  # the template writes them out too
            prompt = prompt[len(special) :]
        if not special and len(prompt) and prompt[0] == tokenizer.bos_token_id:  # a chat template writes it out
            special, prompt = [int(prompt[0])], prompt[1:]
        if not special and not len(prompt):
            raise FedspanError(f"the prompt of row {row} has no tokens: expected at least one before the answer")
        whole = np.append(answer, ends[0])
        sequence, prompt_length = _fitted(special, prompt, whole, config.max_length)
        counts["prompts"] += prompt_length < len(special) + len(prompt)
        counts["answers"] += len(sequence) - prompt_length < len(whole)
        sequences.append(sequence)
        prompt_lengths.append(prompt_length)
    notes = _notes_of_instructions(rows, spelling, chat) + cut_note(counts, len(rows), config.max_length)
    return _flat(sequences, None, torch.tensor(prompt_lengths), tokenizer, base, ends), notes


def _prompts_and_answers(
    rows: Rows, filled: Callable[[Sequence[str]], str], spelling: Spelling
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield every row's prompt and answer as tokens, tokenised some rows at a time."""
    looked_at: list[np.ndarray] = []
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        stop = start + TEXTS_AT_ONCE
        prompts = prompt_ids(rows.inputs[start:stop], filled, spelling)
        answers = spelling.ids(rows.targets[start:stop])
        looked_at += [*prompts, *answers][: LOOKED_AT - len(looked_at)]
        yield from zip(prompts, answers, strict=True)
    check_known(spelling.tokenizer, looked_at)


def _notes_of_instructions(rows: Rows, spelling: Spelling, chat: ChatFormat | None) -> tuple[str, ...]:
    notes = special_note(spelling, chain((text for pair in rows.inputs for text in pair), rows.targets))
    return (*notes, DATE_NOTE) if chat is not None and chat.uses_date else notes


def _fitted(special: list[int], prompt: np.ndarray, answer: np.ndarray, max_length: int) -> tuple[np.ndarray, int]:
    """Return a row of at most `max_length` tokens, and the length of its prompt."""
    answer = answer[: max(1, max_length - (len(special) or 1))]
    room = max_length - len(special) - len(answer)
    prompt = prompt[max(0, len(prompt) - room) :]
    return np.concatenate([np.asarray(special, dtype=np.int64), prompt, answer]), len(special) + len(prompt)


def _encode_texts(rows: Rows, tokenizer: Any, config: DataConfig, base: BaseFacts) -> tuple[Texts, tuple[str, ...]]:
    check_room(tokenizer, config.max_length, len(rows.inputs[0]) > 1)
    sequences, types, num_cut = TokenRows(), TokenRows("h"), 0
    spelling = Spelling(tokenizer)
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        chunk = [list(column) for column in zip(*rows.inputs[start : start + TEXTS_AT_ONCE], strict=True)]
        for ids, kinds, cut in classified_ids(tokenizer, chunk, config.max_length, spelling):
            sequences.append(ids)
            num_cut += cut
            if kinds is not None:
                types.append(kinds)
            if not len(ids):
                raise FedspanError(f"the text of row {len(sequences)} has no tokens: expected at least one")
    check_known(tokenizer, sequences)
    if base.classifies_at is not None:
        check_end_counts(sequences, padding_token(tokenizer, base), base.classifies_at)
    texts = _flat(sequences, types if len(types) else None, None, tokenizer, base)
    # Column by column, so that the text that the note names is the first of the first column that has one.
    columns = range(len(rows.inputs[0]))
    spelt = special_note(spelling, (pair[column] for column in columns for pair in rows.inputs))
    return texts, (*spelt, *cut_note({"texts": num_cut}, len(rows), config.max_length))


def _flat(
    sequences: TokenRows,
    types: TokenRows | None,
    prompt_lengths: Tensor | None,
    tokenizer: Any,
    base: BaseFacts,
    ends: tuple[int, ...] = (),
) -> Texts:
    lengths = sequences.lengths()
    return Texts(
        tokens=sequences.flat(int(lengths.max())),
        types=None if types is None else types.flat(int(lengths.max())),
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        pad=padding_token(tokenizer, base),
        ends=ends,
        num_positions=base.num_positions,
    )


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
