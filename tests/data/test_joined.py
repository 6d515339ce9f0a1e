"""Several encoded data sets as one: every row keeps its tokens, labels, targets and fields, at any batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from fedspan.config import DataConfig
from fedspan.data import Encoded, Rows, encode
from fedspan.data.joined import joined


def texts(*lengths: int) -> Encoded:
    pairs = [("a b c " * n, "x") for n in lengths]
    return encode(Rows("instruction", pairs, ["y z"] * len(pairs), ["f"] * len(pairs)), tiny.tokenizer(), DataConfig())


def classes(*lengths: int) -> Encoded:
    rows = [("a b c " * n,) for n in lengths]
    data = Rows("classification", rows, [n % 3 for n in lengths], ["f"] * len(rows))
    return encode(data, tiny.tokenizer(), DataConfig())


def images(count: int, shade: int) -> Encoded:
    pixels = np.full((count, 12, 12, 3), shade, dtype=np.uint8)
    return encode(Rows("image", pixels, list(range(count)), [""] * count), tiny.image_processor(), DataConfig())


@pytest.mark.parametrize(
    "parts",
    [
        (texts(9, 1), texts(3, 7, 1), texts(1)),
        (classes(1, 8), classes(20, 1), classes(2)),
        (images(3, 10), images(2, 200)),
        (texts(5, 1, 1).subset([2, 0]), texts(8, 1).subset([1])),
    ],
    ids=["instruction", "classification", "image", "views"],
)
def test_every_row_stays_what_it_was(parts: tuple[Encoded, ...]) -> None:
    """In batches that mix short last rows with long ones of other parts."""
    whole = joined(parts)
    assert len(whole) == sum(map(len, parts))
    batch = whole.batch(range(len(whole)))
    start = 0
    for part in parts:
        for row in range(len(part)):
            alone = part.batch([row])
            for name, value in alone.items():
                own = batch[name][start + row]
                own = own[: value.shape[1]] if name in ("input_ids", "attention_mask", "token_type_ids") else own
                own = own[: value.shape[1]] if name == "labels" and value.ndim == 2 else own
                assert torch.equal(own, value[0]), name
            assert whole.references[start + row] == part.references[row]
        start += len(part)
    assert whole.lengths.tolist() == [n for part in parts for n in part.lengths.tolist()]


def test_prompts_too_and_one_part_is_itself() -> None:
    first, second = texts(9, 1), texts(3)
    whole = joined((first, second))
    assert torch.equal(whole.prompts([2])["input_ids"], second.prompts([0])["input_ids"])
    assert joined((first,)) is first


def test_other_encodings_are_refused() -> None:
    part = images(1, 1)
    with pytest.raises(ValueError, match="one shape"):
        joined((images(2, 1), replace(part, pixels=torch.zeros(1, 3, 5, 5))))
    with pytest.raises(ValueError, match="with and without"):
        joined((texts(1), replace(texts(1), labels=torch.zeros(1))))
