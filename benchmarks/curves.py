"""Draw the suites' figures against what they cost, from the committed runs: python benchmarks/curves.py

Writes two pictures beside each `runs.jsonl`, for every condition and as means over the seeds: the figure against the
megabytes that a run has sent up and down until then (`traffic.png`), and, where `cost.py` has timed the arms
(`cost.jsonl`), against the CPU seconds of its clients and its server (`seconds.png`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims
from keep import Line, final_runs, read

from fedspan.comparison.results import mean

HERE = Path(__file__).parent
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
DASHES = ("-", "--", ":")
SECONDS = "CPU seconds of clients and server"
Point = tuple[float, float]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for suite in claims.SUITES:
        lines, folder = final_runs(HERE / suite), HERE / suite
        timed = read(folder / "cost.jsonl")
        seconds = {(line["condition"], line["arm"]): line["cpu_seconds_a_round"] for line in timed}
        for cost in (Cost("traffic", "MB up and down, all clients", megabytes), Cost("seconds", SECONDS, cpu(seconds))):
            known = [line for line in lines if cost.name == "traffic" or (line["condition"], line["arm"]) in seconds]
            if known:
                draw(known, cost, folder / f"{cost.name}.png", claims.SUITES[suite])
                print(folder / f"{cost.name}.png")


@dataclass(frozen=True)
class Cost:
    """One thing that a run spends."""

    name: str
    label: str
    of_a_round: Callable[[Line, Line], float]
    """Of a run's line and one of its rounds."""


def megabytes(line: Line, record: Line) -> float:
    return (record["bytes_up"] + record["bytes_down"]) / 1e6


def cpu(seconds: Mapping[tuple[str, str], float]) -> Callable[[Line, Line], float]:
    """Return the CPU seconds of a round, the same for each of an arm's rounds."""
    return lambda line, record: seconds[line["condition"], line["arm"]]


def curve(line: Line, cost: Cost) -> list[Point]:
    """Return what was spent up to every evaluated round, and the figure there."""
    spent, points = 0.0, []
    for record in line["rounds"]:
        spent += cost.of_a_round(line, record)
        if record.get("eval"):
            points.append((spent, record["eval"][line["metric"]]))
    return points


def averaged(lines: Sequence[Line], cost: Cost) -> list[Point]:
    """Return the mean over the seeds, evaluation by evaluation."""
    curves = [curve(line, cost) for line in lines]
    means = [(mean([x for x, _ in at]), mean([y for _, y in at])) for at in zip(*curves, strict=True)]
    return [(x, y) for x, y in means if x is not None and y is not None]


def draw(lines: Sequence[Line], cost: Cost, path: Path, title: str) -> None:
    """Write one suite's picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

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
                drawn[arm] = panel.plot(*zip(*averaged(own, cost), strict=True), linewidth=1.4, **style)[0]
        if cost.name == "traffic":  # which differs by orders of magnitude
            panel.set_xscale("log")
            # Plain numbers, at few places: a panel may cover less than a power of ten.
            low, high = panel.get_xlim()
            panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
            panel.xaxis.set_major_formatter(ticker.ScalarFormatter())
            panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_xlabel(cost.label)
        panel.set_title(claims.CONDITIONS.get(condition, condition), loc="left", fontsize=10)
    axes[0][0].set_ylabel(lines[0]["metric"].replace("_", " "))
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
