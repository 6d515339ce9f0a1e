"""Shells complete commands, methods and settings, whatever else is on the line."""

from __future__ import annotations

import pytest
from command import assert_mistake, fedspan, inside

from fedspan.config import valid_keys
from fedspan.methods import METHODS


def completed(line: str) -> list[str]:
    """The proposals for the last word of a line in bash."""
    words = line.split(" ")
    variables = {"_FEDSPAN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = fedspan(**variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "proposals"),
    [
        ("fedspan me", ["merge", "methods"]),
        ("fedspan flower ", ["init", "up", "status", "health", "lock", "keys"]),
        ("fedspan run --en", ["--engine"]),
        ("fedspan methods glo", ["glora", "glora_plus", "glora_sums"]),
        ("fedspan merge a b --method fed_", ["fed_sb", "fed_plora"]),
        ("fedspan merge a b --method glora --set server_ran", ["server_rank="]),
        ("fedspan run --set federation.ra", ["federation.ranks=", "federation.rank_values="]),
    ],
)
def test_a_word_is_completed(line: str, proposals: list[str]) -> None:
    assert sorted(completed(line)) == sorted(proposals)


def test_a_mistake_on_the_line_is_no_error() -> None:
    assert "run" in completed("fedspan rnu ")


@pytest.mark.parametrize(
    "variables",
    [{}, {"COMP_WORDS": "fedspan"}, {"COMP_WORDS": "fedspan", "COMP_CWORD": "x"}],
)
def test_a_call_that_is_no_shells_is_answered_in_one_line(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"_FEDSPAN_COMPLETE": "complete_bash", **variables}.items():
        monkeypatch.setenv(name, value)
    assert_mistake(inside(capsys), "shell completion failed", "expected a call by the script of --install-completion")


def test_every_setting_is_proposed() -> None:
    from fedspan.cli.completion import settings

    sections = {key.partition(".")[0] for key in valid_keys() if "." in key} | {"method"}
    assert set(settings("")) == {f"{key}=" for key in valid_keys() if key not in sections} | {"method.name="}
    assert settings("method.name=glo") == [f"method.name={name}" for name in METHODS if name.startswith("glo")]
    assert settings("local.steps=") == []


@pytest.mark.parametrize(("shell", "part"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --")])
def test_a_shell_gets_its_script(shell: str, part: str) -> None:
    done = fedspan(_FEDSPAN_COMPLETE=f"source_{shell}")
    assert (done.returncode, done.stderr) == (0, "")
    assert part in done.stdout
    assert "_FEDSPAN_COMPLETE" in done.stdout


def test_completion_can_be_shown_and_installed(tmp_path: object) -> None:
    variables = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = fedspan("--show-completion", "bash", **variables)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "complete_bash" in shown.stdout
    done = fedspan("--install-completion", "bash", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bash completion installed" in done.stdout
