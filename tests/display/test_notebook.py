"""Progress in a notebook: one text that is replaced, not a line for every round."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from fedspan.display.notebook import Notebook, in_kernel
from fedspan.runs.events import Event

START = {
    "method": "GLoRA",
    "task": "builtin:tasks",
    "metric": "accuracy",
    "model": "m",
    "num_clients": 2,
    "ranks": [2, 4],
    "rounds": 40,
    "out": "runs/x",
    "base_parameters": 10,
    "trained_parameters": 5,
    "engine": "cohort",
    "reason": "",
    "workers": 1,
    "data": None,
}


class Handle:
    """Keeps what is shown, as the front end of a notebook does."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        assert set(data) == {"text/plain"}
        self.shown.append(data["text/plain"])


def round_event(n: int, **more: Any) -> Event:
    record = {"round_num": n, "train_loss": 1.0 / n, "eval": {"accuracy": n / 40, "loss": 0.5}, "rejected": {}, **more}
    return Event("round", {"phase": "federation", "record": record})


def test_forty_rounds_are_a_few_lines() -> None:
    handle = Handle()
    show = Notebook(handle)
    show(Event("start", START))
    show(Event("phase", {"phase": "base", "total": 1, "done": 0}))
    show(Event("phase", {"phase": "federation", "total": 40, "done": 0}))
    for n in range(1, 41):
        for done in (1, 2):
            show(Event("client", {"round_num": n, "done": done, "cohort": 2}))
        show(round_event(n, rejected={"clinic": "too large"} if n == 3 else {}))
        if n == 20:
            middle = handle.shown[-1].splitlines()
    show(Event("note", {"line": "a remark"}))
    show(Event("end", {"summary": {}}))
    assert middle[0].startswith("GLoRA on builtin:tasks: 2 clients, ranks 2, 4, 40 rounds")
    assert middle[2].startswith("untouched base  ")
    assert middle[3].startswith("federation  ██████████░░░░░░░░░░  20/40 rounds  loss 0.050  accuracy 0.500")
    last = handle.shown[-1].splitlines()
    assert last[3].startswith("federation  40/40 rounds  loss 0.025  accuracy 1.000  ")
    assert last[4:] == ["round 3: the update of clinic was left out: too large", "a remark"]
    assert len(last) == 6
    assert len(handle.shown) < 40 + 20  # clients of a round are shown now and then


def test_many_remarks_are_the_last_ones() -> None:
    handle = Handle()
    show = Notebook(handle)
    for n in range(30):
        show(Event("site", {"line": f"line {n}"}))
    assert handle.shown[-1].splitlines()[1:] == ["… 18 earlier lines", *(f"line {n}" for n in range(18, 30))]


def test_a_kernel_is_known_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = ModuleType("IPython")
    vars(shell)["get_ipython"] = object
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert not in_kernel()
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert in_kernel()


CELL = """
from fedspan.display.console import console_for
from fedspan.display.session import watch
from fedspan.runs.events import Event
START = {start!r}

def work(show):
    show(Event("start", START))
    show(Event("phase", {{"phase": "federation", "total": 40, "done": 0}}))
    for n in range(1, 41):
        record = {{"round_num": n, "train_loss": 1.0, "eval": {{"accuracy": 0.5}}, "rejected": {{}}, "num_clients": 2}}
        show(Event("round", {{"phase": "federation", "record": record}}))
    raise KeyboardInterrupt

try:
    watch(work, console_for(None))
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_real_kernel_keeps_one_output() -> None:
    """The notebook that is saved holds the last text alone."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    # To import it here would make this process look like a kernel to other tests.
    if importlib.util.find_spec("ipykernel") is None:
        pytest.skip("ipykernel is not installed")
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(start=START))])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    outputs = book.cells[0].outputs
    shown = [o for o in outputs if o.output_type == "display_data"]
    assert len(shown) == 1
    assert "40/40 rounds" in shown[0]["data"]["text/plain"]
    assert "1/40 rounds" not in shown[0]["data"]["text/plain"]
    assert "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout") == "stopped\n"
