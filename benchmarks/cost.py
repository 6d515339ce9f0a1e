"""Time a round of every arm of the committed suites: python benchmarks/cost.py [SUITE …]

Writes `cost.jsonl` beside each `runs.jsonl`: the CPU seconds of a round, of its clients and its server together, in one
process of one thread. The committed runs shared their processors with other work, so their own times compare nothing;
CPU seconds are disturbed far less. Each arm runs five rounds without evaluation and diagnostics, twice in turn with the
others; the median of the rounds after the first is taken, of the turn in which it is smaller. Arms that have a line
are left out, so an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import claims
import torch
from keep import final_runs, read

import fedspan
from fedspan.bench import machine as machines
from fedspan.comparison.plan import Planner
from fedspan.comparison.suite import read as read_suite
from fedspan.config import Config

HERE = Path(__file__).parent
FILE = "cost.jsonl"
ROUNDS, TURNS = 5, 2
Cell = tuple[str, str]
QUIET = {"evaluation.every": 1000, "evaluation.diagnostics": False, "engine.workers": 1}


class Enough(Exception):
    """Ends a run whose rounds have been timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", default=[*claims.SUITES], metavar="SUITE", help=", ".join(claims.SUITES))
    suites = parser.parse_args().suites
    if unknown := [suite for suite in suites if suite not in claims.SUITES]:
        parser.error(f"unknown suite {unknown[0]!r}: expected one of {', '.join(claims.SUITES)}")
    for suite in suites:
        measure(HERE / suite)


def measure(folder: Path) -> None:
    """Append a line for every arm and condition of a suite that has runs and no line."""
    planner = Planner(read_suite(folder / "suite.toml"), folder)
    done = {(line["condition"], line["arm"]) for line in read(folder / FILE)}
    runs = {(line["condition"], line["arm"]): line for line in final_runs(folder)}
    wanted = {cell: line for cell, line in runs.items() if cell not in done}
    if not wanted:
        return
    taken: dict[Cell, list[float]] = {cell: [] for cell in wanted}
    for turn in range(TURNS):
        for cell, line in wanted.items():
            config = planner.final(*cell, line["seed"], {**line["settings"], **QUIET}).config
            taken[cell].append(round_seconds(config))
            print(
                f"{folder.name} {'/'.join(cell)}: {taken[cell][-1]:.3f} s a round ({turn + 1} of {TURNS})", flush=True
            )
    machine = machines.measure(torch.device("cpu"), 1, quick=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        for (condition, arm), seconds in taken.items():
            figures = {"cpu_seconds_a_round": round(min(seconds), 4), "turns": [round(x, 4) for x in seconds]}
            where = {"cpu": machine.cpu, "gemm": round(machine.gemm), "torch": machine.torch}
            file.write(json.dumps({"condition": condition, "arm": arm, **figures, **where}) + "\n")


def round_seconds(config: Config) -> float:
    """Return the CPU seconds of one round."""
    times = []

    def at_round(event: fedspan.Event) -> None:
        if event.kind == "round":
            times.append(time.process_time())
            if len(times) == ROUNDS:
                raise Enough

    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        fedspan.run(config, Path(folder) / "run", at_round, quiet=True)
    return median(after - before for before, after in pairwise(times))


if __name__ == "__main__":
    main()
