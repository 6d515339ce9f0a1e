"""Time the rounds of every arm, for the curves against seconds: python benchmarks/cost.py claims-tasks

Runs each arm that has committed runs once, seed 0, and writes `cost.jsonl` beside them: the CPU seconds of a round,
clients and server, without evaluation, in one process of one thread. Two rounds are subtracted from five, so that
reading the base and the data does not count. The committed runs shared their machine, and CPU seconds suffer less from
that than wall time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from keep import final_runs

import fedspan
from fedspan.comparison.plan import Planner
from fedspan.comparison.suite import read
from fedspan.config import Config

HERE = Path(__file__).parent
FILE = "cost.jsonl"
FEW, MANY = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", help="a folder beside this file with a suite.toml and a runs.jsonl")
    folder = HERE / parser.parse_args().suite
    planner = Planner(read(folder / "suite.toml"), folder)
    first = {(line["condition"], line["arm"]): line for line in final_runs(folder) if line["seed"] == 0}
    lines = []
    for (condition, arm), line in first.items():
        config = planner.final(condition, arm, 0, line["settings"]).config
        few, many = (cpu_seconds(config, rounds) for rounds in (FEW, MANY))
        lines.append({"condition": condition, "arm": arm, "cpu_seconds": (many - few) / (MANY - FEW)})
        print(lines[-1], flush=True)
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def cpu_seconds(config: Config, rounds: int) -> float:
    """Return the CPU seconds of a run of so many rounds."""
    changes = {
        "federation": config.federation.model_copy(update={"rounds": rounds}),
        "evaluation": config.evaluation.model_copy(update={"every": rounds + 1, "diagnostics": False}),
        "engine": config.engine.model_copy(update={"workers": 1}),
    }
    with tempfile.TemporaryDirectory() as place:
        began = time.process_time()
        fedspan.run(config.model_copy(update=changes), Path(place) / "run")
        return time.process_time() - began


if __name__ == "__main__":
    main()
