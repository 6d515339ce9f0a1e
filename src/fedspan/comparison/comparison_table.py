"""A comparison as a page of Markdown: one table for each condition, and what its columns mean."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from fedspan.comparison.plan import describe
from fedspan.comparison.suite import POINT

Content = Mapping[str, Any]
_FIGURES = {
    "last": "what the clients end with, each at its own rank, on all test rows (mean over the clients)",
    "best": "the server's state in its best evaluated round, which the test rows have chosen",
    "mean_last": "the server's state, mean of the last {last_rounds} evaluated rounds",
}
_FEW = 5


def page(found: Content) -> str:
    """Return the page of a comparison, from the content of `comparison.json`."""
    lines = [f"# {found['name']}", "", *_head(found)]
    for condition in found["conditions"]:
        lines += ["", f"## {condition}", "", *_table(found, condition)]
    return "\n".join([*lines, "", *_legend(found)]) + "\n"


def _head(found: Content) -> Iterator[str]:
    direction = "higher" if found["higher_is_better"] else "lower"
    rows = sorted({cell["rows"] for cell in found["cells"]})
    figure = _FIGURES[found["figure"]].format(last_rounds=found["last_rounds"])
    yield f"{found['metric']} ({direction} is better): {figure}."
    seeds = "1 seed" if len(found["seeds"]) == 1 else f"{len(found['seeds'])} seeds"
    yield f"{seeds}; {' or '.join(map(str, rows))} test rows, the same for every seed."


def _table(found: Content, condition: str) -> Iterator[str]:
    titles = ["arm", found["metric"], f"difference to {found['baseline']}", "p", "verdict", "seeds for a point"]
    titles += ["MB up", "MB down", "chosen"]
    yield _row(titles)
    yield _row(["---", *["---:"] * 3, "---", *["---:"] * 3, "---"])
    for base in found["base"]:
        if base["condition"] == condition and base["mean"] is not None:
            yield _row(["untouched base", _number(base["mean"]), *["–"] * 7])
    judged = {one["arm"]: one for one in found["differences"] if one["condition"] == condition}
    for cell in found["cells"]:
        if cell["condition"] == condition:
            yield _row([cell["arm"], _spread(cell), *_judgement(judged.get(cell["arm"])), *_costs(cell)])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(cell: Content) -> str:
    """Return `mean ± deviation`, and the number of runs that diverged."""
    spread = "" if cell["std"] is None else f" ± {cell['std']:.3f}"
    diverged = f" ({cell['diverged']} diverged)" if cell["diverged"] else ""
    return f"{_number(cell['mean'])}{spread}{diverged}"


def _judgement(one: Content | None) -> list[str]:
    if one is None:
        return ["–", "–", "baseline", "–"]
    between = "" if one["low"] is None else f" [{one['low']:+.3f}, {one['high']:+.3f}]"
    mean = "–" if one["mean"] is None else f"{one['mean']:+.3f}{between}"
    verdict = one["verdict"] + (f", {one['size']}" if one["size"] else "")
    seeds = "–" if one["seeds_for_a_point"] is None else f"{one['seeds_for_a_point']:,}"
    return [mean, _p(one["p_adjusted"]), verdict, seeds]


def _costs(cell: Content) -> list[str]:
    megabytes = [f"{cell[key] / 1e6:.2f}" for key in ("bytes_up", "bytes_down")]
    return [*megabytes, describe(cell["settings"]) + (" *" if cell["at_edge"] else "")]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _legend(found: Content) -> Iterator[str]:
    """Yield what the columns mean, in paragraphs."""
    percent, margin = f"{100 * found['confidence']:g} %", f"±{found['margin'] / POINT:g} points"
    count, level = len(found["differences"]), f"{1 - found['confidence']:.2g}"
    family = "one difference" if count == 1 else f"all {count} differences"
    yield from _wrapped(
        f"± is the standard deviation over the seeds. Differences are paired by seed, with {percent} intervals "
        f"(Student's t). p is of the paired t-test, by Holm's correction for {family}. *better* and "
        f"*worse*: p below {level}; *beyond the margin* where the corrected interval lies outside {margin}, *within "
        f"the margin* where it lies inside, *about the margin* otherwise. *equivalent*: within {margin} at {percent} "
        "confidence (two one-sided tests, corrected likewise). *open*: more seeds are needed. *Seeds for a point*: "
        "the number that would show a difference of 0.01 with probability 0.8. All "
        "intervals are for these test rows: other rows of the same kind would move every arm."
    )
    if any(cell["at_edge"] for cell in found["cells"]):
        yield from ("", "\\* The best value is at the edge of those that were tried: a better one may lie beyond.")
    if len(found["seeds"]) < _FEW:
        yield ""
        yield f"Fewer than {_FEW} seeds: the deviation itself is hardly known, and most differences stay open."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
