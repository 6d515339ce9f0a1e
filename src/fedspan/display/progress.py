"""The progress of a run: a live display on a terminal, one plain line per round anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from fedspan.display.loading import LoadingLines, loading_lines
from fedspan.support.activity import Activity, listening
from fedspan.support.errors import one_line

if TYPE_CHECKING:
    from fedspan.runs.events import Event

PHASE_LABELS: Mapping[str, str] = {
    "base": "untouched base",
    "federation": "federation",
    "local": "clients alone",
    "final": "last evaluation",
}
"""Phase of a run -> the words for it."""


def size(num_bytes: float) -> str:
    """Return a number of bytes in a readable unit: 950 B, 4.2 kB, 13.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """Return a time in readable units: 12 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float | None) -> str:
    """Return a figure with three decimals or four digits; an en dash where it was not measured or is not defined."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


@dataclass(slots=True)
class Progression:
    """The progress of the current phase, from the events so far; the caller passes the time."""

    phase: str = ""
    total: int = 0
    done: float = 0.0
    """Finished rounds; the finished clients of the current round count as a fraction of it."""
    _began: float = 0.0
    _began_at: float = 0.0

    def begin(self, phase: str, total: int, done: int, now: float) -> None:
        """Start a phase, after `done` rounds where a run is resumed."""
        self.phase, self.total, self.done = phase, total, done
        self._began, self._began_at = now, done

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds to the end of the phase at the pace so far; None before the first progress."""
        progress = self.done - self._began_at
        if progress <= 0:
            return None
        return (now - self._began) / progress * (self.total - self.done)


def main_metric(started: Mapping[str, Any], evaluated: Mapping[str, float]) -> str | None:
    """Return the metric to show: the summary's where it was evaluated, else the first."""
    metric = started.get("metric")
    return metric if metric in evaluated else next((name for name in evaluated if name != "loss"), None)


def _of_rows(record: Mapping[str, Any]) -> str:
    rows = record.get("eval_rows")
    return f" ({rows:,} rows)" if rows else ""


def title_line(data: Mapping[str, Any]) -> str:
    """Return in one line what is about to run."""
    ranks = sorted(set(data["ranks"]))
    of_ranks = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    clients = "client" if data["num_clients"] == 1 else "clients"
    return (
        f"{data['method']} on {data['task']}: {data['num_clients']} {clients}, {of_ranks}, "
        f"{data['rounds']} rounds; {data['model']} of {data['base_parameters']:,} parameters, "
        f"{data['trained_parameters']:,} trained"
    )


def engine_line(data: Mapping[str, Any]) -> str:
    """Return in one line how the work is done."""
    why = f" ({data['reason']})" if data["reason"] else ""
    processes = "1 process" if data["workers"] == 1 else f"{data['workers']} processes"
    precision = f", products in {data['precision']}" if data.get("precision") else ""
    return f"{data['engine']} engine{why}, {processes}{precision}"


_NAMES_SHOWN = 6


def data_line(data: Mapping[str, Any] | None) -> str:
    """Return the rows of every split and the classes in one line; nothing for a run that does not say them."""
    if data is None:
        return ""
    rows = ", ".join(f"{count:,} {split}" for split, count in data["rows"].items())
    line = f"rows: {rows or 'none here'}"
    if data["num_classes"] is not None:
        names = [one_line(repr(name), 40) for name in (data["label_names"] or ())[:_NAMES_SHOWN]]
        more = ", …" if len(data["label_names"] or ()) > _NAMES_SHOWN else ""
        line += f"; {data['num_classes']} classes{': ' if names else ''}{', '.join(names)}{more}"
    return line


def rejected_lines(record: Mapping[str, Any]) -> list[str]:
    """Return a line for every answer that was left out of a round."""
    return [
        f"round {record['round_num']}: the update of {client} was left out: {reason}"
        for client, reason in record.get("rejected", {}).items()
    ]


@dataclass(slots=True)
class Lines:
    """A listener that prints one line per round, for logs and pipes."""

    console: Console
    loading: LoadingLines | None = None
    _started: Mapping[str, Any] = field(default_factory=dict)
    _at: Progression = field(default_factory=Progression)

    def __call__(self, event: Event) -> None:
        """Show one event."""
        data = event.data
        if event.kind == "start":
            if self.loading is not None:
                self.loading.close()
            self._started = data
            self._print(f"{title_line(data)}; folder {data['out']}")
            self._print(engine_line(data))
            if line := data_line(data.get("data")):
                self._print(line)
        elif event.kind == "phase":
            self._at.begin(data["phase"], data["total"], data["done"], time.monotonic())
            resumed = f", from round {data['done'] + 1}" if 0 < data["done"] < data["total"] else ""
            self._print(PHASE_LABELS.get(data["phase"], data["phase"]) + resumed)
        elif event.kind == "round":
            self._round(data["record"])
        elif event.kind in ("site", "budget", "note"):
            self._print(data["line"])

    def _round(self, record: Mapping[str, Any]) -> None:
        self._at.done = record["round_num"]
        parts = [f"round {record['round_num']}/{self._at.total}", f"loss {number(record['train_loss'])}"]
        evaluated = record.get("eval") or {}
        metric = main_metric(self._started, evaluated)
        if metric is not None:
            parts.append(f"{metric} {number(evaluated[metric])}{_of_rows(record)}")
        parts.append(f"{record['num_clients']} clients")
        parts.append(f"up {size(record['bytes_up'])}, down {size(record['bytes_down'])}")
        left = self._at.seconds_left(time.monotonic())
        if left:
            parts.append(f"{duration(left)} left")
        for line in rejected_lines(record):
            self._print(f"  {line}")
        self._print("  " + "  ".join(parts))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()  # a pipe would otherwise hold the lines back for minutes


