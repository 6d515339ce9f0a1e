"""Arguments that several commands take, and the parsing that typer lacks.

Every option's name is written out: newer versions of typer would make one of the `metavar` otherwise.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from fedspan.cli import completion
from fedspan.support.errors import FedspanError
from fedspan.support.suggest import nearest

ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.toml", help="Settings; if not given, the built-in defaults.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting; may be repeated.",
        autocompletion=completion.settings,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def new_app(*, add_completion: bool = False) -> typer.Typer:
    """Return a group of commands with plain help pages; its own help is the docstring of its callback."""
    return typer.Typer(
        cls=NearestNames,
        add_completion=add_completion,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


class NearestNames(TyperGroup):
    """A group that shows its help when no command is given, and suggests the nearest one for an unknown command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; none stand for `--help`."""
        return super().parse_args(ctx, args if args or ctx.resilient_parsing else ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse an unknown command with a suggestion."""
        # While a shell completes a line, a mistake in it is no error.
        if args and not ctx.resilient_parsing and not args[0].startswith("-") and args[0] not in self.commands:
            raise FedspanError(f"unknown command {args[0]!r}{nearest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


def _expanded(value: Any) -> Any:
    """Return a path, or several, with the home folder in place of `~`; a user's that there is none of stays."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    # Older versions of typer make paths of strings later.
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


def _holds_path(hint: Any) -> bool:
    """Return whether an annotation is of a path, of several, or of one that may be missing."""
    return hint is Path or any(_holds_path(part) for part in get_args(hint))


class PlainCommand(TyperCommand):
    """A command whose help page is the same with all versions of typer and click."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Typer before 0.26 loses an argument's help to click 8.5's own.
        hints = get_type_hints(inspect.unwrap(self.callback), include_extras=True) if self.callback else {}
        # From the annotations, since not every version's parameters know their type.
        self.paths = {name for name, hint in hints.items() if _holds_path(hint)}
        for parameter in self.params:
            for note in getattr(hints.get(parameter.name), "__metadata__", ()):
                if getattr(parameter, "help", None) is None and hasattr(note, "help"):
                    parameter.help = note.help

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with `~` in paths for the home folder: no shell expands it behind an equals sign."""
        rest = super().parse_args(ctx, args)
        for name in self.paths & ctx.params.keys():
            ctx.params[name] = _expanded(ctx.params[name])
        return rest

    def format_arguments(self, ctx: Any, formatter: Any) -> None:
        """Write nothing: typer lists the arguments with the options, and click 8.5 would list them once more."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        super().format_help(ctx, formatter)
        # Typer escapes brackets for rich even where rich does not print.
        formatter.buffer[:] = [text.replace(r"\[", "[") for text in formatter.buffer]


class WithWeights(PlainCommand):
    """A command whose `--weights` takes several numbers: `--weights 3 1 2` is read as `--weights 3,1,2`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the numbers after `--weights`, then parse."""
        return super().parse_args(ctx, join_weights(args))


def join_weights(args: Sequence[str]) -> list[str]:
    """Join the numbers that follow `--weights` into one argument; anything else ends the list."""
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
    """Return the numbers of one or several `--weights`, in order; None when there are none.

    Raises
    ------
    FedspanError
        For anything that is not a number.
    """
    texts = [text.strip() for item in given for text in item.split(",") if text.strip()]
    for text in texts:
        if not _is_number(text):
            raise FedspanError(f"--weights {text!r}: expected numbers, such as --weights 3 1")
    return [float(text) for text in texts] or None


def parse_rank(text: str | None) -> int | None:
    """Return `--rank` as a number; None when it is not given.

    Raises
    ------
    FedspanError
        For anything but a whole number.
    """
    try:
        return None if text is None else int(text)
    except ValueError:
        raise FedspanError(f"--rank {text!r}: expected a whole number, such as --rank 8") from None


def parse_count(option: str, text: str | None, command: str) -> int | None:
    """Return an option's positive number; None when it is not given.

    Parsed here, since not every version of typer names the value that it refuses.

    Raises
    ------
    FedspanError
        For anything but a whole number of at least 1.
    """
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise FedspanError(
            f"invalid value for '{option}': {text!r} is no valid integer of 1 or more; see `fedspan {command} --help`"
        )
    return number


def method_section(name: str, settings: Sequence[str]) -> Mapping[str, Any]:
    """Return the `[method]` section of a name and `--set` items (`server_rank=8` or `method.server_rank=8`).

    Raises
    ------
    FedspanError
        For an item without a value, or one of another section.
    """
    from fedspan.config import load

    for item in settings:
        key, separator, _ = item.strip().partition("=")
        own = key.removeprefix("method.").strip()
        if not separator or not own or "." in own:
            raise FedspanError(f"--set {item!r}: expected an option of the method, such as --set density=0.2")
        if own == "name":
            raise FedspanError(f"--set {item!r}: expected the method in --method")
    full = [f"method.{item.strip().removeprefix('method.')}" for item in settings]
    return load(overrides=[*full, f"method.name={json.dumps(name)}"]).method


def _is_number(text: str) -> bool:
    try:
        return all(float(part) is not None for part in text.split(","))
    except ValueError:
        return False
