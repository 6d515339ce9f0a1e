"""Rows that are longer than `data.max_length`: how many lost what, and a length that leaves nothing."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from tokenizers import processors

from fedspan.config import DataConfig
from fedspan.data import Rows, encode
from fedspan.data.base_facts import BaseFacts
from fedspan.support.errors import FedspanError


def bert_like(slow: bool = False) -> Any:
    """A tokenizer that puts a token before and one behind a text; `slow`: it does not tell what it cut off."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return WithoutEncodings(made) if slow else made


class WithoutEncodings:
    """A tokenizer whose answers have no `encodings`, as those written in Python."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        answer = self._own(*args, **options)
        answer._encodings = None
        return answer


def texts(*lengths: int) -> Rows:
    return Rows("classification", [("a" * n,) for n in lengths], [0] * len(lengths), [""] * len(lengths))


@pytest.mark.parametrize("slow", [False, True])
def test_rows_that_were_cut_are_counted_and_no_others(slow: bool) -> None:
    """Of five places two are the tokenizer's: three letters fit exactly."""
    rows = texts(1, 2, 3, 4, 9)
    encoded = encode(rows, bert_like(slow), DataConfig(max_length=5))
    assert encoded.notes == ("of 5 rows, 2 texts lost their end (data.max_length = 5)",)
    assert encoded.lengths.tolist() == [3, 4, 5, 5, 5]
    assert encode(texts(1, 2, 3), bert_like(slow), DataConfig(max_length=5)).notes == ()


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_that_leaves_no_text_is_refused(length: int) -> None:
    message = f"data.max_length = {length}: the tokenizer adds 2 special tokens .* expected at least 3"
    with pytest.raises(FedspanError, match=message):
        encode(texts(4), bert_like(), DataConfig(max_length=length))
    pairs = Rows("classification", [("ab", "cd")], [0], [""])
    with pytest.raises(FedspanError, match=r"adds 3 special tokens .* expected at least 4"):
        encode(pairs, bert_like(), DataConfig(max_length=3))


def test_prompts_and_answers_that_were_cut_are_counted() -> None:
    """Eight places: one for the start, and the answer comes first, with its end."""
    inputs = [("a" * n, "") for n in (2, 5, 6, 1)]
    rows = Rows("instruction", inputs, ["b", "b", "b", "c" * 9], [""] * 4)
    encoded = encode(rows, tiny.tokenizer(), DataConfig(max_length=8, template="{instruction}"))
    line = "of 4 rows, 2 prompts lost their start; 1 answers lost their end, and so the token that ends them"
    assert encoded.notes == (f"{line} (data.max_length = 8)",)


def test_an_encoder_that_writes_nothing_is_named_before_its_missing_end_token() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    rows = Rows("instruction", [("a", "")], ["b"], [""])
    config = DataConfig(template="{instruction}")
    with pytest.raises(FedspanError, match=r"an encoder \(bert\), which reads later tokens too and writes no answers"):
        encode(rows, tokenizer, config, BaseFacts(encoder="bert"))
    with pytest.raises(FedspanError, match="has no end token"):
        encode(rows, tokenizer, config)
