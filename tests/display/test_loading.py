"""A sign of life: what a run waits for is shown while it waits, and nothing where it does not."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedspan.config import DataConfig
from fedspan.data import load
from fedspan.display import loading
from fedspan.display.loading import loading_lines
from fedspan.display.progress import follow
from fedspan.runs.events import Event
from fedspan.support.activity import Activity, listening, report

START = {
    **{"method": "GLoRA", "task": "files", "model": "m", "out": "o", "metric": "accuracy", "num_clients": 2},
    **{"ranks": [2], "rounds": 1, "base_parameters": 10, "trained_parameters": 1, "engine": "cohort", "reason": ""},
    **{"workers": 1},
}
DATA = {
    "kind": "classification",
    "rows": {"train": 1200, "test": 30},
    "num_classes": 2,
    "label_names": ["no", "[yes]\n"],
}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "AFTER", 0.05)
    monkeypatch.setattr(loading, "AGAIN", 0.05)
    monkeypatch.setattr(loading, "_TICK", 0.01)


def wait_for(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.usefixtures("soon")
def test_a_pipe_gets_a_line_about_what_takes_long() -> None:
    shown = io.StringIO()
    with loading_lines(shown) as lines:
        assert lines is not None
        report("reading a.csv (1.0 MB)")
        wait_for(lambda: shown.getvalue().startswith("reading a.csv (1.0 MB) …\n"))
        report("reading a.csv (1.0 MB)", 2048, 9000)
        wait_for(lambda: "reading a.csv (1.0 MB): 2,048 of 9,000 …\n" in shown.getvalue())
        report("encoding 9,000 rows")
        wait_for(lambda: "encoding 9,000 rows …\n" in shown.getvalue())
        wait_for(lambda: "encoding 9,000 rows: 0 s so far …\n" in shown.getvalue())
        lines.close()
        before = shown.getvalue()
        report("never")
        time.sleep(0.1)
    assert shown.getvalue() == before


def test_what_does_not_take_long_gets_no_line() -> None:
    shown = io.StringIO()
    with loading_lines(shown):
        for i in range(50):
            report(f"reading {i}")
        time.sleep(0.3)
    report("outside")
    assert shown.getvalue() == ""
    with loading_lines(None) as lines:
        report("nothing to write to")
    assert lines is None


@pytest.mark.usefixtures("soon")
def test_a_run_in_a_pipe_keeps_its_output_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines about waiting are on standard error and end with the start, which says rows and classes."""
    shown = io.StringIO()
    with follow(Console(file=shown, width=160)) as listen:
        report("loading the base")
        time.sleep(0.2)
        listen(Event("start", {**START, "data": DATA}))
        report("not any more")
        time.sleep(0.1)
    assert set(capsys.readouterr().err.splitlines()) >= {"loading the base …"}
    assert "not any more" not in shown.getvalue()
    assert shown.getvalue().splitlines()[-1] == r"rows: 1,200 train, 30 test; 2 classes: 'no', '[yes]\n'"


def test_a_terminal_shows_what_is_being_done() -> None:
    shown = io.StringIO()
    with follow(Console(file=shown, force_terminal=True, width=100)) as listen:
        report("reading [a].csv (1.0 MB)", 2048)
        listen.progress.refresh()
        listen(Event("start", {**START, "data": {**DATA, "num_classes": None, "label_names": None}}))
        report("later")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert re.search(r"reading \[a\].csv \(1.0 MB\) .*2,048", text)
    assert "rows: 1,200 train, 30 test\n" in text.replace("\r", "")
    assert "later" not in text


def test_readers_say_what_they_read(tmp_path: Path) -> None:
    rows = 9000
    (tmp_path / "a.csv").write_text("text,label\n" + "x,0\ny,1\n" * (rows // 2))
    said: list[Activity] = []
    with listening(said.append):
        load(DataConfig(task="files", train=(str(tmp_path / "a.csv"),)), 0)
    assert said[0] == Activity("reading a.csv (36.0 kB)")
    assert [activity.done for activity in said] == [0, 2048, 4096, 6144, 8192]
    load(DataConfig(task="files", train=(str(tmp_path / "a.csv"),)), 0)
    assert len(said) == 5, "the listener is gone"
