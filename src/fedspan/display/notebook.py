"""The progress of a run in a notebook: one text that is replaced as the run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedspan.display.console import in_notebook
from fedspan.display.progress import (
    PHASE_LABELS,
    Progression,
    data_line,
    duration,
    engine_line,
    main_metric,
    number,
    rejected_lines,
    title_line,
)
from fedspan.support.activity import Activity, listening

if TYPE_CHECKING:
    from fedspan.runs.events import Event

_AGAIN = 0.25
"""Seconds between two updates within a round; every one is a message to the browser, and is kept by some front ends."""
_BAR = 20
_REMARKS = 12
"""Lines about sites, budgets and rejected answers that are shown; of more, the last ones."""


def in_kernel() -> bool:
    """Return whether the code runs in a kernel of Jupyter, which can replace what it has displayed."""
    return "ipykernel" in sys.modules and in_notebook()


@contextmanager
def follow_in_notebook() -> Iterator[Notebook]:
    """Yield a listener for a run's events that shows them in the cell's output."""
    notebook = Notebook(_displayed())
    with listening(notebook.show_activity):
        yield notebook


def _displayed() -> Any:
    from IPython.display import display

    return display({"text/plain": "loading"}, raw=True, display_id=True)


@dataclass(slots=True)
class Notebook:
    """A listener that keeps one text up to date."""

    handle: Any
    """IPython's display handle."""
    _started: Mapping[str, Any] = field(default_factory=dict)
    _head: list[str] = field(default_factory=list)
    _phases: list[str] = field(default_factory=list)
    """Lines of the finished phases."""
    _at: Progression = field(default_factory=Progression)
    _status: str = "loading"
    _figures: str = ""
    _remarks: list[str] = field(default_factory=list)
    _phase_began: float = 0.0
    _shown: float = 0.0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        data, now = event.data, time.monotonic()
        if event.kind == "start":
            self._started = data
            self._head = [f"{title_line(data)}; folder {data['out']}", engine_line(data)]
            self._head += [line for line in (data_line(data.get("data")),) if line]
            self._status = "preparing"
        elif event.kind == "phase":
            self._finish_phase(now)
            self._phase_began = now
            self._at.begin(data["phase"], data["total"], data["done"], now)
            self._status = self._rounds() if self._counts() else ""
        elif event.kind == "client":
            self._at.done = data["round_num"] - 1 + data["done"] / (data["cohort"] + 1)
            self._status = f"{self._rounds()}, {data['done']}/{data['cohort']} clients"
        elif event.kind == "round":
            self._round(data["record"])
        elif event.kind in ("site", "budget", "note"):
            self._remarks.append(data["line"])
        elif event.kind == "end":
            self._finish_phase(now)
        if event.kind != "client" or now - self._shown > _AGAIN:
            self._show(now)

    def show_activity(self, activity: Activity) -> None:
        """Show what is being read, encoded or loaded before the run begins."""
        now = time.monotonic()
        if not self._started and now - self._shown > _AGAIN:
            self._status = f"{activity.what} {activity.extent}".strip()
            self._show(now)

    def _round(self, record: Mapping[str, Any]) -> None:
        self._at.done = record["round_num"]
        evaluated = record.get("eval") or {}
        metric = main_metric(self._started, evaluated)
        self._figures = f"loss {number(record['train_loss'])}"
        if metric is not None:
            self._figures += f"  {metric} {number(evaluated[metric])}"
        self._remarks += rejected_lines(record)
        self._status = self._rounds()

    def _finish_phase(self, now: float) -> None:
        if self._at.phase:
            self._at.done = self._at.total
            parts = [self._label(), self._rounds() if self._counts() else "", self._figures]
            self._phases.append("  ".join([*filter(None, parts), duration(now - self._phase_began)]))
        self._at = Progression()
        self._status = self._figures = ""

    def _show(self, now: float) -> None:
        self._shown = now
        lines = [*self._head, *self._phases]
        if self._at.phase:
            left = self._at.seconds_left(now) if self._counts() else None
            ahead = f"{duration(left)} left" if left else ""
            bar = self._bar() if self._counts() else ""
            lines.append("  ".join(filter(None, (self._label(), bar, self._status, self._figures, ahead))))
        elif self._status:
            lines.append(self._status)
        if len(self._remarks) > _REMARKS:
            lines.append(f"… {len(self._remarks) - _REMARKS} earlier lines")
        lines += self._remarks[-_REMARKS:]
        self.handle.update({"text/plain": "\n".join(lines)}, raw=True)

    def _bar(self) -> str:
        full = int(_BAR * min(1.0, self._at.done / max(1, self._at.total)))
        return "█" * full + "░" * (_BAR - full)

    def _label(self) -> str:
        return PHASE_LABELS.get(self._at.phase, self._at.phase)

    def _counts(self) -> bool:
        return self._at.phase in ("federation", "local")

    def _rounds(self) -> str:
        return f"{int(self._at.done)}/{self._at.total} rounds"
