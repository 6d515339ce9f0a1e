"""The tables of a report, as texts and the values that they are sorted by."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedspan.config import Config
from fedspan.data.metrics import METRICS
from fedspan.display.progress import duration, number, size
from fedspan.display.report import client_rows
from fedspan.display.run_groups import flat
from fedspan.reporting.records import Run, finite, object_of

NONE = "–"
"""A figure that was not measured."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry: its text, and the number that it is sorted by, if it is one."""

    text: str
    value: float | None = None
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column."""

    name: str
    numeric: bool = True
    title: str = ""
    """Explanation that is shown when the pointer rests on it."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption, which a reader can sort."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def figure(value: object, strong: bool = False) -> Cell:
    """Return the cell of a metric's figure."""
    known = finite(value)
    return Cell(number(known), known, strong)


def count(value: object) -> Cell:
    """Return the cell of a whole number."""
    known = finite(value)
    return Cell(NONE if known is None else f"{known:,.0f}", known)


def in_bytes(value: object) -> Cell:
    """Return the cell of a number of bytes."""
    known = finite(value)
    return Cell(NONE if known is None else size(known), known)


def time(value: object) -> Cell:
    """Return the cell of a duration in seconds."""
    known = finite(value)
    return Cell(NONE if known is None else duration(known) if known >= 9.5 else f"{known:.2g} s", known)


def spread(values: Sequence[float | None]) -> Cell:
    """Return the cell of a mean over seeds, with the sample standard deviation where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell(NONE)
    mean = statistics.fmean(known)
    text = number(mean) if len(known) < 2 else f"{number(mean)} ± {number(statistics.stdev(known))}"
    return Cell(text, mean, strong=True)


def arrow(metric: str) -> str:
    """Return the direction in which the metric is better, after its name."""
    if metric == "loss":
        return "loss ↓"
    if metric not in METRICS:  # one that was registered by the process of the run alone
        return metric
    return f"{metric} {'↑' if METRICS[metric].higher_is_better else '↓'}"


def groups_table(groups: Sequence[tuple[str, Sequence[Run]]], metric: str) -> Table:
    """Return one row for each group of runs that differ by their seeds."""
    columns = [
        Column("runs", numeric=False),
        Column("seeds", title="Runs with the same settings and other seeds"),
        Column(arrow(metric), title="Mean ± standard deviation over the seeds"),
        Column("untouched base"),
        Column("client alone", title="Mean of clients that train alone"),
        Column("sent", title="Bytes up and down in all rounds, mean over the seeds"),
    ]
    rows = [
        (
            Cell(label),
            count(len(runs)),
            spread([run.last(metric) for run in runs]),
            spread([finite(run.figures("base").get(metric)) for run in runs]),
            spread([finite(run.figures("local").get(metric)) for run in runs]),
            in_bytes(statistics.fmean([sum([*run.sent().values()][-1:]) for run in runs])),
        )
        for label, runs in groups
    ]
    return Table("Settings, over their seeds", columns, rows)


def runs_table(runs: Sequence[Run], metric: str, names: Sequence[str]) -> Table:
    """Return one row for each run."""
    columns = [
        Column("run", numeric=False),
        Column("method", numeric=False),
        Column("seed"),
        Column("state", numeric=False),
        Column("rounds", title="Finished rounds of those in the settings"),
        Column(arrow(metric)),
        Column("sent", title="Bytes up and down"),
        Column("time", title="Of the process that finished the run; otherwise not known"),
    ]
    rows = [
        (
            Cell(name),
            Cell(run.title),
            Cell(str(run.config.seed), float(run.config.seed)),
            Cell(run.status),
            Cell(f"{len(run.rounds)} of {run.config.federation.rounds}", float(len(run.rounds))),
            figure(run.last(metric), strong=True),
            in_bytes(sum([*run.sent().values()][-1:])),
            time(object_of(run.summary.get("totals")).get("wall_seconds")),
        )
        for run, name in zip(runs, names, strict=True)
    ]
    return Table("Every run", columns, rows)


def results_table(run: Run) -> Table:
    """Return the figures of a finished run, as its command prints them."""
    metrics = object_of(run.summary.get("metrics"))
    main = str(run.summary["metric"])
    names = _metric_names(metrics, main)
    rows: list[Sequence[Cell]] = []

    def row(label: str, values: object, strong: bool = False) -> None:
        figures = object_of(values)
        if figures:
            rows.append((Cell(label, strong=strong), *(figure(figures.get(name), strong) for name in names)))

    row("untouched base", metrics.get("base"))
    row("average client alone", metrics.get("local"))
    row(f"federation ({run.title})", metrics.get("clients"), strong=True)
    if metrics.get("server") != metrics.get("clients"):
        row("the server's full state", metrics.get("server"))
    by_clients = client_rows(run.summary)
    if not by_clients:
        row("on the clients' own data", metrics.get("own_data"))
    for label, values, _ in by_clients:
        row(label, values)
    row("on unseen data", metrics.get("unseen"))
    # What the clients judge alone is no test data of the server's.
    own = by_clients and "server" not in metrics
    return Table(
        "Results on the clients' held-out rows" if own else "Results on the test data",
        [Column("", numeric=False), *(Column(arrow(name)) for name in names)],
        rows,
    )


def spread_tables(run: Run) -> list[Table]:
    """Return the figures by rank and by client, where they were measured."""
    metrics = object_of(run.summary.get("metrics"))
    main = run.metric or "loss"
    names = _metric_names(metrics, main)
    columns = [Column(arrow(name)) for name in names]

    def rows(whose: str) -> list[Sequence[Cell]]:
        return [
            (Cell(name, finite(_whole(name))), *(figure(object_of(values).get(m)) for m in names))
            for name, values in object_of(metrics.get(whose)).items()
        ]

    found = []
    per_rank, per_client = rows("per_rank"), rows("per_client")
    if len(per_rank) > 1:
        found.append(Table("By the client's rank", [Column("rank"), *columns], per_rank))
    if per_client:
        caption = "By client, on rows of its own"
        found.append(Table(caption, [Column("client", numeric=False), *columns], per_client))
    return found


def _metric_names(metrics: Mapping[str, Any], main: str) -> list[str]:
    """Return the metrics in the order of the columns: the run's own first, the loss last."""
    others = [name for name in object_of(metrics.get("clients")) if name not in (main, "loss")]
    return [main, *others, *(["loss"] if main != "loss" else [])]


