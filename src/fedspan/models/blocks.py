"""The list of a transformer's blocks, and the hidden states among the arguments of one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

_BLOCK = re.compile(r"(.+?)\.(\d+)\.")


class NotApplicable(Exception):
    """The reason why the blocks of a base cannot be computed in a way of their own."""


BLOCK_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""Errors of a block that is given arguments of another form than its own code expects."""


def place_of(name: str) -> tuple[str, int] | None:
    """Return the list of blocks that a layer of this name is in and the block's number; None outside any list."""
    match = _BLOCK.match(name)
    return None if match is None else (match[1], int(match[2]))


def blocks_of(model: nn.Module, lists: Iterable[str]) -> list[nn.Module] | None:
    """Return the blocks of the one list of this name; None where there are several names or it is no list."""
    names = set(lists)
    if len(names) != 1:
        return None
    blocks = model.get_submodule(names.pop())
    return list(blocks) if isinstance(blocks, nn.ModuleList) else None


def hidden_of(args: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a block."""
    hidden: Tensor = args[0] if args else options["hidden_states"]
    return hidden


def with_hidden(
    args: tuple[Any, ...], options: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with other hidden states."""
    if args:
        return (hidden, *args[1:]), options
    return args, {**options, "hidden_states": hidden}
