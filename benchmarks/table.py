"""Make CLAIMS.md and the README's results from the committed runs: python benchmarks/table.py

Every figure comes from a line of a runs.jsonl; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import algebra
import claims
from keep import Line, final_runs, read

from fedspan.comparison.results import deviation
from fedspan.comparison.results import mean as mean_of
from fedspan.comparison.suite import read as read_suite
from fedspan.comparison.tuning import choice

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: made by benchmarks/table.py -->", "<!-- end of results -->"
RATE = "local.learning_rate"
PREFACE = """\
Made by `python benchmarks/table.py` from the committed `*/runs.jsonl`. Every rate is tuned per method and condition on
held-out training rows, with the same statistic and a grid of the same size; figure and margin were fixed in each
`suite.toml` before its first run. The figure of a run is the mean over its last evaluated rounds. The digits' seeds 5
to 9 were run later, in all rows at once, when the first five had left most of them open.

*Points* is the mean over the seeds of the paired differences ± half its 95 % interval (Student's t). **better** or
**worse**: the interval excludes 0. **equivalent**: it lies within ± 1 point. *open*: neither. One that excludes 0
within ± 1 point counts as better or worse. One in twenty intervals
misses the truth, so with this many rows a few verdicts are wrong; *stands* marks those that hold after Holm's
correction for all rows of the page. CPU seconds of a round are those of its clients and its server together, each arm
timed by itself (`cost.py`).

The digits (a vision transformer of 0.5 M parameters) and the tasks (a decoder of 0.6 M) are the bases and data that
come with the package: real scans and synthetic instructions, both small. MedQuAD is real text on a pretrained encoder,
MiniLM of 22.7 M parameters, for a few hundred steps of each client. They can support or contradict a claim here; they
cannot settle it for large models. One seed tuned each arm there, in half the rounds, and it can choose badly: between
the nine institutes GLoRA was given three times FlexLoRA's rate, at which it falls apart after those rounds and ends 28
points below it; at the same rate (added when that was seen) it ends 1 ± 6 below. *Published* is the difference that
the source reports, on its own data and base."""

CUT = """\
* FedSVD's and RoLoRA's protocols in their own length and on GLUE (`fedsvd`, `rolora`: 3,000 and 15,000 steps a run of a
  tenth of a second or more on one core), and FedFTG's on a language model (`ftg`: SmolLM2, Dolly, seconds a step).
* `claims-superni` and `claims-mri`: Super-NaturalInstructions and brain MRI, on bases of a few million parameters.
* Ranks drawn from a normal or a uniform distribution; sparse participation on MiniLM.
* Example-level privacy: at FedSVD's clip and noise nothing is learnt on the embedded bases ([README.md](README.md))."""
"""Questions of the suites that no committed run answers."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Return every page that is made from the committed runs."""
    rows = claims.rows()
    readme = HERE.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    return {
        HERE / "CLAIMS.md": page(rows) + "\n",
        readme: before + BEGIN + "\n" + headlines(rows) + END + rest.partition(END)[2],
    }


def page(rows: Sequence[claims.Row]) -> str:
    """Return CLAIMS.md."""
    lines = {suite: found for suite in claims.SUITES if (found := final_runs(HERE / suite))}
    parts = ["# The papers' claims, rerun", "", PREFACE, "", "## In short", "", claims.decided(rows), ""]
    parts += [*claims.summary(rows), "", "## Every row", "", *claims.table(rows), "", "## Why", ""]
    parts += [
        "Diagnostics of the decided differences, arm / rival, from the first kept round → the last, mean over the"
    ]
    parts += ["seeds ([docs/diagnostics.md](../docs/diagnostics.md)); methods that train full weights have none.", ""]
    parts += [*algebra.reasons(rows, lines), "", "## Claims about the algebra", "", *algebra.measured(lines)]
    parts += ["", "## What was cut", "", "Whole rows, for want of time, never seeds or tuning:", "", CUT]
    parts += ["", "## The underlying figures", ""]
    for suite in lines:
        parts += [f"### {claims.SUITES[suite]} (`{suite}`)", "", *figures(suite), ""]
        for name, what in (("traffic", "the traffic"), ("seconds", "the CPU seconds")):
            if (HERE / suite / f"{name}.png").exists():
                parts += [f"![{claims.SUITES[suite]}: the figure against {what}]({suite}/{name}.png)", ""]
    return "\n".join(parts).rstrip()


def headlines(rows: Sequence[claims.Row]) -> str:
    """Return the README's table: the decided rows that stand after the correction, largest difference first."""
    kept = [row for row in rows if row.verdict == row.found.verdict != "open"]
    kept.sort(key=lambda row: -abs(row.found.pairs.mean or 0.0))
    table = ["| | compared with | on | points | verdict |", "|" + " --- |" * 5]
    for row in kept:
        points, verdict, *_ = claims.judgement(row)
        where = f"{claims.SUITES[row.suite]}, {claims.CONDITIONS[row.condition]}"
        kind = {"figure": "", "unseen": " (unseen tasks)", "same traffic": " (same traffic)"}.get(row.claim.kind, "")
        table.append(f"| `{row.claim.arm}` | `{row.claim.rival}`{kind} | {where} | {points} | {verdict} |")
    return "\n".join([claims.decided(rows) + " Those that stand:", "", *table, ""])


def figures(suite: str) -> list[str]:
    """Return a suite's table: for every condition and arm the tuned rate, the figure, the traffic and the time."""
    lines, about = read(HERE / suite / "runs.jsonl"), read_suite(HERE / suite / "suite.toml")
    final = final_runs(HERE / suite)
    unseen = any(x["unseen"] is not None for x in final)
    head = ["condition", "arm", "learning rate", final[0]["metric"], *(["unseen"] if unseen else [])]
    head += ["seeds", "MB up", "MB down", "CPU s a round"]
    timed = {(x["condition"], x["arm"]): x["cpu_seconds_a_round"] for x in read(HERE / suite / "cost.jsonl")}
    table = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for condition in dict.fromkeys(x["condition"] for x in final):
        here = [x for x in final if x["condition"] == condition]
        base = mean_of([x["base"] for x in here if x["base"] is not None])
        blank = [""] * (len(head) - 4)
        table.append(f"| {condition} | untouched base | | {number(base)} | " + " | ".join(blank) + " |")
        order = sorted({x["arm"] for x in here}, key=lambda arm: (-(level(here, arm, about.figure) or 0.0), arm))
        for arm in order:
            tried = [x for x in lines if (x["stage"], x["condition"], x["arm"]) == ("tune", condition, arm)]
            own = [*cells(arm, here, tried, about.figure, unseen), seconds(timed.get((condition, arm)))]
            table.append("| " + " | ".join([condition, *own]) + " |")
    return [*table, "", "Mean ± standard deviation over the seeds. \\* The best rate is at the edge of those tried."]


def level(lines: Sequence[Line], arm: str, figure: str) -> float | None:
    """Return an arm's mean figure."""
    return mean_of(known([x["figures"][figure] for x in lines if x["arm"] == arm]))


def cells(arm: str, lines: Sequence[Line], tried: Sequence[Line], figure: str, unseen: bool) -> list[str]:
    """Return an arm's row."""
    runs = [x for x in lines if x["arm"] == arm]
    row = [
        f"`{arm}`",
        f"{runs[0]['settings'][RATE]:g}{edge(tried, figure)}",
        spread([x["figures"][figure] for x in runs]),
    ]
    row += [spread([x["unseen"] for x in runs])] if unseen else []
    row += [str(len(runs))]
    return row + [f"{(mean_of([x[key] for x in runs]) or 0.0) / 1e6:.1f}" for key in ("bytes_up", "bytes_down")]


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that are there."""
    return [value for value in values if value is not None]


def seconds(value: float | None) -> str:
    """Return a time with two digits; a dash where there is none."""
    return "–" if value is None else f"{value:.2g}"


def number(value: float | None) -> str:
    """Return a figure with three decimals."""
    return "–" if value is None else f"{value:.3f}"


def spread(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation; the number of runs that diverged, if any did."""
    there = known(values)
    spread = "" if len(there) < 2 else f" ± {deviation(there):.3f}"
    lost = "" if len(there) == len(values) else f" ({len(values) - len(there)} diverged)"
    return number(mean_of(there)) + spread + lost


def edge(tried: Sequence[Line], figure: str) -> str:
    """Return a star where the best rate is the smallest or largest of those tried."""
    if not tried:
        return ""
    found, higher = [line["figures"][figure] for line in tried], tried[0]["higher_is_better"]
    scores = [-float("inf") if x is None else x if higher else -x for x in found]
    return "\\*" if choice([line["settings"] for line in tried], scores).at_edge else ""


if __name__ == "__main__":
    main()
