"""What the command line understands beyond the ordinary: several numbers after one option, nearest names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest


class NearestNames(TyperGroup):
    """Names the nearest command when there is none of the name given."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an unknown command in our own words."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise FedspanError(f"unknown command {args[0]!r}{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


class WithWeights(TyperCommand):
    """Lets `--weights` take several numbers: `--weights 3 1 2` is read as `--weights 3,1,2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse after joining."""
        return super().parse_args(ctx, join_weights(args))


def join_weights(args: Sequence[str]) -> list[str]:
    """Put the numbers that follow `--weights` into one argument; anything else ends the list."""
    joined: list[str] = []
    rest = list(args)
    while rest:
        item = rest.pop(0)
        joined.append(item)
        if item == "--":
            return joined + rest
        if item == "--weights":
            taken = []
            while rest and _is_number(rest[0].strip(",")):
                taken.append(rest.pop(0).strip(","))
            if taken:
                joined.append(",".join(taken))
    return joined


def parse_weights(given: Sequence[str]) -> list[float] | None:
    """The numbers of one or several `--weights`, in order; none when there are none.

    Raises
    ------
    ValueError
        For anything that is no number.
    """
    texts = [text.strip() for item in given for text in item.split(",") if text.strip()]
    for text in texts:
        if not _is_number(text):
            raise FedspanError(f"--weights {text!r}: expected numbers, such as --weights 3 1")
    return [float(text) for text in texts] or None


def parse_rank(text: str | None) -> int | None:
    """The whole number of `--rank`, or none.

    Raises
    ------
    ValueError
        For anything else.
    """
    try:
        return None if text is None else int(text)
    except ValueError:
        raise FedspanError(f"--rank {text!r}: expected a whole number, such as --rank 8") from None


def _is_number(text: str) -> bool:
    try:
        return all(float(part) is not None for part in text.split(","))
    except ValueError:
        return False


def method_options(name: str, settings: Sequence[str]) -> Mapping[str, Any]:
    """A method's name and `--set` items (`server_rank=8` or `method.server_rank=8`) as its options."""
    from fedspan.config import load

    full = [item if item.startswith("method.") else f"method.{item}" for item in settings]
    return load(overrides=[*full, f"method.name={json.dumps(name)}"]).method
