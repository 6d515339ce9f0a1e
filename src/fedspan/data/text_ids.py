"""Texts as token ids: prompts, answers and texts to classify, and what is checked of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedspan.config import DataConfig
from fedspan.data.base_facts import BaseFacts
from fedspan.data.chat import DATE, ChatFormat
from fedspan.data.special_tokens import Hidden, Spelling, plain_ids
from fedspan.data.token_rows import TokenRows
from fedspan.support.errors import FedspanError

TokensAndTypes = tuple[np.ndarray, np.ndarray | None, bool]
"""Token ids of a row, their types where the tokenizer has such, and whether the row was cut."""
LOOKED_AT = 2048
"""Rows in which a known token is looked for."""
DATE_NOTE = f"the chat template prints today's date: {DATE:%Y-%m-%d} stands for it in every run"


def chat_format(tokenizer: Any, config: DataConfig, base: BaseFacts) -> ChatFormat | None:
    """Return the chat template that instructions are written by, or None where `data.template` is a text.

    Raises
    ------
    FedspanError
        For a system turn without a chat template; and as `ChatFormat.of`.
    """
    if config.template == "chat":
        return ChatFormat.of(tokenizer, config.system, base.end_tokens)
    if config.system:
        raise FedspanError(
            f"data.system = {config.system!r} with another template than 'chat': expected it to be empty"
        )
    return None


def prompt_ids(
    inputs: Sequence[Any] | np.ndarray, filled: Callable[[Sequence[str]], str], spelling: Spelling
) -> list[np.ndarray]:
    """Return the token ids of every prompt, without those that the tokenizer puts before a text."""
    texts: list[str] = []
    marked: dict[int, Hidden] = {}
    for row, pair in enumerate(inputs):
        safe, hidden = spelling.hide(pair)
        texts.append(filled(safe))
        if hidden is not None:
            marked[row] = hidden
    tokens = plain_ids(spelling.tokenizer, texts)
    for row, hidden in marked.items():
        tokens[row] = spelling.template_ids(texts[row], hidden)
    return tokens


def end_tokens(tokenizer: Any, base: BaseFacts, chat: ChatFormat | None) -> tuple[int, ...]:
    """Return the tokens that end an answer; the first is the one to be learnt.

    Raises
    ------
    FedspanError
        Where neither the tokenizer nor the base has one.
    """
    own, stated = tokenizer.eos_token_id, base.end_tokens
    end = None if chat is None or chat.end is None else int(tokenizer.convert_tokens_to_ids(chat.end))
    if end is None:
        end = own if own is not None and (own in stated or not stated) else next(iter(stated), None)
    if end is None and base.encoder is not None:
        raise FedspanError(
            f"model.name: the base is an encoder ({base.encoder}), which reads later tokens too and writes no answers: "
            f"expected a causal language model or an encoder-decoder, or data with labels"
        )
    if end is None:
        raise FedspanError("the tokenizer has no end token (eos_token): expected one, to learn where answers end")
    return tuple(dict.fromkeys([end, *stated, *([] if own is None else [own])]))


def padding_token(tokenizer: Any, base: BaseFacts) -> int:
    """Return the token that batches are padded with: the tokenizer's, or its end token, or 0."""
    size = base.vocabulary or sys.maxsize  # a padding token may be added to a tokenizer and not to its base
    possible = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in possible if i is not None and i < size), 0)


