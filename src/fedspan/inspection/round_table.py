"""A run's diagnostics as a table, and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from fedspan.inspection.readings import readings
from fedspan.inspection.record import Inspection, angle, percent

MAX_ROWS = 20
"""Most rows of a table, so that it fits a screen."""


def as_json(run: Inspection) -> dict[str, Any]:
    """Return all diagnostics and their meaning, for programs."""
    rounds = [{"round_num": record["round_num"], **record["diagnostics"]} for record in run.rounds]
    return {"folder": str(run.folder), "method": run.info.name, "rounds": rounds, "readings": readings(run)}


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("from ideal", "distance_from_ideal", percent),
    ("from state + new", "distance_from_innovation", percent),
    ("gauge", "gauge_sensitivity", percent),
    ("cross terms", "cross_terms", percent),
    ("eff. rank", "effective_rank", _plain),
    ("stable rank", "stable_rank", _plain),
    ("clients apart", "angle_clients_mean", angle),
    ("to consensus", "angle_consensus", angle),
    ("drift", "drift_mean", angle),
    ("new rows", "row_space_escape", percent),
    ("outside first A", "first_a_escape", percent),
)


def table(run: Inspection) -> Table:
    """Return the main figures by round: every k-th where there are more than `MAX_ROWS`, and always the last one."""
    out = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    columns = [column for column in _COLUMNS if run.known(column[1])]
    ranks = run.ranks()
    out.add_column("round", justify="right")
    for heading, _, _ in columns:
        out.add_column(heading, justify="right")
    for rank in ranks:
        out.add_column(f"rank {rank}", justify="right")
    for record in _selected(run.rounds):
        figures = record["diagnostics"]
        losses = figures.get("readout_loss") or {}
        shown_figures = [show(figures.get(figure)) for _, figure, show in columns]
        out.add_row(str(record["round_num"]), *shown_figures, *(percent(losses.get(rank)) for rank in ranks))
    return out


def _selected(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return at most `MAX_ROWS` rounds at equal distances, of which the last is the run's last."""
    step = math.ceil(len(rounds) / MAX_ROWS)
    return list(rounds[::-1][::step])[::-1]


_LEGEND: tuple[tuple[str, str, str], ...] = (
    (
        "distance_from_ideal",
        "from ideal",
        "what clients receive next against Σ p_k of what they ended with; rank r: the same at that rank",
    ),
    (
        "distance_from_innovation",
        "from state + new",
        "the same against the server's old state plus what the clients added to what they were sent",
    ),
    (
        "gauge_sensitivity",
        "gauge",
        "change of the result if every client's (B, A) were written as (B G, G⁻¹ A), condition 10",
    ),
    ("cross_terms", "cross terms", "what averaging A and B separately would lose on these updates"),
    (
        "effective_rank",
        "eff., stable rank",
        "directions that the energy of the whole change of the base is spread over; ‖X‖² / σ₁²",
    ),
    ("angle_clients_mean", "clients apart", "mean principal angle between two clients' column spaces"),
    ("angle_consensus", "to consensus", "from a client's column space to the leading directions of their mean"),
    ("drift_mean", "drift", "of the leading directions of the whole change, in this round"),
    ("row_space_escape", "new rows", "share of the change's energy outside the row space of the change before"),
    ("first_a_escape", "outside first A", "share of the change's energy outside the row space of the run's first A"),
)


def legend(run: Inspection) -> str:
    """Return the meaning of the table's columns, one a line."""
    lines = [(heading, text) for figure, heading, text in _LEGEND if run.known(figure)]
    width = max((len(heading) for heading, _ in lines), default=0)
    return "\n".join(f"{heading:<{width}}  {text}" for heading, text in lines)
