"""Every guide in docs/guides runs from top to bottom, and prints what it says."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pages
import pytest

from fedspan.cli.main import main

GUIDES = sorted((pages.DOCS / "guides").glob("*.md"))
_STEP = re.compile(
    r"^`(?P<file>\S+)`:\n\n```\w+\n(?P<text>.*?)^```|^```console\n(?P<console>.*?)^```", re.DOTALL | re.M
)
_REFUSED = "# exit code 2"


@dataclass(frozen=True)
class Command:
    """One line of a console block after its `$`, and the output below it."""

    line: str
    expected: str

    def run(self, capfd: pytest.CaptureFixture[str]) -> str:
        """Run it in the working folder, fedspan and Python in this process; return the output."""
        capfd.readouterr()
        program, *words = shlex.split(self.line, comments=True)
        code = 0
        if program == "fedspan":
            code = main([found for word in words for found in expanded(word)])
        elif program == "python":
            runpy.run_path(words[0], run_name="__main__")
        else:
            code = subprocess.run([program, *words], check=False, timeout=20).returncode
        output = capfd.readouterr()
        assert code == (2 if self.line.endswith(_REFUSED) else 0), f"{self.line}: {output.err}"
        return (output.err if code else output.out).replace("\r\n", "\n")

    def check(self, output: str) -> None:
        """Hold the output to the page: line by line, where `…` is anything, and alone on a line any number of lines."""
        lines = [r"(?:.*\n)*?" if line == "…" else matching(line) + r" *\n" for line in self.expected.splitlines()]
        assert re.fullmatch("".join(lines), output), f"{self.line} is on the page with\n{self.expected}not\n{output}"


def expanded(word: str) -> list[str]:
    """Return the paths that a word with stars stands for, as a shell gives them."""
    return [str(path) for path in sorted(Path().glob(word))] if "*" in word else [word]


def matching(line: str) -> str:
    """Return the pattern of one line of output."""
    return ".*".join(re.escape(part) for part in re.split(" *… *", line))


def steps(page: Path) -> Iterator[tuple[str, str] | Command]:
    """The files (name, text) and the commands of a page, in its order."""
    for match in _STEP.finditer(page.read_text(encoding="utf-8")):
        if match["file"]:
            yield match["file"], match["text"]
            continue
        for block in re.split(r"^\$ ", match["console"], flags=re.MULTILINE)[1:]:
            line, _, expected = block.partition("\n")
            yield Command(line, expected)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=[page.stem for page in GUIDES])
def test_a_guide_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for step in steps(page):
        if isinstance(step, Command):
            step.check(step.run(capfd))
        else:
            name, text = step
            Path(name).write_text(text, encoding="utf-8")


def test_every_command_of_the_guides_is_run_but_those_of_a_deployment() -> None:
    """Only blocks of the language `console` are run; another one with commands is explained on its page."""
    assert [page.stem for page in GUIDES] == ["adapters", "comparison", "hospitals"]
    for page in GUIDES:
        text = page.read_text(encoding="utf-8")
        shown = [
            line for block in re.findall(r"\n\n```\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()
        ]
        assert all(line.startswith("fedspan flower ") for line in shown), page
        assert len(shown) == (2 if "The tests do not run these two commands" in text else 0)


@pytest.mark.parametrize(
    ("expected", "output", "agrees"),
    [
        ("a\n", "a  \n", True),
        ("a\n", "a\nb\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a … c\n", "a  b  c\n", True),
        ("a … c\n", "a b d\n", False),
        ("", "a\n", False),
    ],
)
def test_output_is_compared(expected: str, output: str, agrees: bool) -> None:
    command = Command("fedspan", expected)
    if agrees:
        command.check(output)
    else:
        with pytest.raises(AssertionError):
            command.check(output)
