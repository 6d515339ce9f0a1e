"""Models whose results for a row depend on the padding behind it: rows of equal length are computed together.

An attention mask keeps padding out of most models. Some mix all positions without one (FNet), or look at the last
position for the whole row (XLNet, where the tokenizer pads on the left): a row would count for something else beside a
longer one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_EXTRA = 3
"""Positions of padding with which it is tried."""
_CLOSE, _COARSE = 1e-3, 0.15
"""Relative differences of logits that rounding explains, in float32 and in coarser types or few bits."""


@torch.no_grad()
def padding_changes(base: Any, inputs: Mapping[str, Any], pad: int, masked: bool) -> bool:
    """Return whether padding behind a row changes its logits, at either of two lengths.

    Parameters
    ----------
    inputs
        The arguments of the model's `forward` for one row: `input_ids` and `attention_mask` (1, t), and others.
    pad
        The padding token.
    masked
        The model is given the attention mask, as classifiers are; causal models are trained without.
    """
    inputs = _with_room(inputs)
    for row in (inputs, _shorter(inputs)):
        alone, behind = dict(row), _padded(row, pad, left=False)
        if not masked:
            del alone["attention_mask"], behind["attention_mask"]
        plain, other = base(**alone).logits, base(**behind).logits
        if _differ(base, plain, other if masked else other[:, : plain.shape[1]]):
            return True
    return False


@torch.no_grad()
def prompt_padding_changes(base: Any, inputs: Mapping[str, Any], pad: int) -> bool:
    """Return whether padding before a prompt, with a mask as in generation, changes the logits of what follows it."""
    given, inputs = inspect.signature(base.forward).parameters, _with_room(inputs)
    last = []
    for row in (dict(inputs), _padded(inputs, pad, left=True)):
        if "position_ids" in given:
            row["position_ids"] = (row["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        last.append(base(**row).logits[:, -1])
    return _differ(base, *last)


def _with_room(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row so much shorter that the padding takes it to no position that it has not had."""
    shape = inputs["input_ids"].shape
    if shape[1] < 3 * _EXTRA:
        return inputs
    keep = [*range(shape[1] - _EXTRA - 1), shape[1] - 1]
    return {n: v[:, keep] if isinstance(v, Tensor) and v.shape == shape else v for n, v in inputs.items()}


def _shorter(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row without its second token: the first and the last may be such as the model looks for."""
    shape = inputs["input_ids"].shape
    if shape[1] < 3:
        return dict(inputs)
    keep = [0, *range(2, shape[1])]
    return {n: v[:, keep] if isinstance(v, Tensor) and v.shape == shape else v for n, v in inputs.items()}


def _differ(base: Any, x: Tensor, y: Tensor) -> bool:
    exact = all(p.dtype == torch.float32 for p in base.parameters() if p.is_floating_point())
    apart = float((x.float() - y.float()).norm() / x.float().norm().clamp_min(1e-12))
    return not apart <= (_CLOSE if exact else _COARSE)


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
    return torch.cat(parts)[torch.cat(places).argsort().to(parts[0].device)]
