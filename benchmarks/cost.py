"""Time the clients' work of every arm, for the curves against seconds: python benchmarks/cost.py claims-tasks

Runs each arm that has committed runs once, seed 0, three rounds, and writes `cost.jsonl` beside them: the seconds that
its clients trained, per round. Use a machine with nothing else to do; the committed runs themselves shared theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from keep import final_runs

import fedspan
from fedspan.comparison.plan import Planner
from fedspan.comparison.suite import read

HERE = Path(__file__).parent
FILE = "cost.jsonl"
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", help="a folder beside this file with a suite.toml and a runs.jsonl")
    folder = HERE / parser.parse_args().suite
    planner = Planner(read(folder / "suite.toml"), folder)
    first = {(line["condition"], line["arm"]): line for line in final_runs(folder) if line["seed"] == 0}
    lines = []
    for (condition, arm), line in first.items():
        config = planner.final(condition, arm, 0, line["settings"]).config
        config = dataclasses.replace(config, federation=config.federation.model_copy(update={"rounds": ROUNDS}))
        with tempfile.TemporaryDirectory() as place:
            totals = fedspan.run(config, Path(place) / "run").summary["totals"]
        lines.append({"condition": condition, "arm": arm, "client_seconds": totals["client_seconds"] / ROUNDS})
        print(lines[-1], flush=True)
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