def added_tokens(tokenizer: Any, *, target: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that the tokenizer puts before and after a text; `target` as in `plain_ids`."""
    plain, full = (plain_ids(tokenizer, ["a"], special=special, target=target)[0].tolist() for special in (False, True))
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    raise FedspanError("the tokenizer changes a text's own tokens when it adds special ones: expected it to keep them")


def classified_ids(
    tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int, spelling: Spelling
) -> list[TokensAndTypes]:
    """Return the token ids of texts or pairs of them, and the token types where the tokenizer has them."""
    odd = [any(map(spelling.first, pair)) for pair in zip(*columns, strict=True)]
    found: dict[int, TokensAndTypes] = {}
    for split in (False, True):
        places = [i for i, spelt in enumerate(odd) if spelt is split]
        if not places:
            continue
        chunk = [[column[i] for i in places] for column in columns]
        options = {"split_special_tokens": True} if split else {}
        encoded = tokenizer(*chunk, truncation=True, max_length=max_length, **options)
        ids, kinds = encoded["input_ids"], encoded.get("token_type_ids") or [None] * len(places)
        full = [k for k, row in enumerate(ids) if len(row) >= max_length]
        cut = _cut(tokenizer, encoded, [[column[k] for k in full] for column in chunk], full, options)
        for k, (i, row, kind) in enumerate(zip(places, ids, kinds, strict=True)):
            types = None if kind is None else np.asarray(kind, dtype=np.int64)
            found[i] = np.asarray(row, dtype=np.int64), types, k in cut
    return [found[i] for i in range(len(odd))]


def _cut(
    tokenizer: Any, encoded: Any, columns: Sequence[Sequence[str]], full: Sequence[int], options: Mapping[str, bool]
) -> set[int]:
    """Return which of the rows that are as long as they may be have lost tokens.

    Parameters
    ----------
    encoded
        All rows, with truncation.
    columns
        The texts of the rows in `full`.
    """
    if not full:
        return set()
    if encoded.encodings is not None:  # a fast tokenizer keeps what it cuts off
        return {k for k in full if encoded.encodings[k].overflowing}
    whole = tokenizer(*columns, verbose=False, **options)["input_ids"]
    return {k for k, row in zip(full, whole, strict=True) if len(row) > len(encoded["input_ids"][k])}


def check_room(tokenizer: Any, max_length: int, pairs: bool) -> None:
    """Refuse a length that the special tokens of a text or of two fill by themselves."""
    added = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= added:
        raise FedspanError(
            f"data.max_length = {max_length}: the tokenizer adds {added} special tokens to a row, which leaves none of "
            f"its text: expected at least {added + 1}"
        )


def cut_note(counts: Mapping[str, int], num_rows: int, max_length: int) -> tuple[str, ...]:
    """Return one line on the `texts`, `prompts` and `answers` that were cut, or nothing."""
    parts = {
        "texts": "texts lost their end",
        "prompts": "prompts lost their start",
        "answers": "answers lost their end, and so the token that ends them",
    }
    said = [f"{counts[kind]} {text}" for kind, text in parts.items() if counts.get(kind)]
    return (f"of {num_rows} rows, {'; '.join(said)} (data.max_length = {max_length})",) if said else ()


def check_known(tokenizer: Any, sequences: Sequence[np.ndarray]) -> None:
    """Refuse a tokenizer that knows nothing of the data, such as one that was made up for lack of its files."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return
    special = set(tokenizer.all_special_ids) - {unknown}
    seen = set(np.unique(np.concatenate(sequences[:LOOKED_AT])).tolist()) - special
    if seen == {unknown}:
        raise FedspanError(
            f"the tokenizer reads all of the data as {tokenizer.unk_token!r}, its unknown token: "
            f"expected the base's own tokenizer files, which know the words of the data"
        )


def check_end_counts(sequences: TokenRows, pad: int, end: int) -> None:
    """Check what an encoder-decoder needs, which classifies a batch from its rows' last end tokens."""
    counts = sequences.counts(end).tolist()
    if pad == end:
        raise FedspanError(
            f"the base classifies from its end token (id {end}), with which the tokenizer also pads: "
            f"expected a tokenizer with a padding token of its own"
        )
    for row, count in enumerate(counts, 1):
        if count != counts[0] or not count:
            raise FedspanError(
                f"the base classifies from its end token (id {end}), of which row {row} has {count} and row 1 has "
                f"{counts[0]}: expected a tokenizer that ends every text with it, and equally many in every row"
            )


def special_note(spelling: Spelling, texts: Iterable[str]) -> tuple[str, ...]:
    """Return one line about texts that spell a special token, or nothing."""
    found = [name for name in map(spelling.first, texts) if name is not None]
    if not found:
        return ()
    return (f"{len(found)} texts spell a special token, such as {found[0]}: they are read as ordinary text",)
