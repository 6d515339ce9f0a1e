"""Special tokens come from the template and the tokenizer, once, and never from the data."""

from __future__ import annotations

from typing import Any

import bigram
import pytest
import tiny
from test_encoding import TOKENIZERS, make_tokenizer

from fedspan.config import DataConfig
from fedspan.data import Rows, encode
from fedspan.data.base_facts import BaseFacts
from fedspan.data.encoder_decoder import DecoderStart

SPELT = ("hi</s>[assistant]<s>", "<pad>", "yes</s>no")


def one(instruction: str, text: str, answer: str) -> Rows:
    return Rows("instruction", [(instruction, text)], [answer], [""])


def ids(rows: Rows, tokenizer: Any, **data: Any) -> tuple[list[int], int]:
    """The tokens of the first row, and how many of them are its prompt."""
    encoded = encode(rows, tokenizer, DataConfig(**data))
    return encoded.batch([0])["input_ids"][0].tolist(), encoded.prompts([0])["input_ids"].shape[1]


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_text_that_spells_a_special_token_is_ordinary_text(name: str) -> None:
    """The row ends once, at its end, and reads as it was written."""
    tokenizer = TOKENIZERS[name]
    template = "chat" if name == "chat" else "{instruction}\n{input}\n"
    row, prompt = ids(one(*SPELT), tokenizer, template=template)
    assert row.count(tokenizer.eos_token_id) == 1
    assert row[-1] == tokenizer.eos_token_id
    assert row.count(tokenizer.bos_token_id) == (0 if name == "plain" else 1)
    assert 0 not in row
    assert tokenizer.decode(row[prompt:]) == "yes</s>no</s>"
    assert SPELT[0] in tokenizer.decode(row[:prompt])


def test_the_template_s_own_special_tokens_stay_special() -> None:
    """Also beside data that spells them, and as one pass over the text would read them where the data does not."""
    tokenizer = bigram.tokenizer(bigram.CHAT)
    end = tokenizer.convert_tokens_to_ids(bigram.TURN_END)
    row, prompt = ids(one("hi" + bigram.TURN_END, "", "x"), tokenizer, template="chat")
    assert row[:prompt].count(end) == 1
    assert row.count(end) == 2
    text = "{instruction}" + bigram.TURN_END + "\n{input}"
    row, prompt = ids(one("a", bigram.TURN_END, "x"), tokenizer, template=text)
    assert row[:prompt].index(end) == 2  # after the tokenizer's <s> and the letter
    assert row[:prompt].count(end) == 1


def test_a_text_to_classify_is_ordinary_text_too() -> None:
    tokenizer = make_tokenizer(trailing="</s>")
    rows = Rows("classification", [("a</s>b", "c"), ("d", "e<s>")], [0, 1], ["", ""])
    encoded = encode(rows, tokenizer, DataConfig())
    batch = encoded.batch([0, 1])["input_ids"]
    # <s> text </s> text </s>, whatever the texts spell
    assert [(row == 2).sum().item() for row in batch] == [2, 2]
    assert [(row == 1).sum().item() for row in batch] == [1, 1]
    assert encoded.notes == ("2 texts spell a special token, such as </s>: they are read as ordinary text",)


def test_rows_beside_a_spelt_token_are_what_they_were() -> None:
    tokenizer = TOKENIZERS["bos"]
    inputs = [("the words", "of"), SPELT[:2], ("a", "b")]
    rows = Rows("instruction", inputs, ["x", SPELT[2], "y"], [""] * 3)
    together = encode(rows, tokenizer, DataConfig())
    for i in (0, 2):
        alone, _ = ids(rows.take([i]), tokenizer)
        assert together.batch([i])["input_ids"][0].tolist() == alone


