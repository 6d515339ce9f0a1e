"""Laws of encoding, with small real tokenizers and image processors built here, offline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
)

from fedspan.config import DataConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.data.encoding import fill

IGNORED = -100
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_tokenizer(leading: str = "<s>", trailing: str = "", chat: str | None = None, **special: str) -> Any:
    """A byte-level BPE tokenizer that writes `leading` before and `trailing` after a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the letters of the words are in the list of words"] * 3, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{leading} $A {trailing}".strip(),
        pair=f"{leading} $A </s> $B:1 {trailing}".strip(),
        special_tokens=[("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **(special or SPECIAL))
    tokenizer.chat_template = chat
    return tokenizer


TOKENIZERS = {
    "bos": make_tokenizer(),
    "plain": make_tokenizer(leading=""),
    "bos and eos": make_tokenizer(trailing="</s>"),
    "no pad": make_tokenizer(bos_token="<s>", eos_token="</s>"),
    "chat": make_tokenizer(chat=CHAT),
}


def instructions(*examples: tuple[str, str, str]) -> Rows:
    return Rows(
        "instruction",
        [(instruction, text) for instruction, text, _ in examples],
        [answer for _, _, answer in examples],
        [f"task {i}" for i in range(len(examples))],
    )


words = st.text("the lrsofwdainé\n", max_size=25)
examples = st.lists(st.tuples(words, words, words), min_size=1, max_size=6)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(examples, st.sampled_from(sorted(TOKENIZERS)), st.integers(2, 60))
def test_masking_prefix_and_truncation(rows: list[tuple[str, str, str]], name: str, max_length: int) -> None:
    """The loss sees the answer and the end token alone; what is before them is the generation prompt, token by token.

    A row never exceeds `max_length`; it loses prompt tokens at the start, never the leading special token; its answer
    is whole unless the answer alone is too long.
    """
    tokenizer = TOKENIZERS[name]
    config = DataConfig(template="chat" if name == "chat" else "{instruction}\n{input}\n", max_length=max_length)
    encoded = encode(instructions(*rows), tokenizer, config)
    indices = list(range(len(rows)))
    batch, prompts = encoded.batch(indices), encoded.prompts(indices)
    texts = fill(config.template, [(a, b) for a, b, _ in rows], tokenizer)
    has_bos = name != "plain"
    for i, (_, _, answer) in enumerate(rows):
        length = int(batch["attention_mask"][i].sum())
        ids, labels = batch["input_ids"][i, :length].tolist(), batch["labels"][i, :length].tolist()
        assert length == encoded.lengths[i] <= max_length
        assert (batch["labels"][i, length:] == IGNORED).all()
        size = labels.count(IGNORED)
        assert labels == [IGNORED] * size + ids[size:]
        assert size >= 1
        kept = prompts["attention_mask"][i].bool()
        assert prompts["input_ids"][i][kept].tolist() == ids[:size]
        assert not kept[: len(kept) - size].any()
        whole = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[size:] == whole[: max_length - 1]
        prompt = tokenizer(texts[i], add_special_tokens=False)["input_ids"]
        if has_bos:
            assert ids[0] == tokenizer.bos_token_id
            prompt = prompt[1:] if name == "chat" else prompt
            assert ids[1:size] == prompt[len(prompt) - (size - 1) :]
        else:
            assert ids[:size] == prompt[len(prompt) - size :]
        assert length == min(max_length, has_bos + len(prompt) + len(whole))


def test_an_untruncated_prompt_reads_as_the_template() -> None:
    encoded = encode(instructions(("sort", "b a", "a b")), TOKENIZERS["bos"], DataConfig())
    tokenizer = TOKENIZERS["bos"]
    assert tokenizer.decode(encoded.prompts([0])["input_ids"][0]) == "<s>sort\nb a\n"
    assert tokenizer.decode(encoded.batch([0])["input_ids"][0]) == "<s>sort\nb a\na b</s>"


def test_the_chat_template_is_one_user_turn() -> None:
    tokenizer = TOKENIZERS["chat"]
    encoded = encode(instructions(("sort", "b a", "x"), ("hi", "", "y")), tokenizer, DataConfig(template="chat"))
    for i, content in enumerate(("sort\n\nb a", "hi")):
        found = tokenizer.decode(encoded.prompts([i])["input_ids"][0])
        assert found == f"<s>[user] {content} [assistant] "


def model_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def tiny(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **options,
    )
    return kind(config).eval()


MIXED = instructions(("the letters", "of", "the words"), ("in", "", "list of words are in"), ("a", "b", "c"))


@pytest.mark.parametrize("name", ["bos", "no pad"])
def test_padding_changes_neither_loss_nor_first_answer_token(name: str) -> None:
    """A row's loss and its prompt's next-token logits are those that it has alone, on a real model."""
    model = tiny(LlamaForCausalLM)
    encoded = encode(MIXED, TOKENIZERS[name], DataConfig())
    batch, prompts = encoded.batch([0, 1, 2]), encoded.prompts([0, 1, 2])
    together = model_logits(model, batch)
    with torch.no_grad():
        places = (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
        following = model(**prompts, position_ids=places).logits[:, -1]
    for i in range(3):
        alone = encoded.batch([i])
        logits = model_logits(model, alone)[0]
        torch.testing.assert_close(together[i, : logits.shape[0]], logits)
        last = int((alone["labels"][0] == IGNORED).sum()) - 1
        torch.testing.assert_close(following[i], logits[last])


@pytest.mark.parametrize("name", ["bos", "no pad"])
def test_padding_does_not_change_a_decoder_classifier(name: str) -> None:
    """The attention mask finds the last token although padding may be the end token itself."""
    tokenizer = TOKENIZERS[name]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model = tiny(LlamaForSequenceClassification, pad_token_id=pad, num_labels=3)
    rows = Rows("classification", [("the words",), ("a",), ("list of the letters",)], [2, 0, 1], ["", "", ""])
    encoded = encode(rows, tokenizer, DataConfig())
    batch = encoded.batch([0, 1, 2])
    assert batch["labels"].tolist() == [2, 0, 1]
    together = model_logits(model, batch)
    for i in range(3):
        torch.testing.assert_close(together[i], model_logits(model, encoded.batch([i]))[0])


def test_classification_truncates_and_keeps_token_types() -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pairs = [("the words", "in the list"), ("a", "b")]
    rows = Rows("classification", pairs, [0, 1], ["x", "y"])
    encoded = encode(rows, tokenizer, DataConfig(max_length=8))
    batch = encoded.batch([0, 1])
    direct = tokenizer([p[0] for p in pairs], [p[1] for p in pairs], truncation=True, max_length=8, padding=True)
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert batch[name].tolist() == direct[name]
    assert batch["input_ids"].shape[1] <= 8
    assert batch["token_type_ids"].max() == 1
    assert encoded.lengths.tolist() == [sum(row) for row in direct["attention_mask"]]
    with pytest.raises(ValueError, match="classification data has no prompts"):
        encoded.prompts([0])


def test_regression_labels_are_floats() -> None:
    rows = Rows("classification", [("a",), ("b",)], [0.5, 3.0], ["", ""])
    labels = encode(rows, TOKENIZERS["bos"], DataConfig()).batch([1, 0])["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [3.0, 0.5]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data())
def test_a_subset_shows_the_rows_of_its_whole(outer: list[int], data: st.DataObject) -> None:
    """Subsets of subsets, in any order and with repeats, share the tensors and show the same rows."""
    encoded = encode(MIXED, TOKENIZERS["bos"], DataConfig())
    inner = data.draw(st.lists(st.integers(0, len(outer) - 1), min_size=1, max_size=5))
    view = encoded.subset(outer).subset(np.array(inner))
    chosen = [outer[i] for i in inner]
    assert len(view) == len(chosen)
    for one, other in (
        (view.batch(range(len(view))), encoded.batch(chosen)),
        (view.prompts([0]), encoded.prompts(chosen[:1])),
    ):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name])
    assert view.references == [MIXED.targets[i] for i in chosen]
    assert view.fields == [MIXED.fields[i] for i in chosen]
    assert view.lengths.tolist() == encoded.lengths[chosen].tolist()
    assert view.texts is encoded.texts


def test_an_empty_subset_and_batches_do_not_alias() -> None:
    encoded = encode(MIXED, TOKENIZERS["bos"], DataConfig())
    assert len(encoded.subset([])) == 0
    before = encoded.batch([0])["input_ids"].clone()
    encoded.batch([0])["input_ids"].zero_()
    assert torch.equal(encoded.batch([0])["input_ids"], before)


# images


def digits(num: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, *shape), dtype=np.uint8)


def image_rows(pictures: Any) -> Rows:
    num = len(pictures)
    return Rows("image", pictures, [i % 2 for i in range(num)], [""] * num)


def encode_images(pictures: Any, **options: Any) -> Encoded:
    return encode(image_rows(pictures), ViTImageProcessor(**options), DataConfig())


def test_images_go_through_the_processor_once() -> None:
    """The pixels are the processor's own; more images than one chunk holds change nothing."""
    pictures = digits(300, 8, 8, 3)
    processor = ViTImageProcessor(size={"height": 4, "width": 4})
    encoded = encode(image_rows(pictures), processor, DataConfig())
    batch = encoded.batch([299, 3])
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [1, 1]
    expected = processor(images=[pictures[299], pictures[3]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert len(encoded) == 300
    assert encoded.targets.tolist() == [i % 2 for i in range(300)]


def test_grey_images_have_three_equal_channels() -> None:
    pixels = encode_images(digits(4, 8, 8), do_resize=False).batch([2])["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 1])
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_an_image_three_pixels_high_is_not_taken_for_channels_first() -> None:
    pixels = encode_images(digits(2, 3, 8, 3), do_resize=False).batch([0])["pixel_values"]
    assert pixels.shape == (1, 3, 3, 8)


@pytest.mark.parametrize("split", [1, 256])
def test_images_of_unequal_size_need_a_processor_that_resizes(split: int) -> None:
    pictures = [*digits(split, 8, 8, 3), *digits(3, 9, 8, 3)]
    assert encode_images(pictures, size={"height": 4, "width": 4}).batch([0, split])["pixel_values"].shape[2:] == (4, 4)
    with pytest.raises(ValueError, match="8x8, 9x8"):
        encode_images(pictures, do_resize=False)


# errors


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{instructions}", "expected {instruction}, {input} or both"),
        ("{instruction} {}", "expected {instruction}"),
        ("no names", "expected {instruction}"),
        ("{instruction", "data.template = '{instruction'"),
        ("chat", "no chat template"),
    ],
)
def test_unusable_templates_are_named(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(MIXED, TOKENIZERS["bos"], DataConfig(template=template))


def test_braces_in_the_data_are_only_text() -> None:
    encoded = encode(instructions(("{x}", "{input}", "{}")), TOKENIZERS["bos"], DataConfig())
    assert TOKENIZERS["bos"].decode(encoded.batch([0])["input_ids"][0]) == "<s>{x}\n{input}\n{}</s>"


def test_what_a_tokenizer_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="no end token"):
        encode(MIXED, make_tokenizer(bos_token="<s>"), DataConfig())
    rows = instructions(("", "a", "b"), ("", "", "b"))
    with pytest.raises(ValueError, match="prompt of row 2 has no tokens"):
        encode(rows, TOKENIZERS["plain"], DataConfig(template="{instruction}{input}"))
    with pytest.raises(ValueError, match="text of row 2 has no tokens"):
        encode(Rows("classification", [("a",), ("",)], [0, 1], ["", ""]), TOKENIZERS["plain"], DataConfig())
    with pytest.raises(ValueError, match="max_length = 1"):
        encode(MIXED, TOKENIZERS["bos"], DataConfig(max_length=1))
    with pytest.raises(ValueError, match="no rows to encode"):
        encode(instructions(), TOKENIZERS["bos"], DataConfig())


def test_rows_of_unequal_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths \(1, 2, 1\)"):
        Rows("classification", [("a",)], [0, 1], [""])
