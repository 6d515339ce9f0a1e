"""Measure what an audit finds of small federations, with and without example-level privacy: one JSON line per run.

    python benchmarks/audit/measure.py          # about fourteen minutes of one core; goes on where it stopped
    python benchmarks/audit/measure.py 1 2      # these seeds alone
    python benchmarks/audit/measure.py --table  # the table of docs/audit.md

Four clients, 200 training rows, twelve rounds of ten steps; z = 1 and C = 1 under privacy. FedFTG trains base weights,
for which there is no example-level privacy.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fedspan

RESULTS = Path(__file__).with_name("results.jsonl")
SEEDS = (0, 1, 2)
ARMS = (("glora", False), ("glora", True), ("ffa_lora", False), ("ffa_lora", True), ("fedftg", False))


def arms(seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every run, those of the first seed first."""
    for seed in seeds:
        for task in ("tasks", "digits"):
            for method, private in ARMS:
                yield {"task": task, "method": method, "example_dp": private, "seed": seed}


def measure(arm: dict[str, Any]) -> dict[str, Any]:
    """One run and its audit; messages are attacked for adapters and the first seed alone."""
    began = time.process_time()
    config: dict[str, Any] = {
        "seed": arm["seed"],
        "data": {"task": f"builtin:{arm['task']}", "max_train": 200},
        "method": {"name": arm["method"]},
        "federation": {"num_clients": 4, "participation": 1.0, "rounds": 12},
        "evaluation": {"local": False, "per_rank": False, "every": 12, "diagnostics": False},
        "engine": {"workers": 1},
    }
    if arm["example_dp"]:
        config["privacy"] = {"dp": "example", "noise_multiplier": 1.0, "clip": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        run = fedspan.run(config, Path(folder) / "run", quiet=True)
        found = fedspan.audit(run.out, messages=arm["seed"] == 0 and arm["method"] != "fedftg").as_json()
    whole = [attack for attack in found["membership"]["attacks"] if attack["site"] is None]
    metric = run.summary["metric"]
    return {
        **arm,
        "metric": metric,
        "value": run.summary["metrics"]["clients"][metric],
        "epsilon": run.summary.get("epsilon"),
        "attacks": whole,
        "control": found["membership"]["control"]["auc"],
        "messages": found["messages"],
        "verdicts": [one["verdict"] for one in found["findings"]],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The means over the seeds, the smallest and the largest in brackets."""
    rows = ["| task | rule | ε | metric | loss | calibrated loss | loss ratio | found at 1 % false | control |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    keys = dict.fromkeys((x["task"], x["method"], x["example_dp"]) for x in lines)
    for task, method, private in sorted(keys):
        own = [x for x in lines if (x["task"], x["method"], x["example_dp"]) == (task, method, private)]
        aucs = [_spread([x["attacks"][i]["auc"]["value"] for x in own]) for i in range(3)]
        best = [max(a["at_false_positives"][0]["tpr"]["value"] for a in x["attacks"]) for x in own]
        epsilon = f"{statistics.fmean(x['epsilon'] for x in own):.0f}" if private else "∞"
        value = f"{own[0]['metric']} {statistics.fmean(x['value'] for x in own):.2f}"
        cells = [task, method, epsilon, value, *aucs, f"{100 * statistics.fmean(best):.1f} %"]
        rows.append(f"| {' | '.join([*cells, _spread([x['control']['value'] for x in own])])} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    """Measure what is missing, or print the table."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if "--table" in sys.argv[1:]:
        print(table(lines))
        return
    done = [{key: line[key] for key in ("task", "method", "example_dp", "seed")} for line in lines]
    for arm in arms([int(x) for x in sys.argv[1:]] or SEEDS):
        if arm not in done:
            line = (json.dumps(measure(arm)) + "\n").encode()
            with RESULTS.open("ab", buffering=0) as file:  # whole lines, where several seeds are measured at once
                file.write(line)


if __name__ == "__main__":
    main()
