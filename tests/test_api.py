"""The public functions: paths and mappings as settings, and progress where somebody looks."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

import fedspan
from fedspan.config import from_mapping, to_toml
from fedspan.display import console as consoles

TREE: dict[str, Any] = {
    "federation": {"num_clients": 2, "rounds": 2, "participation": 1.0, "ranks": 4, "partition": "iid"},
    "local": {"max_steps": 1, "batch_size": 2},
    "data": {"max_train": 40, "max_test": 4},
    "evaluation": {"local": False, "max_new_tokens": 1, "diagnostics": False},
    "engine": {"workers": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, as text that is no `Path`."""
    out = tmp_path_factory.mktemp("api") / "run"
    fedspan.run(TREE, str(out))
    return out


def test_a_run_is_silent_where_nobody_looks(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a mapping, a file or a `Config`, to the same bits; every event goes to the listener."""
    path = tmp_path / "my.toml"
    path.write_text(to_toml(from_mapping(TREE)), encoding="utf-8")
    kinds: list[str] = []
    results = [
        fedspan.run(str(path), tmp_path / "a", lambda event: kinds.append(event.kind)),
        fedspan.run(from_mapping(TREE), os.fspath(tmp_path / "b"), quiet=True),
    ]
    for result in results:
        assert result.adapter is not None
        weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (result.out, finished)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (kinds[0], kinds[-1]) == ("start", "end")
    assert kinds.count("round") == 2
    assert fedspan.resume(str(finished)).summary["totals"]["rounds"] == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "")


def test_lines_are_printed_on_request(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[str] = []
    fedspan.resume(finished, lambda event: events.append(event.kind), quiet=False)
    output = capsys.readouterr().out
    assert "last evaluation" in output
    assert "federation (GLoRA)" in output
    assert "\x1b" not in output
    assert events[-1] == "end"


def fake_ipython(monkeypatch: pytest.MonkeyPatch, shell: object) -> None:
    module = ModuleType("IPython")
    module.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", module)


def test_a_notebook_gets_plain_lines(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_ipython(monkeypatch, object())
    fedspan.resume(finished)
    output = capsys.readouterr().out
    assert "last evaluation" in output
    assert "\x1b" not in output
    fedspan.resume(finished, quiet=True)
    assert capsys.readouterr().out == ""
    fake_ipython(monkeypatch, None)  # imported by some library, but not in charge
    fedspan.resume(finished)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_terminal_gets_the_display(finished: Path) -> None:
    """A real one, and nothing when it is asked to be quiet."""
    for quiet, expected in (("None", True), ("True", False)):
        leader, follower = pty.openpty()
        code = f"import fedspan; fedspan.resume({str(finished)!r}, quiet={quiet})"
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment) as child:
            os.close(follower)
            output = b""
            while True:
                try:
                    part = os.read(leader, 65536)
                except OSError:  # the child has closed its end
                    break
                if not part:
                    break
                output += part
        os.close(leader)
        assert child.returncode == 0, output.decode()
        assert (b"\x1b" in output) is expected
        assert (b"federation (GLoRA)" in output) is expected


def test_a_terminal_with_ipython_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ipython(monkeypatch, object())
    assert consoles.in_notebook()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert not consoles.in_notebook()
    console = consoles.console_for(None)
    assert isinstance(console, Console)
    assert console.is_terminal


def test_mistakes_are_fedspan_errors(tmp_path: Path) -> None:
    with pytest.raises(fedspan.FedspanError, match="cannot read the config"):
        fedspan.run(str(tmp_path / "none.toml"), tmp_path / "out")
    with pytest.raises(fedspan.FedspanError, match=r"did you mean 'federation.rounds'"):
        fedspan.run({"federation": {"round": 3}}, tmp_path / "out")
    with pytest.raises(fedspan.FedspanError, match="holds no run"):
        fedspan.resume(str(tmp_path))


def test_only_public_names_are_listed() -> None:
    assert set(dir(fedspan)) == {*fedspan.__all__, "__version__"}
    assert fedspan.load_config(overrides=["local.max_steps=3"]).local.steps == 3
