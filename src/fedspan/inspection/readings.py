"""The papers' statements, checked against the figures of one run, as sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedspan.inspection.record import Inspection, angle, percent

EXACT = 1e-4
"""Relative errors below it are rounding: factors travel, and weights are averaged, in float32."""
_CONFINED = 1e-6
"""The same for a share of energy."""


def readings(run: Inspection) -> list[str]:
    """Return sentences about this run, one for each statement that its figures check."""
    lines = (_ideal(run), _innovation(run), _truncation(run), _gauge(run), _cross(run), _rows(run))
    return [line for line in (*lines, _ranks(run), _angles(run), _worst(run)) if line]


def _span(values: Sequence[float], show: Callable[[float | None], str]) -> str:
    """Return the range over the rounds, where both ends differ as shown."""
    low, high = show(min(values)), show(max(values))
    return "" if low == high else f" (over the rounds {low} to {high})"


def _ideal(run: Inspection) -> str:
    values, last = run.known("distance_from_ideal"), run.last("distance_from_ideal")
    if last is None:
        return (
            "Clients of this method end with models of their own: there is no one ideal update to compare with."
            if run.info.personalised
            else "Nothing has changed yet: there is no ideal update to compare with."
        )
    if max(values) < EXACT:
        return f"What clients receive is the ideal update to rounding ({max(values):.0e}): the rule is exact here."
    text = f"What clients receive is {percent(last)} away from the ideal update{_span(values, percent)}"
    cross = run.last("cross_terms")
    if run.info.exact and run.info.trains == "adapter":
        text += ": the rule is exact, but the server keeps less than the clients sent, or adds to what it had"
    elif cross is not None and abs(cross - last) <= 0.05 * last:
        text += ": the cross terms of averaged factors"
    return text + "."


def _innovation(run: Inspection) -> str:
    new, ideal = run.last("distance_from_innovation"), run.last("distance_from_ideal")
    if new is None or ideal is None or abs(new - ideal) < 0.01 * max(new, ideal, EXACT):
        return ""
    why = "what low-rank clients never saw is partly forgotten" if new > ideal else "the server adds innovations"
    return (
        f"It is {percent(new)} away from the server's old state plus what clients added to what they were sent: {why}."
    )


def _truncation(run: Inspection) -> str:
    losses, floors = run.last("readout_loss") or {}, run.last("truncation_loss") or {}
    ranks = [rank for rank in losses if losses[rank] is not None and floors.get(rank) is not None]
    if not ranks:
        return ""
    rank = max(ranks, key=lambda r: (losses[r], -int(r)))
    if losses[rank] < EXACT:
        return "Every client's rank holds all of it: no readout truncates."
    floor = floors[rank]
    if losses[rank] <= floor * 1.001 + EXACT:
        how = "the least that any adapter of that rank can lose (FlexLoRA's truncation loss)"
    else:
        how = f"the best adapter of that rank would be {percent(floor)} away (FlexLoRA's truncation loss)"
    return f"Truncation: a client of rank {rank} starts {percent(losses[rank])} away from the ideal update; {how}."


def _gauge(run: Inspection) -> str:
    values = run.known("gauge_sensitivity")
    if not values:
        return (
            "" if run.info.trains != "adapter" else "There is no gauge to choose: not both factors are free and shared."
        )
    if max(values) < EXACT:
        return (
            f"Re-factoring the clients' adapters would change the result by rounding alone ({max(values):.0e}): "
            "gauge-invariant (GLoRA, Proposition 2)."
        )
    return (
        f"Re-factoring the clients' adapters would change the result by {percent(values[-1])}{_span(values, percent)}: "
        "not gauge-invariant."
    )


def _cross(run: Inspection) -> str:
    last = run.last("cross_terms")
    if last is None:
        return ""
    if last < EXACT:
        return "Cross terms: with one factor the same everywhere, averaging factors loses nothing."
    return f"Cross terms: averaging A and B separately would lose {percent(last)} of these updates."


def _rows(run: Inspection) -> str:
    values, new = run.known("first_a_escape"), run.last("row_space_escape")
    if not values:
        return ""
    if max(values) < _CONFINED:
        return "The whole change stayed inside the row space of the first A in every round (FFA-LoRA's confinement)."
    text = f"{percent(values[-1])} of the change's energy lies outside the row space of the first A"
    return text + ("." if new is None else f", {percent(new)} outside that of the round before.")


def _ranks(run: Inspection) -> str:
    values = run.known("effective_rank")
    if not values:
        return ""
    at_least = "at least " if any(record["diagnostics"].get("effective_rank_is_bound") for record in run.rounds) else ""
    first, last = values[0], values[-1]
    if len(values) == 1:
        return f"The effective rank of the whole change is {at_least}{last:.1f}."
    trend = "grew" if last > 1.1 * first else "fell" if last < first / 1.1 else "stayed the same"
    adapter = run.info.trains == "adapter"
    meaning = {
        "grew": "new directions keep coming" if adapter else "averaged weights gather directions, 2410.23111",
        "fell": "energy gathers in fewer directions" + (": rank collapse, where ranks are mixed" if adapter else ""),
    }.get(trend)
    text = (
        f"The effective rank of the whole change {trend}: {at_least}{first:.1f} at first, {at_least}{last:.1f} at last"
    )
    return f"{text} ({meaning})." if meaning else f"{text}."


def _angles(run: Inspection) -> str:
    apart, consensus = run.last("angle_clients_mean"), run.last("angle_consensus")
    drift, most = run.last("drift_mean"), run.last("drift_max")
    parts = []
    if apart is not None:
        parts.append(f"clients' column spaces are {angle(apart)} apart on average")
    if consensus is not None:
        parts.append(f"{angle(consensus)} from the consensus")
    if drift is not None:
        parts.append(f"the consensus turned by {angle(drift)} in the last round (at most {angle(most)})")
    return f"Angles: {', '.join(parts)}." if parts else ""


def _worst(run: Inspection) -> str:
    found = (run.last("worst") or {}).get("distance_from_ideal")
    if not found or max(run.known("distance_from_ideal")) < EXACT:
        return ""
    return f"The module furthest from the ideal is {found['module']}, {percent(found['value'])}."