def clients_table(run: Run) -> Table | None:
    """Return every client with its rank and its number of training examples."""
    clients = [object_of(client) for client in run.summary.get("clients") or ()]
    if not clients:
        return None
    rows = [
        (Cell(str(client.get("client_id"))), count(client.get("rank")), count(client.get("num_examples")))
        for client in clients
    ]
    return Table("The clients", [Column("client", numeric=False), Column("rank"), Column("training examples")], rows)


def cost_table(run: Run) -> Table:
    """Return traffic, time and memory: in all rounds, and in the mean of a round."""
    rounds = max(1, len(run.rounds))
    rows = [
        (Cell(label), kind(run.total(key)), kind(_divided(run.total(key), rounds)))
        for label, key, kind in (
            ("sent by the clients", "bytes_up", in_bytes),
            ("sent to the clients", "bytes_down", in_bytes),
            ("clients' work, added up", "client_seconds", time),
            ("waiting for the clients", "train_wall_seconds", time),
            ("server's own work", "server_seconds", time),
        )
    ]
    peak = max((finite(record.get("peak_server_bytes")) or 0.0 for record in run.rounds), default=0.0)
    rows.append((Cell("server's memory, at most"), in_bytes(peak or None), Cell("")))
    return Table("Cost", [Column("", numeric=False), Column("all rounds"), Column("a round")], rows)


def settings_table(config: Config) -> Table:
    """Return the settings that differ from the defaults."""
    own, usual = flat(config), flat(Config())
    rows = [
        (Cell(key), Cell(_text(value)), Cell(_text(usual[key]) if key in usual else ""))
        for key, value in own.items()
        if key not in usual or usual[key] != value
    ]
    columns = [Column("setting", numeric=False), Column("value", numeric=False), Column("default", numeric=False)]
    return Table("Settings that differ from the defaults", columns, rows)


def facts(run: Run) -> list[tuple[str, str]]:
    """Return what the run was on: base, data, clients, versions."""
    data, config = object_of(run.summary.get("data")), run.config
    found = [("base", config.model.name), ("data", config.data.task)]
    rows = object_of(data.get("rows"))
    if rows:
        found.append(("rows", ", ".join(f"{count(n).text} {split}" for split, n in rows.items())))
    if finite(data.get("num_classes")) is not None:
        names = ", ".join(map(str, data.get("label_names") or ()))
        found.append(("classes", count(data["num_classes"]).text + (f": {names}" if names else "")))
    clients, federation = run.summary.get("clients") or (), config.federation
    found.append(("clients", count(len(clients) or federation.num_clients).text))
    found.append(("a round", f"{federation.participation:.0%} of the clients"))
    found.append(("seed", str(config.seed)))
    if finite(run.summary.get("epsilon")) is not None:
        found.append(("privacy", f"ε = {run.summary['epsilon']:.3g} at δ = {config.privacy.delta:g}"))
    versions = object_of(run.summary.get("versions"))
    found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or NONE))
    found.append(("folder", str(run.folder)))
    return found


def _divided(value: float | None, by: int) -> float | None:
    return None if value is None else value / by


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping | list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def cells_table(cells: Sequence[Any], metric: str) -> Table:
    """Return the means of a comparison, one row for each condition and arm."""
    columns = [
        Column("condition", numeric=False),
        Column("arm", numeric=False),
        Column("seeds"),
        Column(f"{arrow(metric)}, mean", title="Over the seeds"),
        Column("sd", title="Sample standard deviation over the seeds"),
        Column("worst to best", title="Smallest and largest figure of a seed"),
    ]
    return Table("Means over the seeds", columns, [_cell_row(cell) for cell in cells])


def _cell_row(cell: Any) -> Sequence[Cell]:
    values = sorted(value for value in cell.values.values() if value is not None)
    ends = Cell(f"{number(values[0])} – {number(values[-1])}", values[0]) if values else Cell(NONE)
    return (
        Cell(cell.condition),
        Cell(cell.arm),
        count(cell.n),
        figure(cell.mean, strong=True),
        figure(cell.std if cell.n > 1 else None),
        ends,
    )
