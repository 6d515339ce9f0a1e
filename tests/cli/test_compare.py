"""`fedspan compare` at the command line: what it checks and says, without a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedspan.cli.main import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare" / "suite.toml"


def test_a_dry_run_checks_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not EXAMPLE.exists():
        pytest.skip("installed without the repository")
    out = tmp_path / "out"
    assert main(["compare", str(EXAMPLE), "--dry-run", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "rules: 4 arms, 2 conditions, 5 seeds",
        "tuning: at least 24 runs of 6 rounds, 0 done",
        "final: 40 runs of 8 rounds, 0 done",
        f"folder: {out}",
    ]
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [0", "is not valid TOML"),
        ('seeds = [0]\nbaseline = "a"\narmz = []\n', "unknown key 'armz'; did you mean 'arms'?"),
        (
            'seeds = [0]\nbaseline = "a"\n[[arms]]\nname = "a"\n[[arms]]\nname = "b"\nsettings.x = 1\n',
            "unknown key 'x'",
        ),
    ],
)
def test_mistakes_end_in_one_line(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
