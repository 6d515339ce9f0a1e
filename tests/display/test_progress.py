"""Progress of a run: live on a terminal, a line per round in a pipe."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from fedspan.display.progress import Live, Progression, duration, follow, number, size
from fedspan.runs.events import Event


def test_time_left_is_the_pace_so_far() -> None:
    at = Progression()
    at.begin("federation", total=10, done=4, now=100.0)  # resumed at round 4
    assert at.seconds_left(105.0) is None
    at.done = 6
    assert at.seconds_left(120.0) == pytest.approx(40.0)


def test_figures_are_short() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_096_704, 2.5e9)] == ["0 B", "999 B", "1.0 kB", "1.1 MB", "2.5 GB"]
    assert [duration(s) for s in (0.4, 59.4, 60, 3725)] == ["0 s", "59 s", "1 min 00 s", "1 h 02 min"]
    assert [number(x) for x in (None, 0.12345, -0.5, 123456.0)] == ["–", "0.123", "-0.500", "1.235e+05"]


def show(console: Console) -> str:
    """Two rounds of two clients on a console; everything it was sent."""
    record = {"train_loss": 1.5, "num_clients": 2, "bytes_up": 10, "bytes_down": 20, "rejected": {}}
    ranks = {"num_clients": 2, "ranks": [2, 4], "rounds": 2}
    sizes = {"base_parameters": 1000, "trained_parameters": 100}
    how = {"engine": "sequential", "reason": "it [was] so", "workers": 2}
    with follow(console) as listen:

        def say(kind: str, **data: Any) -> None:
            listen(Event(kind, data))

        say("start", method="GLoRA", task="[t]", model="m", out="o", metric="rouge_l", **ranks, **sizes, **how)
        say("phase", phase="base", total=1, done=0)
        for phase in ("federation", "local"):
            say("phase", phase=phase, total=2, done=0)
            for n in (1, 2):
                for done in (1, 2):
                    say("client", phase=phase, round_num=n, client_id="a", done=done, cohort=2, train_loss=1.0)
                    if isinstance(listen, Live):
                        listen.progress.refresh()
                found = {"loss": 2.0, "perplexity": 7.4, "rouge_l": n / 10} if phase == "federation" else None
                rejected = {"client-1": "holds NaN"} if n == 2 else {}
                say("round", phase=phase, record={**record, "round_num": n, "eval": found, "rejected": rejected})
        say("phase", phase="final", total=1, done=0)
        say("end", summary={})
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_the_live_display(width: int) -> None:
    shown = show(Console(file=io.StringIO(), force_terminal=True, width=width))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert text != shown
    assert re.search(r"federation .*0/2 rounds, 1/2 clients", text)
    assert re.search(r"federation .*1/2 rounds, 2/2 clients +loss 1\.500 +rouge_l 0\.100 .*left", text)
    assert re.search(r"clients alone .*2/2 rounds +loss 1\.500 +0 s", text)
    assert "round 2: the update of client-1 was left out: holds NaN" in text
    assert "GLoRA on [t]: 2 clients, ranks 2, 4, 2 rounds; m of 1,000 parameters, 100 trained" in " ".join(text.split())
    assert "sequential engine (it [was] so), 2 processes" in " ".join(text.split())
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= width


def test_a_pipe_gets_a_line_a_round() -> None:
    shown = show(Console(file=io.StringIO(), width=60)).splitlines()
    rounds = [line for line in shown if line.startswith("  round") and "/" in line]
    assert rounds[1].startswith("  round 2/2  loss 1.500  rouge_l 0.200  2 clients  up 10 B, down 20 B")
    assert len(rounds) == 4
    assert "  round 2: the update of client-1 was left out: holds NaN" in shown
