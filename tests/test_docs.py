"""The README and the examples are true of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedspan import config
from fedspan.display.method_tables import method_records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readme_table_of_methods_is_what_the_methods_say() -> None:
    """Every row is made of the method's own claims, so neither can change alone."""

    def mark(claim: object) -> str:
        return "yes" if claim else "–"

    section = README.split("## Methods")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, flags=re.MULTILINE)
    written = {name: cells.split(" | ") for name, cells in rows}
    expected = {
        r["name"]: [
            mark(r["exact"]),
            mark(r["gauge_invariant"]),
            mark(r["hetero_rank"]),
            mark(r["secure_sum"]),
            r["traffic_up"],
            r["traffic_down"],
            r["paper"],
        ]
        for r in method_records()
    }
    assert written == expected


def test_every_setting_that_the_readme_sets_exists() -> None:
    overrides = re.findall(r"--set (\S+=\S+)", README)
    assert len(overrides) >= 3
    config.load(None, overrides)
    blocks = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        config.from_mapping(tomllib.loads(block))


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "written"),
    [
        (["examples/python_api.py"], "adapter/adapter_config.json"),
        (["-m", "fedspan", "run", "examples/own_data/config.toml", "--out"], "adapter/adapter_config.json"),
        (["examples/own_loop.py"], ""),
    ],
    ids=["python", "own data", "own loop"],
)
def test_the_examples_run_as_they_are(command: list[str], written: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *command, str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / written).exists()


def test_the_table_of_aliases_is_the_table_in_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", page, flags=re.MULTILINE)
    assert dict(rows) == config.ALIASES
    assert set(re.findall(r"`\[(\w+)\]`", page)) == {key for key in config.valid_keys() if "." not in key} - {
        *("seed", "device", "threads")
    }
