"""The page: what is read from run folders, put into the template, with everything from files escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedspan.display import run_groups
from fedspan.display.own_files import write_own
from fedspan.display.progress import duration, number, size
from fedspan.reporting import tables
from fedspan.reporting.charts import Curve, Line, draw, glyph, line_of
from fedspan.reporting.comparison import settings_text
from fedspan.reporting.forest import forest
from fedspan.reporting.records import Run, Study, Words, finite, object_of
from fedspan.reporting.tables import Table
from fedspan.support.templating import environment, read
from fedspan.support.versions import installed_version

MARKER = b'<meta name="generator" content="fedspan report">'
"""Stands in every page, by which one is known that may be replaced."""
_MOST_DETAILS = 24
"""Runs that are described one by one; a page of more would be too large to send."""
_TEXT = 300  # characters of one text from a file


@dataclass(frozen=True, slots=True)
class Chart:
    """Two views of the same curves, with the legend that both share."""

    title: str
    note: str
    views: Sequence[tuple[str, Markup]]
    """Caption and drawing."""
    legend: Sequence[tuple[Markup, str]]


@dataclass(frozen=True, slots=True)
class Detail:
    """One run by itself."""

    key: str
    """Identifies it among those of the page."""
    name: str
    run: Run
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    """Results, spread and cost."""
    background: Sequence[Table]
    """Settings and clients."""
    words: Sequence[str]
    remarks: Sequence[str]


def render(study: Study, words: Words, *, live: bool = False) -> str:
    """Return the whole page as HTML, which loads nothing from elsewhere.

    Parameters
    ----------
    words
        Returns the diagnostics of a run folder in sentences; asked only where a run has diagnostics.
    live
        The page is served, and asks to be made anew when the folders change.

    Raises
    ------
    FedspanError
        When matplotlib is missing, or a record is damaged.
    """
    names = _names(study)
    groups = _groups(study, names)
    shown = list(zip(study.runs, names, strict=True))[:_MOST_DETAILS]
    comparison = study.comparison
    return (
        environment("fedspan.reporting", "report.html", _TEXT)
        .get_template("report.html")
        .render(
            study=study,
            title=_title(study, groups),
            lead=_lead(study),
            tiles=_tiles(study),
            comparison=comparison,
            forest=forest(comparison) if comparison is not None else None,
            cells=tables.cells_table(comparison.cells, comparison.metric) if comparison is not None else None,
            arms=_arms(study),
            overview=_overview(study, groups, names),
            charts=_charts(study, groups),
            details=[_detail(k, run, name, words) for k, (run, name) in enumerate(shown)],
            left_out=len(study.runs) - len(shown),
            live=live,
            made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            version=installed_version("fedspan"),
            **_inline(),
        )
    )


@cache
def _inline() -> dict[str, Any]:
    """Return style sheet and script, and the policy that lets a browser run this script and no other."""
    style, script = (read("fedspan.reporting", name) for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "style": Markup(style),
        "script": Markup(script),
        "script_digest": digest,
        "marker": Markup(MARKER.decode()),
    }


def _names(study: Study) -> list[str]:
    """Return a short name for each run: the part of its path that tells it from the others."""
    if study.conditions:
        return [
            f"{condition} / {run.folder.parent.name} / {run.folder.name}"
            for condition, run in zip(study.conditions, study.runs, strict=True)
        ]
    parts = [run.folder.resolve().parts for run in study.runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


Groups = list[tuple[str, list[Run]]]


def _groups(study: Study, names: Sequence[str]) -> Groups:
    """Return the runs that differ by their seeds alone, with a label; of a comparison by condition and arm."""
    if study.conditions:
        of_arm: dict[str, list[Run]] = {}
        for condition, run in zip(study.conditions, study.runs, strict=True):
            of_arm.setdefault(f"{condition} / {run.folder.parent.name}", []).append(run)
        return list(of_arm.items())
    groups = run_groups.grouped([(run_groups.repeated(run.config), run) for run in study.runs])
    labels = run_groups.labels([group[0].config for group in groups])
    if len(set(labels)) < len(labels):
        of_folder = dict(zip((run.folder for run in study.runs), names, strict=True))
        labels = [of_folder[group[0].folder] for group in groups]
    return list(zip(labels, groups, strict=True))


def _title(study: Study, groups: Groups) -> str:
    if study.comparison is not None:
        return study.comparison.name
    if study.conditions:
        return f"Comparison {study.folders[0].resolve().name}"
    if len(groups) == 1:
        return f"{groups[0][1][0].title} on {study.runs[0].config.data.task}"
    titles = list(dict.fromkeys(run.title for run in study.runs))
    return ", ".join(titles) if len(titles) <= 4 else f"{len(titles)} methods"


def _lead(study: Study) -> str:
    """Return one sentence on what the page is about."""
    states = [run.status for run in study.runs]
    unfinished = len(states) - states.count("finished")
    count = f"{len(states)} runs" if len(states) != 1 else "One run"
    state = "" if not unfinished else f", {unfinished} of them unfinished" if len(states) > 1 else f", {states[0]}"
    result = study.comparison
    if result is None:
        return f"{count}{state}."
    margin = "" if result.margin is None else f"; differences below {number(result.margin)} count as none"
    return (
        f"{count}{state}: the {_FIGURES.get(result.figure, result.figure)} {result.metric} of every run, over "
        f"{len(result.seeds)} seeds, against {result.baseline}, with {result.confidence:.0%} intervals{margin}."
    )


_FIGURES = {"last": "last", "best": "best", "mean_last": "mean of the last rounds'"}


def _tiles(study: Study) -> list[tuple[str, str, str]]:
    """Return the headline figures of a single run: label, figure and remark."""
    if len(study.runs) != 1 or study.metric is None:
        return []
    run, metric = study.runs[0], study.metric
    rows = object_of(object_of(run.summary.get("data")).get("rows"))
    on = f"{tables.arrow(metric)} on {rows['test']:,} rows" if finite(rows.get("test")) else tables.arrow(metric)
    found = [("federation" if run.summary else "so far", number(run.last(metric)), on)]
    for whose, label in (("base", "untouched base"), ("local", "average client alone")):
        value = finite(run.figures(whose).get(metric))
        if value is not None:
            found.append((label, number(value), metric))
    found.append(("rounds", str(len(run.rounds)), f"of {run.config.federation.rounds}"))
    found.append(("sent", size(sum([*run.sent().values()][-1:])), "up and down"))
    seconds = finite(object_of(run.summary.get("totals")).get("wall_seconds"))
    if seconds is not None:
        found.append(("time", duration(seconds), "of the process that finished it"))
    return found


def _arms(study: Study) -> Table | None:
    """Return the settings of every arm of a comparison, where some were tuned or given."""
    if study.comparison is None:
        return None
    columns = [tables.Column(name, numeric=False) for name in ("condition", "arm", "settings")]
    rows = [
        tuple(tables.Cell(text) for text in (cell.condition, cell.arm, settings_text(cell.settings)))
        for cell in study.comparison.cells
        if cell.settings
    ]
    return Table("Settings of the arms", columns, rows) if rows else None


def _overview(study: Study, groups: Groups, names: Sequence[str]) -> list[Table]:
    if (len(study.runs) == 1 and not study.conditions) or study.metric is None:
        return []
    repeated = len(groups) < len(study.runs) and study.comparison is None
    by_seed = [tables.groups_table(groups, study.metric)] if repeated else []
    return [*by_seed, tables.runs_table(study.runs, study.metric, names)]


def _charts(study: Study, groups: Groups) -> list[Chart]:
    """Return the learning curves: one chart for each condition of a comparison, and one of all runs elsewhere."""
    metric = study.metric
    if not study.conditions:
        own = [_chart("", metric, groups)] if metric is not None else []
        single = [_losses(study.runs[0])] if len(study.runs) == 1 and study.runs[0].losses() else []
        return [chart for chart in (*own, *single) if chart is not None]
    if metric is None:
        return []
    # The baseline is the first cell of a comparison, and then the first colour.
    listed = [] if study.comparison is None else [cell.arm for cell in study.comparison.cells]
    begun = [run.folder.parent.name for run in study.runs]
    arms = [arm for arm in dict.fromkeys((*listed, *begun)) if arm in begun]
    charts = []
    for condition in dict.fromkeys(study.conditions):
        own_groups = [
            (arm, [r for c, r in zip(study.conditions, study.runs, strict=True) if (c, r.folder.parent.name) == key])
            for arm in arms
            for key in [(condition, arm)]
        ]
        charts.append(_chart(condition, metric, own_groups))
    return [chart for chart in charts if chart is not None]


def _chart(title: str, metric: str, groups: Groups) -> Chart | None:
    """Return the metric by round and by megabyte; None where no round was evaluated."""
    curves = {
        k: [Curve(run.curve(metric), run.sent()) for run in runs if run.curve(metric)]
        for k, (_, runs) in enumerate(groups)
    }
    by_round = _lines(curves, "round")
    if not by_round:
        return None
    drawn = [line.index for line in by_round]
    bands = any(line.deviation is not None for line in by_round)
    levels = []
    if len(groups) == 1:
        levels = [finite(groups[0][1][0].figures(whose).get(metric)) for whose in ("base", "local")]
    named = "The dotted lines are the untouched base and the average client alone. " if any(levels) else ""
    return Chart(
        title,
        named + ("Means over the seeds; the bands are one standard deviation to either side." if bands else ""),
        [
            (f"{metric} by round", draw(by_round, "round", [v for v in levels if v is not None], whole=True)),
            (f"{metric} by megabytes sent up and down", draw(_lines(curves, "megabytes"), "MB sent")),
        ],
        [(glyph(k), _legend_name(groups[k][0], len(curves[k]))) for k in drawn] if len(groups) > 1 else [],
    )


def _lines(curves: dict[int, list[Curve]], by: str) -> list[Line]:
    found = [line_of(k, own, by) for k, own in curves.items() if own]
    return [line for line in found if line is not None]


def _legend_name(label: str, num_seeds: int) -> str:
    return label if num_seeds == 1 else f"{label} ({num_seeds} seeds)"


def _losses(run: Run) -> Chart:
    """Return the training loss by round, and the bytes that each round sent."""
    losses, sent = run.losses(), run.sent()
    rounds = [*sent]
    totals = [sent[n] / 1e6 for n in rounds]
    return Chart(
        "Training and traffic",
        "",
        [
            ("training loss by round", draw([Line(0, [*losses], [*losses.values()])], "round", whole=True)),
            ("MB sent up and down until each round", draw([Line(0, rounds, totals)], "round", whole=True)),
        ],
        [],
    )


def _detail(k: int, run: Run, name: str, words: Words) -> Detail:
    found = [tables.results_table(run), *tables.spread_tables(run)] if run.summary else []
    clients = tables.clients_table(run)
    said = list(words(run.folder)) if run.has_diagnostics else []
    return Detail(
        key=f"run-{k}",
        name=name,
        run=run,
        facts=tables.facts(run),
        tables=[*found, tables.cost_table(run)] if run.rounds else found,
        background=[tables.settings_table(run.config), *([clients] if clients is not None else [])],
        words=said,
        remarks=_remarks(run),
    )


def _remarks(run: Run) -> list[str]:
    """Return what a reader of the figures has to know: unusual reading of base or data, answers left out, spread."""
    found = [str(note) for note in run.summary.get("notes") or ()]
    metric = run.metric
    values = {
        client: value
        for client, figures in run.figures("per_client").items()
        if (value := finite(object_of(figures).get(metric or ""))) is not None
    }
    if len(values) > 1:
        ordered = sorted(values, key=lambda client: values[client])
        low, high = ordered[0], ordered[-1]
        found.append(
            f"{metric} by client: from {number(values[low])} ({low}) to {number(values[high])} ({high}), "
            f"median {number(values[ordered[len(ordered) // 2]])}"
        )
    for record in run.rounds:
        for client, reason in object_of(record.get("rejected")).items():
            found.append(f"round {record['round_num']}: the update of {client} was left out: {reason}")
    return found[:50]


def write(study: Study, out: Path, words: Words) -> Path:
    """Write the page, in place of an earlier one, and return its path.

    Raises
    ------
    FedspanError
        As `render`, and when something else is at the path.
    """
    return write_own(out, render(study, words).encode(), MARKER)
