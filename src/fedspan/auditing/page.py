"""The dossier as one HTML page, which opens without a network and can be printed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from markupsafe import Markup

from fedspan.auditing import findings
from fedspan.auditing.bounds import Guarantee, empirical_epsilon
from fedspan.auditing.dossier import Dossier
from fedspan.auditing.figures import forest, roc
from fedspan.auditing.findings import interval, percent, times
from fedspan.auditing.membership import LIMITS, Attack
from fedspan.support.templating import environment, read

MARKER = b'<meta name="generator" content="fedspan audit">'
"""Stands in every dossier, by which one is known that may be replaced."""
_LONGEST = 2000  # characters of one text


def render(dossier: Dossier) -> str:
    """Return the whole page, which loads nothing from elsewhere."""
    found = dossier.membership
    shown = [*found.attacks, found.control]
    return (
        environment("fedspan.auditing", "dossier.html", _LONGEST)
        .get_template("dossier.html")
        .render(
            d=dossier,
            title=f"Privacy audit of {dossier.facts['folder']}",
            script_digest="",
            live=False,
            findings=dossier.findings,
            forest=forest(shown, dossier.guarantee),
            roc=roc(found.whole, dossier.guarantee),
            attacks=[_row(attack, dossier.guarantee) for attack in found.attacks],
            heads=_heads(dossier.guarantee),
            whole=found.whole,
            interval=interval,
            percent=percent,
            times=times,
            limits=findings.LIMITS_OF_AN_AUDIT,
            signs={"found": "!", "not found": "–", "not tried": "?"},
            style=Markup(_style()),
            marker=Markup(MARKER.decode()),
        )
    )


@cache
def _style() -> str:
    """Return the style sheet of the reports with a dossier's own."""
    return read("fedspan.reporting", "report.css") + read("fedspan.auditing", "dossier.css")


def _heads(guarantee: Guarantee | None) -> list[str]:
    found = ["rows", "attack", "members / others", "AUC"]
    for limit in LIMITS:
        found.append(f"found at {100 * limit:.0f} % false positives")
        if guarantee is not None:
            found.append("ε allows")
    return [*found, *([] if guarantee is None else ["ε at least"])]


def _row(attack: Attack, guarantee: Guarantee | None) -> Sequence[str]:
    """Return one attack as the cells of a table."""
    cells = [
        attack.site or "all",
        attack.name,
        f"{attack.num_members:,} / {attack.num_others:,}",
        interval(attack.auc, 3),
    ]
    for limit, point in zip(LIMITS, attack.points, strict=True):
        cells.append(f"needs {round(1 / limit)} non-members" if point is None else percent(point.tpr))
        if guarantee is not None:
            cells.append(f"{100 * guarantee.best_tpr(limit):.1f} %")
    if guarantee is not None:
        least = [empirical_epsilon(p, guarantee.delta) for p in attack.points if p is not None]
        cells.append(f"{max(least, default=0.0):.2f}")
    return cells
