"""The repository holds nothing that only works on the machine it was written on."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".yml", ".yaml", ".sh", ""}
LOCAL = re.compile(r"(?<![\w.{])/(home|root|Users|work|tmp|opt|mnt)/\w")
SKIPPED = {"runs", "build", "dist", "work", "bases"}
KEPT = {ROOT / "src" / "fedspan" / "runs", ROOT / "tests" / "runs"}
"""Source folders that share a name with one that is skipped."""


def texts() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if (name not in SKIPPED or Path(folder, name) in KEPT)
            and not name.endswith(".egg-info")
            and (name[0] != "." or name == ".ci")
        ]
        yield from (Path(folder, name) for name in files if Path(name).suffix in TEXT and name[0] != ".")


def test_no_machine_paths() -> None:
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("installed without the repository")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LOCAL.search(line)
    ]
    assert not found


def test_the_package_needs_nothing_outside_the_repository() -> None:
    """Data beside the repository serves benchmarks and recipes only."""
    for folder in ("src", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path == Path(__file__) or "../shared" not in path.read_text(encoding="utf-8"), path
