"""Several encoded data sets as one, so that a batch can hold rows of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedspan.data.encoded import Encoded

_S = TypeVar("_S")


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Return the rows of these data sets in one, part by part.

    Parameters
    ----------
    parts
        At least one, all of one kind and encoded for one model.

    Raises
    ------
    ValueError
        For parts that were encoded in different ways, such as with other padding tokens.
    """
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part.all_targets) for part in parts]
    rows = [part.rows + sum(sizes[:k]) for k, part in enumerate(parts)]
    return replace(
        parts[0],
        rows=torch.cat(rows),
        all_targets=[target for part in parts for target in part.all_targets],
        all_fields=[field for part in parts for field in part.all_fields],
        texts=None if parts[0].texts is None else _stores([part.texts for part in parts]),
        pixels=_tensors([part.pixels for part in parts]),
        labels=_tensors([part.labels for part in parts]),
    )


def form_of(data: Encoded) -> str:
    """Return what must be equal for two data sets to be joined: shapes, types, and how they were encoded."""
    return repr([data.kind, *(_form(value) for value in (data.texts, data.pixels, data.labels))])


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape[1:])
    if is_dataclass(value) and any(field.name == "tokens" for field in fields(value)):
        return [(field.name, _form(getattr(value, field.name))) for field in fields(value)]
    return value


def _stores(parts: Sequence[_S]) -> _S:
    """Return stores of token sequences as one store."""
    first: Any = parts[0]
    together: dict[str, Any] = {}
    names = {field.name for field in fields(first)}
    for field in fields(first):
        own: list[Any] = [getattr(part, field.name) for part in parts]
        if field.name == "starts":  # places in the tokens, which now begin behind those of the parts before
            behind = [sum(len(part.tokens) for part in list[Any](parts)[:k]) for k in range(len(parts))]
            own = [starts + offset for starts, offset in zip(own, behind, strict=True)]
        together[field.name] = _value(field.name, own)
        if "starts" in names and _is_of_tokens(own[0], first):
            # A batch reads as many tokens of every row as its longest row has, which may be one of another part.
            longest = max(int(part.lengths.max()) for part in list[Any](parts))
            together[field.name] = F.pad(together[field.name], (0, longest))
    whole: _S = type(first)(**together)
    return whole


def _is_of_tokens(value: Any, part: Any) -> bool:
    """Return whether a field of a store has one entry for every token."""
    return isinstance(value, Tensor) and value.ndim == 1 and len(value) == len(part.tokens)


def _value(name: str, own: Sequence[Any]) -> Any:
    if any(isinstance(value, Tensor) for value in own):
        return _tensors(own)
    if is_dataclass(own[0]) and any(field.name == "tokens" for field in fields(own[0])):
        return _stores(own)
    if any(value != own[0] for value in own):
        raise ValueError(f"data sets with {name} = {own[0]!r} and others in one: expected the same encoding")
    return own[0]


def _tensors(own: Sequence[Tensor | None]) -> Tensor | None:
    given = [value for value in own if value is not None]
    if len(given) not in (0, len(own)):
        raise ValueError("data sets with and without a part in one: expected the same encoding")
    if not given:
        return None
    if len({value.shape[1:] for value in given}) > 1:
        raise ValueError(f"rows of shapes {sorted({tuple(v.shape[1:]) for v in given})} in one: expected one shape")
    return torch.cat(given)