def test_a_template_that_writes_the_tokenizer_s_own_token_does_not_double_it() -> None:
    """Users copy `<s>` into templates; the tokenizer puts it there already."""
    tokenizer = TOKENIZERS["bos"]
    row, _ = ids(one("a", "b", "c"), tokenizer, template="<s>{instruction}\n{input}\n")
    assert row == ids(one("a", "b", "c"), tokenizer)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_s_side_of_padding_changes_nothing(side: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    rows = Rows("classification", [("the words",), ("a",)], [0, 1], ["", ""])
    mask = encode(rows, tokenizer, DataConfig()).batch([0, 1])["attention_mask"]
    assert mask[1].tolist() == sorted(mask[1].tolist(), reverse=True)
    assert encode(rows, tokenizer, DataConfig()).batch([1])["attention_mask"].all()


def test_padding_has_an_id_of_the_base() -> None:
    """A tokenizer may have been given a padding token that the base has no row for, or neither padding nor end."""
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    rows = Rows("classification", [("the words",), ("a",)], [0, 1], ["", ""])
    size = len(tokenizer) - 1
    assert encode(rows, tokenizer, DataConfig(), BaseFacts(vocabulary=size)).batch([0, 1])["input_ids"].max() < size
    bare = make_tokenizer(bos_token="<s>")
    assert encode(rows, bare, DataConfig()).batch([0, 1])["input_ids"][1, -1] == 0


def test_the_base_s_end_token_serves_a_tokenizer_without_one() -> None:
    bare = make_tokenizer(bos_token="<s>")
    encoded = encode(one("a", "b", "c"), bare, DataConfig(), BaseFacts(end_tokens=(7, 2)))
    assert encoded.batch([0])["input_ids"][0, -1] == 7


def test_an_encoder_decoder_s_rows_have_equally_many_end_tokens() -> None:
    """It classifies a batch from their last ones, and takes padding for one."""
    rows = Rows("classification", [("the words",), ("a",)], [0, 1], ["", ""])
    base = BaseFacts(classifies_at=2)
    encode(rows, make_tokenizer(trailing="</s>"), DataConfig(), base)
    with pytest.raises(ValueError, match=r"end token \(id 2\), of which row 1 has 0"):
        encode(rows, make_tokenizer(), DataConfig(), base)
    with pytest.raises(ValueError, match="with which the tokenizer also pads"):
        encode(rows, make_tokenizer(trailing="</s>", bos_token="<s>", eos_token="</s>"), DataConfig(), base)


def test_a_tokenizer_that_knows_none_of_the_data_is_refused() -> None:
    rows = Rows("classification", [("ωψ",), ("ω",)], [0, 1], ["", ""])
    with pytest.raises(ValueError, match="reads all of the data as '<unk>'"):
        encode(rows, tiny.tokenizer(), DataConfig())


PAIRS = DecoderStart(0)


def test_a_system_turn_of_an_encoder_decoder_needs_a_chat_template_too() -> None:
    with pytest.raises(ValueError, match=r"data\.system = 'Be kind\.' with another template"):
        encode(one("a", "b", "c"), make_tokenizer(), DataConfig(system="Be kind."), decoder=PAIRS)


def test_an_encoder_decoder_s_texts_are_plain_text_and_noted() -> None:
    """A spelt token in one row changes that row alone."""
    tokenizer = make_tokenizer(trailing="</s>")
    rows = Rows("instruction", [("the words", "of"), SPELT[:2]], ["x", SPELT[2]], [""] * 2)
    encoded = encode(rows, tokenizer, DataConfig(), decoder=PAIRS)
    assert encoded.notes == ("3 texts spell a special token, such as </s>: they are read as ordinary text",)
    labels = encoded.batch([1])["labels"][0].tolist()
    assert labels.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(labels) == "<s>yes</s>no</s>"
    alone = encode(rows.take([0]), tokenizer, DataConfig(), decoder=PAIRS)
    assert encoded.batch([0])["labels"].tolist() == alone.batch([0])["labels"].tolist()


def test_an_encoder_decoder_s_padding_has_an_id_of_the_base() -> None:
    tokenizer = make_tokenizer(trailing="</s>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    base = BaseFacts(vocabulary=len(tokenizer) - 1)
    assert encode(one("a", "b", "c"), tokenizer, DataConfig(), base, decoder=PAIRS).extent()[0] < base.vocabulary


def test_the_base_s_end_token_serves_an_encoder_decoder_s_tokenizer_without_one() -> None:
    encoded = encode(
        one("a", "b", "c"), make_tokenizer(bos_token="<s>"), DataConfig(), BaseFacts(end_tokens=(7, 2)), decoder=PAIRS
    )
    assert encoded.batch([0])["labels"][0, -1] == 7
    assert encoded.texts is not None
    assert encoded.texts.ends == (7, 2)


def test_a_tokenizer_that_knows_none_of_an_encoder_decoder_s_data_is_refused() -> None:
    with pytest.raises(ValueError, match="reads all of the data as '<unk>'"):
        encode(one("ωψ", "ω", "ψ"), tiny.tokenizer(), DataConfig(template="{instruction}{input}"), decoder=PAIRS)
