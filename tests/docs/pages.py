"""The code on the pages of `docs/`: found, applied to a copy of the package, and loaded."""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = {"one": 1, "two": 2, "three": 3}
_BLOCK = re.compile(r"^`(\S+)`, (new|changed):\n\n```(?:python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Edit:
    """What one block of a page does to one file."""

    path: str
    new: bool
    text: str

    def apply(self, folder: Path) -> None:
        """Write the new file, or apply every hunk of the diff where its context occurs, which is once."""
        file = folder / self.path
        assert file.exists() != self.new, self.path
        content = self.text if self.new else file.read_text(encoding="utf-8")
        for hunk in () if self.new else re.split(r"^@@\n", self.text, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            assert before, f"{self.path}: a hunk without context"
            assert content.count(before) == 1, f"{self.path}: {before!r} is there {content.count(before)} times"
            content = content.replace(before, after)
        file.write_text(content, encoding="utf-8")


@dataclass(frozen=True)
class Example:
    """One section of docs/extending.md."""

    title: str
    num_files: int
    edits: tuple[Edit, ...]

    def code(self) -> str:
        """The file that the example adds."""
        (edit,) = (edit for edit in self.edits if edit.new)
        return edit.text


def examples() -> dict[str, Example]:
    """The sections of docs/extending.md by their titles, such as "method"."""
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## An? ([^:\n]+): (\w+) files?\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return {
        title: Example(
            title,
            NUMBERS[number],
            tuple(Edit(path, kind == "new", text) for path, kind, text in _BLOCK.findall(body)),
        )
        for title, number, body in sections
    }


def copied_package(folder: Path) -> Path:
    """A copy of the package's sources, to be changed."""
    shutil.copytree(
        DOCS.parent / "src" / "fedspan", folder / "src" / "fedspan", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def run(code: str) -> dict[str, Any]:
    """Execute code; what it has defined, by name."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "page", "exec"), names)
    return names


def load(code: str, name: str, folder: Path) -> ModuleType:
    """Code as a module."""
    file = folder / f"{name}.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
