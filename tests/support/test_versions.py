"""The version is known however the package was put on the path, and a run ends without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tiny

import fedspan
from fedspan.config import to_toml
from fedspan.support.versions import installed_version

SOURCE = Path(fedspan.__file__).parent
PROJECT = SOURCE.parents[1] / "pyproject.toml"

WITHOUT_METADATA = """
import importlib.metadata as metadata, sys
every = metadata.MetadataPathFinder.find_distributions
def others(context=metadata.DistributionFinder.Context()):
    return [] if context.name in ("fedspan", "peft") else every(context)
metadata.MetadataPathFinder.find_distributions = staticmethod(others)
try:
    metadata.version("fedspan")
except metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError("the installed metadata is still found")
"""


def run_hidden(source: Path, code: str, *arguments: str) -> str:
    """The output of Python code that imports this package from `source` and finds no metadata of it, nor of PEFT."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_METADATA + code, *arguments],
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def copy_of_the_source(folder: Path) -> Path:
    shutil.copytree(SOURCE, folder / "src" / "fedspan", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "src"


def test_installed_packages_have_versions() -> None:
    assert installed_version("torch")[0].isdigit()
    assert installed_version("no-such-package") == "unknown"


def test_the_version_of_a_source_tree_is_in_its_project_file(tmp_path: Path) -> None:
    if not PROJECT.exists():
        pytest.skip("installed without the repository")
    source = copy_of_the_source(tmp_path)
    version = tomllib.loads(PROJECT.read_text())["project"]["version"]
    shown = "import fedspan; print(fedspan.__version__)"
    command = "sys.argv[1:] = ['--version']; from fedspan.cli.main import main; main()"
    for content, expected in (
        (PROJECT.read_text(), version),
        ('[project]\nname = "another"\nversion = "3"', "unknown"),
    ):
        (tmp_path / "pyproject.toml").write_text(content)
        assert run_hidden(source, shown) == expected
        assert run_hidden(source, command) == f"fedspan {expected}"


@pytest.mark.slow
def test_a_run_ends_well_without_any_metadata(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(bases["bert"], texts, "fedit", federation={"rounds": 1})
    (tmp_path / "config.toml").write_text(to_toml(config))
    code = """
import fedspan
summary = fedspan.run(fedspan.load_config(sys.argv[1]), sys.argv[2]).summary
print(fedspan.__file__, summary["versions"]["fedspan"], summary["versions"]["peft"])
"""
    source = copy_of_the_source(tmp_path)
    printed = run_hidden(source, code, str(tmp_path / "config.toml"), str(tmp_path / "run"))
    assert printed == f"{source / 'fedspan' / '__init__.py'} unknown unknown"
    assert (tmp_path / "run" / "summary.json").exists()