class _Left(ProgressColumn):
    """Time left of a phase, or the time that it took; rendered again with every refresh."""

    def render(self, task: Task) -> Text:
        seconds = task.fields["left"](task)
        if task.finished:
            return Text(f"{duration(task.finished_time or 0.0)}", style="dim")
        return Text("" if seconds is None else f"{duration(seconds)} left")


@dataclass(slots=True)
class Live:
    """A listener that shows a bar for every phase, with loss, metric and time left."""

    progress: Progress
    _loading: TaskID
    _started: Mapping[str, Any] = field(default_factory=dict)
    _at: Progression = field(default_factory=Progression)
    _task: TaskID | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        data = event.data
        if event.kind == "start":
            self.progress.remove_task(self._loading)
            self._started = data
            self.progress.console.print(f"[bold]{escape(title_line(data))}[/]", highlight=False)
            self.progress.console.print(escape(engine_line(data)), style="dim", highlight=False)
            if line := data_line(data.get("data")):
                self.progress.console.print(escape(line), style="dim", highlight=False)
        elif event.kind == "phase":
            self._phase(data)
        elif event.kind == "client":
            self._client(data)
        elif event.kind == "round":
            self._round(data["record"])
        elif event.kind in ("site", "budget", "note"):
            self.progress.console.print(escape(data["line"]), highlight=False)
        elif event.kind == "end":
            self._finish()

    def show_activity(self, activity: Activity) -> None:
        """Show what is being read, encoded or loaded before the run begins."""
        if not self._started:
            self.progress.update(self._loading, description=escape(activity.what), status=activity.extent)

    def _phase(self, data: Mapping[str, Any]) -> None:
        self._finish()
        phase, total, done = data["phase"], data["total"], data["done"]
        self._at.begin(phase, total, done, time.monotonic())
        counts_rounds = phase in ("federation", "local")
        self._task = _row(
            self.progress,
            PHASE_LABELS.get(phase, phase),
            total if counts_rounds else None,
            done,
            status=f"{done}/{total} rounds" if counts_rounds else "",
            left=self._left,
        )

    def _finish(self) -> None:
        if self._task is not None:
            self.progress.update(self._task, total=self._at.total, completed=self._at.total)
            self._task = None

    def _left(self, task: Task) -> float | None:
        return self._at.seconds_left(time.monotonic()) if task.total is not None else None

    def _client(self, data: Mapping[str, Any]) -> None:
        if self._task is None:
            return
        round_num, done, cohort = data["round_num"], data["done"], data["cohort"]
        # The server's work and the evaluation come after the last client of a round.
        self._at.done = round_num - 1 + done / (cohort + 1)
        self.progress.update(
            self._task,
            completed=self._at.done,
            status=f"{round_num - 1}/{self._at.total} rounds, {done}/{cohort} clients",
        )

    def _round(self, record: Mapping[str, Any]) -> None:
        if self._task is None:
            return
        self._at.done = record["round_num"]
        figures = [f"loss {number(record['train_loss'])}"]
        evaluated = record.get("eval") or {}
        metric = main_metric(self._started, evaluated)
        if metric is not None:
            figures.append(f"{metric} [bold]{number(evaluated[metric])}[/]{_of_rows(record)}")
        for line in rejected_lines(record):
            self.progress.console.print(escape(line), style="yellow", highlight=False)
        self.progress.update(
            self._task,
            completed=self._at.done,
            status=f"{record['round_num']}/{self._at.total} rounds",
            figures="  ".join(figures),
        )


@contextmanager
def follow(console: Console) -> Iterator[Lines | Live]:
    """Yield a listener for a run's events: a live display on a terminal, plain lines otherwise.

    Inside the block the activities before a run (`fedspan.support.activity`) are shown too: in the live display, or on
    standard error, so that they are not among the results.
    """
    if not console.is_terminal:
        with loading_lines(sys.stderr) as loading:
            yield Lines(console, loading)
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}")]
    roomy = console.width >= 95
    if roomy:
        columns.append(BarColumn(bar_width=min(24, console.width - 85)))
    status = TextColumn("{task.fields[status]}", table_column=Column(min_width=26 if roomy else None))
    columns += [status, TextColumn("{task.fields[figures]}"), _Left()]
    # Rarely: redrawing takes time from training, which holds the interpreter.
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        live = Live(progress, _row(progress, "loading"))
        with listening(live.show_activity):
            yield live


def _row(progress: Progress, label: str, total: int | None = None, done: int = 0, **fields: Any) -> TaskID:
    return progress.add_task(
        label, total=total, completed=done, **{"status": "", "figures": "", "left": lambda task: None, **fields}
    )
