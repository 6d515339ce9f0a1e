"""Claims about the algebra, judged by the diagnostics of the committed runs, and why decided differences are there."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from claims import CONDITIONS, FTG, GLORA, SUITES, Row
from keep import Line

from fedspan.comparison.results import mean as mean_of


@dataclass(frozen=True)
class Measured:
    """A claim about the algebra: a figure of every run of some arms, and the values that support the claim."""

    text: str
    source: str
    arms: tuple[str, ...]
    figure: Callable[[Line], float | None]
    holds: Callable[[float], bool]
    shown: str
    """The figure's description."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)


def largest(name: str) -> Callable[[Line], float | None]:
    """Return a function to a diagnostic's largest value over a run's kept rounds."""
    return lambda line: max(values(line, name), default=None)


def mean(name: str) -> Callable[[Line], float | None]:
    """Return a function to a diagnostic's mean over a run's kept rounds."""
    return lambda line: mean_of(values(line, name))


def growth(name: str) -> Callable[[Line], float | None]:
    """Return a function to a diagnostic's last value divided by its first."""
    return lambda line: found[-1] / found[0] if len(found := values(line, name)) > 1 and found[0] > 0 else None


def values(line: Line, name: str) -> list[float]:
    """Return a diagnostic's values in the rounds that keep it; of figures by rank, that of the smallest rank."""
    found = [r["diagnostics"].get(name) for r in line["rounds"] if r.get("diagnostics")]
    return [x[min(x, key=int)] if isinstance(x, Mapping) else x for x in found if x is not None]


MEASURED = (
    Measured(
        "Proposition 2: GLoRA does not depend on the clients' gauges",
        GLORA,
        ("glora", "glora_plus"),
        largest("gauge_sensitivity"),
        lambda x: x < 1e-3,
        "largest relative change when every client is re-factored",
    ),
    Measured(
        "averaging the factors depends on them",
        GLORA,
        ("fedit",),
        mean("gauge_sensitivity"),
        lambda x: x > 0.01,
        "the same, mean over the rounds",
    ),
    Measured(
        "averaged factors are not the average update: cross terms",
        GLORA,
        ("fedit",),
        mean("distance_from_ideal"),
        lambda x: x > 0.01,
        "‖B̄Ā − T‖/‖T‖, mean over the rounds",
    ),
    Measured(
        "FlexLoRA loses what it truncates",
        FTG,
        ("flexlora",),
        mean("readout_loss"),
        lambda x: x > 0.01,
        "(Σ_{j>r} σ_j²)^½/‖T‖ at the smallest rank, mean over the rounds",
    ),
    Measured(
        "FFA-LoRA stays in the row space of its first A",
        FTG,
        ("ffa_lora",),
        largest("first_a_escape"),
        lambda x: x < 1e-3,
        "energy outside this space, largest over the rounds",
    ),
    Measured(
        "FlexLoRA leaves it",
        FTG,
        ("flexlora",),
        largest("first_a_escape"),
        lambda x: x > 0.01,
        "energy outside this space, largest over the rounds",
    ),
    Measured(
        "under mixed ranks FlexLoRA's rank collapses",
        "2602.13486",
        ("flexlora",),
        growth("effective_rank"),
        lambda x: x < 0.9,
        "effective rank, last round over first",
        ("heavy_tail",),
    ),
)


def measured(lines: Mapping[str, Sequence[Line]]) -> list[str]:
    """Return one row for every claim about the algebra."""
    rows = [
        "| claim | source | figure | smallest, median, largest over the runs | runs | reproduced |",
        "|" + " --- |" * 6,
    ]
    for claim in MEASURED:
        chosen = [x for own in lines.values() for x in own if x["arm"] in claim.arms]
        got = [found for x in chosen if x["condition"] in claim.conditions and (found := claim.figure(x)) is not None]
        if not got:
            continue
        share = sum(map(claim.holds, got)) / len(got)
        answer = "**yes**" if share == 1 else "**no**" if share == 0 else f"in {share:.0%} of the runs"
        spread = ", ".join(f"{value:.2g}" for value in (min(got), statistics.median(got), max(got)))
        rows.append(f"| {claim.text} | {claim.source} | {claim.shown} | {spread} | {len(got)} | {answer} |")
    return rows


SHOWN = {
    "distance_from_ideal": "distance from the ideal update",
    "readout_loss": "left out at the smallest rank",
    "first_a_escape": "energy outside the first A",
    "effective_rank": "effective rank",
    "drift_mean": "turn of the subspace, degrees",
}
"""The diagnostics of the table of reasons."""


def reasons(rows: Sequence[Row], lines: Mapping[str, Sequence[Line]]) -> list[str]:
    """Return, for every decided difference, the diagnostics of both arms in the first and the last kept round."""
    head = ["", "arm / rival", "data", "condition", "points", *SHOWN.values()]
    table = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        if row.verdict not in ("better", "worse") or row.claim.kind != "figure":
            continue
        arms = (row.claim.arm, row.claim.rival)
        own = [[x for x in lines[row.suite] if (x["arm"], x["condition"]) == (arm, row.condition)] for arm in arms]
        cells = [" / ".join(course(runs, name) for runs in own) for name in SHOWN]
        where = [row.claim.key, " / ".join(f"`{arm}`" for arm in arms), SUITES[row.suite], CONDITIONS[row.condition]]
        points = f"{100 * row.found.pairs.mean:+.1f}"
        table.append("| " + " | ".join([*where, points, *cells]) + " |")
    return table


def course(runs: Sequence[Line], name: str) -> str:
    """Return a diagnostic's mean over the seeds, in the first and in the last round that keeps it."""
    found = [own for line in runs if (own := values(line, name))]
    if not found:
        return "–"
    return f"{statistics.mean(own[0] for own in found):.2g} → {statistics.mean(own[-1] for own in found):.2g}"
