"""The code on the pages of `docs/`: found, applied to a copy of the package, and executed."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = {"one": 1, "two": 2, "three": 3}
_BLOCK = re.compile(r"^`(\S+)`, (new|changed|above `\w+`):\n\n```(?:python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Edit:
    """What one block of a page does to one file."""

    path: str
    how: str
    """`new`: the whole file; `changed`: a diff; "above `NAME`": code before the line that begins with NAME."""
    text: str

    def apply(self, folder: Path) -> None:
        """Apply it to the file, where the anchor or the context of every hunk occurs exactly once."""
        file = folder / self.path
        if self.how == "new":
            assert not file.exists(), self.path
            file.write_text(self.text, encoding="utf-8")
            return
        content = file.read_text(encoding="utf-8")
        for before, after in self._changes():
            assert before, f"{self.path}: a hunk without context"
            assert content.count(before) == 1, f"{self.path}: {before!r} is there {content.count(before)} times"
            content = content.replace(before, after)
        file.write_text(content, encoding="utf-8")

    def _changes(self) -> Iterator[tuple[str, str]]:
        """(Text that is there, text that replaces it)."""
        if self.how != "changed":
            anchor = "\n" + self.how.split("`")[1] + ":"
            yield anchor, f"\n{self.text}\n\n{anchor.strip()}"
            return
        for hunk in re.split(r"^@@\n", self.text, flags=re.MULTILINE):
            lines = hunk.splitlines(keepends=True)
            yield "".join(x[1:] for x in lines if x[0] in " -"), "".join(x[1:] for x in lines if x[0] in " +")


@dataclass(frozen=True)
class Example:
    """One section of docs/extending.md."""

    title: str
    num_files: int
    edits: tuple[Edit, ...]

    def load(self) -> ModuleType:
        """The example's code as a module, with the names of the file that it goes into."""
        (edit,) = (edit for edit in self.edits if edit.how != "changed")
        module = ModuleType(Path(edit.path).stem)
        if edit.how != "new":
            home = importlib.import_module(".".join(Path(edit.path).with_suffix("").parts[1:]))
            vars(module).update({name: value for name, value in vars(home).items() if not name.startswith("__")})
        exec(compile(edit.text, edit.path, "exec", dont_inherit=True), vars(module))
        return module


def examples() -> dict[str, Example]:
    """The sections of docs/extending.md by their titles, such as "method"."""
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## An? ([^:\n]+): (\w+) files?\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return {
        title: Example(
            title,
            NUMBERS[number],
            tuple(Edit(*block) for block in _BLOCK.findall(body)),
        )
        for title, number, body in sections
    }


def copied_package(folder: Path) -> Path:
    """A copy of the package's sources, to be changed."""
    shutil.copytree(
        DOCS.parent / "src" / "fedspan", folder / "src" / "fedspan", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def run(code: str, **given: Any) -> dict[str, Any]:
    """Execute code with these names given; every name that it knows in the end."""
    names: dict[str, Any] = {"__name__": "page", **given}
    exec(compile(code, "page", "exec", dont_inherit=True), names)
    return names
