"""Token ids take the memory of the ids: one run of int32, and no more than a few rows as Python's numbers."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedspan.config import DataConfig
from fedspan.data import Rows, encode
from fedspan.data.rows import Kind
from fedspan.data.strings import Strings, Tuples
from fedspan.data.token_rows import TokenRows

ROWS = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), min_size=1, max_size=8)


@given(rows=ROWS, as_array=st.booleans(), tail=st.integers(0, 4))
def test_rows_come_back_as_they_were_added(rows: list[list[int]], as_array: bool, tail: int) -> None:
    held = TokenRows()
    for row in rows:
        held.append(np.asarray(row, dtype=np.int64) if as_array else row)
    assert [row.tolist() for row in held] == rows
    assert [row.tolist() for row in held[1:]] == rows[1:]
    assert held.lengths().tolist() == [len(row) for row in rows]
    assert held.counts(7).tolist() == [row.count(7) for row in rows]
    assert held.flat(tail).tolist() == [*(i for row in rows for i in row), *[0] * tail]


def test_an_id_beyond_the_type_is_no_other_id() -> None:
    held = TokenRows("h")
    with pytest.raises(OverflowError):
        held.append([70_000])


def words() -> Any:
    """A token for every word of three letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{f"w{i:02d}": 3 + i for i in range(100)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["classification", "instruction"])
def test_encoding_takes_memory_of_the_texts_own_order(kind: Kind) -> None:
    """Rows of forty bytes. A list of their strings and an array for each row took 21 times the texts; most of what is
    left is a part of the rows as Python objects."""
    numbers = np.random.default_rng(0).integers(0, 100, (4000, 10))
    texts = Strings.of(" ".join(f"w{i:02d}" for i in row) for row in numbers)
    answers: Any = Strings.of(["w01"] * len(texts)) if kind == "instruction" else [0, 1] * (len(texts) // 2)
    inputs = Tuples([texts, Strings.of([""] * len(texts))] if kind == "instruction" else [texts])
    rows = Rows(kind, inputs, answers, Strings.of([""] * len(texts)))
    tokenizer, config = words(), DataConfig(template="{instruction}{input}")
    encode(rows.take(np.arange(600)), tokenizer, config)  # whatever is imported or cached at the first use
    tracemalloc.start()
    try:
        encoded = encode(rows, tokenizer, config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert encoded.texts is not None
    ids = encoded.batch([5])["input_ids"]
    assert ids.dtype == torch.int64
    assert ids[0, :10].tolist() == (numbers[5] + 3).tolist()
    assert peak < 10 * len(texts.data), f"{peak / len(texts.data):.1f} times the texts"
