"""Draw the suites' figures against their traffic, from the committed runs: python benchmarks/curves.py

Writes `traffic.png` beside each `runs.jsonl`: for every condition the figure against the megabytes that a run has sent
up and down until then, mean over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
from keep import Line, final_runs

from fedspan.comparison.results import mean

HERE = Path(__file__).parent
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
DASHES = ("-", "--", ":")
Point = tuple[float, float]


def main() -> None:
    for suite in claims.SUITES:
        if lines := final_runs(HERE / suite):
            draw(lines, HERE / suite / "traffic.png", claims.SUITES[suite])
            print(HERE / suite / "traffic.png")


def megabytes(line: Line) -> list[Point]:
    """Return the megabytes sent in both directions up to every evaluated round, and the figure there."""
    sent, points = 0.0, []
    for record in line["rounds"]:
        sent += (record["bytes_up"] + record["bytes_down"]) / 1e6
        if record.get("eval"):
            points.append((sent, record["eval"][line["metric"]]))
    return points


def averaged(lines: Sequence[Line]) -> list[Point]:
    """Return the mean over the seeds, evaluation by evaluation."""
    curves = [megabytes(line) for line in lines]
    means = [(mean([x for x, _ in at]), mean([y for _, y in at])) for at in zip(*curves, strict=True)]
    return [(x, y) for x, y in means if x is not None and y is not None]


def draw(lines: Sequence[Line], path: Path, title: str) -> None:
    """Write one suite's picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    conditions, arms = ([*dict.fromkeys(line[key] for line in lines)] for key in ("condition", "arm"))
    figure, axes = plt.subplots(
        1, len(conditions), figsize=(4.2 * len(conditions), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    drawn: dict[str, Any] = {}
    for condition, panel in zip(conditions, axes[0], strict=True):
        for index, arm in enumerate(arms):
            own = [line for line in lines if (line["condition"], line["arm"]) == (condition, arm)]
            if own:
                style = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS)]}
                drawn[arm] = panel.plot(*zip(*averaged(own), strict=True), linewidth=1.4, **style)[0]
        panel.set_xscale("log")
        panel.set_xlabel("MB up and down, all clients")
        panel.set_title(claims.CONDITIONS.get(condition, condition), loc="left", fontsize=10)
    axes[0][0].set_ylabel(lines[0]["metric"].replace("_", " "))
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
