"""The bad inputs, a line each: arguments of the command (files to write before), and parts of the answer's line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Content = str | bytes | Callable[[Path], Any]
"""A file's text or bytes, or a function that makes a file or a folder at its path."""


@dataclass(frozen=True)
class Case:
    """One bad input."""

    subject: str
    args: str
    """As on a command line; `run` stands for one over small local data and a tiny base (see `COMMANDS`)."""
    parts: tuple[str, ...]
    """Parts of the answer's one line, in any order: the value, and what was expected."""
    files: Mapping[str, Content] = field(default_factory=dict)


SMALL = (
    "--set data.task=files --set data.train=texts.jsonl --set model.name=bert --set federation.partition=iid "
    "--set federation.num_clients=2 --set federation.ranks=2 --set federation.rounds=1 --set local.steps=1 "
    "--set engine.workers=1 --out new"
)
COMMANDS = {"RUN": f"run {SMALL}", "MERGE": "merge a b --method flora --out new"}
"""Words that stand for several, so that a case shows what is bad about it."""


def deep(opening: str, closing: str = "", depth: int = 20_000) -> str:
    return opening * depth + closing * depth


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def rows(*values: Mapping[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def adapter(change: Callable[[dict[str, Any]], Any] | None = None, tensors: Any = None) -> Callable[[Path], None]:
    """An adapter like `a`, whose configuration or tensors were changed in place."""

    def make(path: Path) -> None:
        import shutil

        from safetensors.torch import load_file, save_file

        shutil.copytree(path.parent / "a", path)
        if change is not None:
            config = json.loads((path / "adapter_config.json").read_text())
            change(config)
            (path / "adapter_config.json").write_text(json.dumps(config))
        if tensors is not None:
            held = load_file(path / "adapter_model.safetensors")
            tensors(held)
            save_file(held, path / "adapter_model.safetensors")

    return make


def setting(**values: Any) -> Callable[[Path], None]:
    return adapter(lambda config: config.update(values))


def run_with(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A copy of the finished run, one of whose files has another content."""

    def make(path: Path) -> None:
        import shutil

        shutil.copytree(path.parent / "finished", path)
        if isinstance(content, str):
            (path / name).write_text(content)
        else:
            (path / name).write_bytes(content)

    return make


def base_with(base: str, name: str, change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A copy of a base, one of whose files was changed."""

    def make(path: Path) -> None:
        import shutil

        shutil.copytree(path.parent / base, path)
        change(path / name)

    return make


def edited(**values: Any) -> Callable[[Path], None]:
    """Change entries of a JSON file."""

    def change(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change
