"""Models whose results for a row depend on the padding behind it: rows of equal length are computed together.

An attention mask keeps padding out of most models. Some mix all positions without one (FNet), or look at the last
position for the whole row (XLNet, where the tokenizer pads on the left): a row would count for something else beside a
longer one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_EXTRA = 3
"""Positions of padding with which it is tried."""
_CLOSE = {torch.float32: 1e-3}
_COARSE = 3e-2
"""Relative difference of logits that rounding explains."""


@torch.no_grad()
def padding_changes(base: Any, inputs: Mapping[str, Any], pad: int, masked: bool) -> bool:
    """Return whether padding behind a row, or before a prompt that is continued, changes its logits.

    Parameters
    ----------
    inputs
        The arguments of the model's `forward` for one row: `input_ids` and `attention_mask` (1, t), and others.
    pad
        The padding token.
    masked
        The model is given the attention mask with padding on the right, as classifiers are; causal models are not, and
        are continued from a padding on the left, with a mask.
    """
    if masked:
        return _differ(base(**inputs).logits, base(**_padded(inputs, pad, left=False)).logits)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    behind = _padded(inputs, pad, left=False)
    del behind["attention_mask"]
    plain, length = base(**bare).logits, inputs["input_ids"].shape[1]
    right = base(**behind).logits[:, :length]
    left = base(**_padded(inputs, pad, left=True)).logits[:, -1:]
    return _differ(plain, right) or _differ(plain[:, -1:], left)


def _differ(x: Tensor, y: Tensor) -> bool:
    apart = float((x.float() - y.float()).norm() / x.float().norm().clamp_min(1e-12))
    return not apart <= _CLOSE.get(x.dtype, _COARSE)


def _padded(inputs: Mapping[str, Any], pad: int, left: bool) -> dict[str, Any]:
    fills = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
    side = (_EXTRA, 0) if left else (0, _EXTRA)
    return {
        name: torch.nn.functional.pad(value, side, value=fills[name]) if name in fills else value
        for name, value in inputs.items()
    }


def equal_lengths(batch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the rows of each length, by their numbers, and a batch of them without padding on either side."""
    mask = batch["attention_mask"]
    lengths = mask.sum(dim=1)
    for length in sorted(set(lengths.tolist())):
        rows = torch.nonzero(lengths == length).flatten()
        first = int(mask[rows[0]].argmax())  # padding is on the same side of all rows
        places = slice(first, first + length)
        yield rows, {n: v[rows][:, places] if v.shape[1:] == mask.shape[1:] else v[rows] for n, v in batch.items()}


def row_logits(model: Any, inputs: Mapping[str, Any], by_length: bool) -> Tensor:
    """Return a classifier's logits, (rows, labels), where need be from rows of equal length alone."""
    if not by_length or "attention_mask" not in inputs:
        logits: Tensor = model(**inputs).logits
        return logits
    others = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    parts, places = [], []
    for rows, part in equal_lengths(tensors):
        parts.append(model(**part, **others).logits)
        places.append(rows)
    return torch.cat(parts)[torch.cat(places).argsort()]
