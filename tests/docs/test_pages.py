"""The pages name files, modules, settings and methods that exist, and describe the layers as they are."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pages
import pytest

from fedspan import config as settings
from fedspan.methods import METHODS

ROOT = pages.DOCS.parent
PACKAGE = ROOT / "src" / "fedspan"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(pages.DOCS.rglob("*.md"))]
OTHERS = ("data.splitter", "data.splitter_args")
"""FederatedScope's."""
by_page = pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
PLACEHOLDERS = re.compile(r"[A-Z]{3,}|[*…<{]")
"""Parts of a path that stand for something else, as in `runs/NAME/metrics.jsonl`."""
TEMPLATES = (
    "server/",
    "sites/",
    "trial/",
    "fed/",
    "ca/",
    "state/",
    "runs/",
    "container/",
    "uplink/",
    "adapter/",
    "model/",
    "checkpoint/",
    "privacy/secret",
)
"""Folders of a run or of a deployment, which are in no checkout."""


def quoted(text: str) -> list[str]:
    """What stands in single backticks, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


@by_page
def test_paths_exist(page: Path) -> None:
    """Relative to the repository, to the package, or to the page."""
    example = pages.examples() if page.stem == "extending" else {}
    new = {edit.path for e in example.values() for edit in e.edits if edit.how == "new"}
    text = page.read_text(encoding="utf-8")
    new |= set(re.findall(r"^`(\S+)`:$", text, flags=re.MULTILINE)) if page.parent.name == "guides" else set()
    for name in quoted(text):
        if not re.fullmatch(r"[\w.\-/]+/[\w.\-/]*|[\w\-/]+\.(py|md)", name) or PLACEHOLDERS.search(name):
            continue
        if name.startswith(TEMPLATES) or name.startswith("/") or name in new:
            continue
        places = [ROOT, PACKAGE, page.parent, PACKAGE / "methods"]
        assert any((place / name).exists() for place in places) or list(ROOT.glob(f"*/{name}")), f"{page.name}: {name}"


@by_page
def test_modules_and_their_names_exist(page: Path) -> None:
    """`fedspan.a.b.c` anywhere on a page, code included."""
    text = page.read_text(encoding="utf-8")
    added = set(re.findall(r"^\+from (fedspan\.[\w.]+) import", text, flags=re.MULTILINE))
    for name in set(re.findall(r"\bfedspan(?:\.[A-Za-z_]\w*)+", text)) - added:
        parts = name.split(".")
        thing = importlib.import_module("fedspan")
        for i, part in enumerate(parts[1:], 2):
            thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(".".join(parts[:i]))


@by_page
def test_settings_exist(page: Path) -> None:
    """`section.key` and `section.key = value`, `--set section.key=value`, and TOML blocks."""
    text = page.read_text(encoding="utf-8")
    sections = set(settings.Config().model_dump()) - {"seed", "device", "threads", "method"}
    aliases = getattr(settings, "ALIASES", {})
    for name in quoted(text):
        match = re.fullmatch(r"(\w+)\.(\w+)(?: ?= ?(.+))?", name)
        if match is None or match[2] in ("py", "md", "toml", "sh", "json", "jsonl", "yml", "key", "crt", "pub", "log"):
            continue
        section, key, value = match.groups()
        if name in OTHERS:
            continue
        if section == "method" and key != "name":
            assert any(key in inspect.signature(factory).parameters for factory in METHODS.values()), name
        elif section in sections and f"{section}.{key}" not in aliases:
            dumped = settings.Config().model_dump()[section]
            assert key in dumped, f"{page.name}: {name}"
            if value is not None:
                settings.from_mapping(tomllib.loads(f"{section}.{key} = {value}"))
    of_a_run = re.sub(r"^\$ fedspan merge .*", "", text, flags=re.MULTILINE)  # whose options are a method's
    words = re.findall(r"--set (?:'([^']+)'|(\S+=[^\s`]+))", of_a_run)
    added = ("clipped_flora", "method.bound=0.5", "prefix_match", "cyclic", "zcdp")  # by the examples of extending.md
    settings.load(None, [a or b for a, b in words if not (a or b).endswith(added)])
    for block in re.findall(r"(?<!^`suite\.toml`:\n\n)```toml\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE):
        settings.from_mapping(tomllib.loads(block))


@by_page
def test_python_blocks_are_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        ast.parse(block)


def test_the_glossary_is_short_and_sorted() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (pages.DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    terms = [term for term, _ in rows][1:]
    assert len(terms) <= 40
    assert terms == sorted(terms, key=str.lower)
    assert all(len(meaning) <= 160 for _, meaning in rows)


def test_the_layout_is_the_packages() -> None:
    """Every folder is in the table, and imports only folders of lower layers."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (pages.DOCS / "layout.md").read_text(encoding="utf-8"), re.MULTILINE)
    layer = {name: int(number) for number, name in rows}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert set(layer) == folders | {"config"}
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if folder not in layer:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [f"{names[0]}.{alias.name}" for alias in node.names] if names == ["fedspan"] else []
            for other in {name.split(".")[1] for name in names if name.startswith("fedspan.")} & set(layer) - {folder}:
                assert layer[other] < layer[folder], f"{path}: {other}"
