"""Draw the suites' figures against their cost, from the committed runs: python benchmarks/curves.py

Writes `cost.png` beside each `runs.jsonl`: one row of panels per condition; on the left the figure against the MB
that a run has sent up and down, on the right against the CPU seconds of clients and server, mean over the seeds.
The seconds are those of `cost.py`, measured apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import claims
from cost import FILE as COSTS
from keep import Line, final_runs, read

from fedspan.comparison.results import mean

HERE = Path(__file__).parent
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
DASHES = ("-", "--", ":")
Point = tuple[float, float]


def main() -> None:
    for suite in claims.SUITES:
        if lines := final_runs(HERE / suite):
            costs = {(x["condition"], x["arm"]): x["cpu_seconds"] for x in read(HERE / suite / COSTS)}
            draw(lines, costs, HERE / suite / "cost.png", claims.SUITES[suite])
            print(HERE / suite / "cost.png")


def megabytes(line: Line) -> list[Point]:
    """Return the megabytes sent in both directions up to every evaluated round, and the figure there."""
    sent, points = 0.0, []
    for record in line["rounds"]:
        sent += (record["bytes_up"] + record["bytes_down"]) / 1e6
        if record.get("eval"):
            points.append((sent, record["eval"][line["metric"]]))
    return points


def seconds(line: Line, each: float) -> list[Point]:
    """Return the same by seconds, at that many for every round."""
    return [
        (record["round_num"] * each, record["eval"][line["metric"]]) for record in line["rounds"] if record.get("eval")
    ]


def averaged(lines: Sequence[Line], of: Callable[[Line], list[Point]]) -> list[Point]:
    """Return the mean over the seeds, evaluation by evaluation."""
    curves = [of(line) for line in lines]
    means = [(mean([x for x, _ in at]), mean([y for _, y in at])) for at in zip(*curves, strict=True)]
    return [(x, y) for x, y in means if x is not None and y is not None]


def draw(lines: Sequence[Line], costs: Mapping[tuple[str, str], float], path: Path, title: str) -> None:
    """Write one suite's picture; costs are seconds a round by condition and arm."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    conditions, arms = ([*dict.fromkeys(line[key] for line in lines)] for key in ("condition", "arm"))
    figure, axes = plt.subplots(
        len(conditions), 2, figsize=(9, 3.2 * len(conditions)), squeeze=False, sharey="row", layout="constrained"
    )
    drawn: dict[str, Any] = {}
    for condition, (left, right) in zip(conditions, axes, strict=True):
        for index, arm in enumerate(arms):
            own = [line for line in lines if (line["condition"], line["arm"]) == (condition, arm)]
            if not own:
                continue
            style = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS)], "linewidth": 1.4}
            drawn[arm] = left.plot(*zip(*averaged(own, megabytes), strict=True), **style)[0]
            if each := costs.get((condition, arm)):
                right.plot(*zip(*averaged(own, partial(seconds, each=each)), strict=True), **style)
        left.set_xscale("log")
        left.set_ylabel(lines[0]["metric"].replace("_", " "))
        left.set_xlabel("MB up and down, all clients")
        right.set_xlabel("CPU seconds, all clients and the server")
        left.set_title(claims.CONDITIONS.get(condition, condition), loc="left", fontsize=10)
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
