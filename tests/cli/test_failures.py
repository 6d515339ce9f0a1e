"""A user's mistake is one line and exit code 2; a bug is one line, a file with its traceback and exit code 1."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import SMALL, assert_mistake, environment, fedspan, settings, without_waiting

from fedspan.cli import failures
from fedspan.support.errors import FedspanError


def broken(statement: str, *args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after a statement that breaks something; temporary files go to `folder`."""
    code = f"import sys; from fedspan.cli.main import main; {statement}; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment(TMPDIR=str(folder)),
        timeout=300,
        check=False,
    )


IMPORT = "from fedspan.runs import execution; "
BEFORE = IMPORT + "execution.run = lambda *_, **__: int('a bug')"
MIDWAY = "from fedspan.client.executors import InlineExecutor; InlineExecutor.train = lambda *_: int('a bug')"
USERS = IMPORT + "execution.run = lambda *_, **__: open('/nowhere/at/all')"


def test_a_bug_before_there_is_a_folder_is_reported_in_a_temporary_file(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = broken(BEFORE, "run", "--out", tmp_path / "out", folder=temporary)
    (report,) = temporary.glob("fedspan-*-traceback.txt")
    expected = (
        r"fedspan: internal error, a bug in fedspan: ValueError: invalid literal .*; please report it with .* in "
    )
    assert done.returncode == 1
    assert re.fullmatch(expected + re.escape(str(report)) + "\n", done.stderr), done.stderr
    text = report.read_text(encoding="utf-8")
    assert text.count("Traceback (most recent call last)") == 1
    assert "ValueError: invalid literal" in text
    assert "fedspan " in text.splitlines()[0]
    assert report.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_bug_in_a_run_is_reported_in_its_folder(tmp_path: Path) -> None:
    """Below what an earlier attempt reported."""
    out = tmp_path / "out"
    done = broken(MIDWAY, "run", *settings([*SMALL, "engine.workers=1"]), "--out", out, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(f"please report it with the traceback in {out / 'traceback.txt'}\n")
    assert without_waiting(done.stderr).count("\n") == 1
    again = broken(MIDWAY, "resume", out, folder=tmp_path)
    assert without_waiting(again.stderr) == without_waiting(done.stderr)
    assert (out / "traceback.txt").read_text(encoding="utf-8").count("Traceback (most recent call last)") == 2
    assert not list(tmp_path.glob("fedspan-*"))


def test_the_worlds_refusal_is_no_bug(tmp_path: Path) -> None:
    assert_mistake(broken(USERS, "run", "--out", tmp_path / "out", folder=tmp_path), "No such file or directory")
    done = fedspan("run", "--set", "data.task=files", "--set", "data.train=none.csv", "--out", tmp_path / "out")
    assert_mistake(done, "none.csv")
    assert list(tmp_path.iterdir()) == []


def test_errors_are_the_users_by_their_class() -> None:
    from pydantic import ValidationError

    from fedspan.config import Config

    with pytest.raises(ValidationError) as invalid:
        Config(seed=-1)
    assert all(map(failures.is_users, (FedspanError("x"), OSError(2, "x"), invalid.value)))
    assert not any(map(failures.is_users, (ValueError("x"), KeyError("x"), RuntimeError("x"), AssertionError())))


def test_a_report_that_cannot_be_written_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traceback.txt").mkdir()
    line = failures.report(ValueError("broken\nhere"), tmp_path)
    assert line.endswith("ValueError: broken here; please report it with the traceback above")
    assert "ValueError: broken" in capsys.readouterr().err
