"""Run a benchmark suite: tune each arm's learning rate on validation data, then run every seed on the test data.

    python benchmarks/run.py benchmarks/sst2 --data ../shared/data [--shard 0/2]

Every run is one line of SUITE/results.jsonl; runs that are there already are not repeated, and an interrupted run is
resumed from its checkpoint. Shards split the arms, so that two processes can share the work. A suite may have
conditions, each a change of its configuration: every arm then runs under each of them, with a rate tuned there or,
where the suite names a `tune_condition`, in that one alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import time
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

KEPT = (
    "round_num",
    "train_loss",
    "eval",
    "truncation_error",
    "optimizer_bytes",
)
"""The fields that a line keeps of every round's record, besides the diagnostics without their worst modules."""
WIDEN = 1
"""The number of times that a grid is widened by one step when its best rate is at the edge."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder that replaces {data} in the suite")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"), help="run folders; not committed")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th arm, starting at the i-th")
    parser.add_argument("--arms", default="", help="only these arms, comma-separated")
    parser.add_argument("--conditions", default="", help="only these conditions, comma-separated")
    parser.add_argument("--workers", default="auto", help="processes of one run, which change no figure")
    parser.add_argument("--seeds", default="", help="only these seeds of the suite's, comma-separated")
    arguments = parser.parse_args()
    text = (arguments.suite / "suite.toml").read_text()
    text = text.replace("{data}", str(arguments.data)).replace("{work}", str(arguments.work))
    suite = tomllib.loads(text)
    # Recorded when the code is loaded, not when a line is written: the checkout may change while a long suite runs.
    loaded = revision()
    import_module("fedspan.runs.execution")
    index, count = map(int, arguments.shard.split("/"))
    arms = [arm for k, arm in enumerate(suite["arm"]) if k % count == index]
    wanted = set(filter(None, arguments.arms.split(",")))
    seeds = [int(seed) for seed in filter(None, arguments.seeds.split(","))] or suite["seeds"]
    conditions = set(filter(None, arguments.conditions.split(",")))
    for condition in suite.get("condition", [{}]):
        if conditions and condition["name"] not in conditions:
            continue
        for arm in arms:
            if (not wanted or arm["name"] in wanted) and condition.get("name") not in arm.get("except", ()):
                workers = arguments.workers if arguments.workers == "auto" else int(arguments.workers)
                Arm(arguments.suite, arguments.work, suite, arm, loaded, condition, workers).run(seeds)


class Arm:
    """One method with its options in one suite, under one of its conditions."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        suite: dict[str, Any],
        arm: dict[str, Any],
        loaded: str,
        condition: dict[str, Any],
        workers: int | str,
    ) -> None:
        self.workers = workers
        self.results = folder / "results.jsonl"
        self.work = work / folder.name
        self.suite, self.arm, self.loaded, self.condition = suite, arm, loaded, condition

    def run(self, seeds: list[int]) -> None:
        rates = sorted(self.arm["learning_rates"])
        # A single rate is a given one.
        scores = {rate: self.tune(rate) if len(rates) > 1 else 0.0 for rate in rates}
        ratio = rates[-1] / rates[-2] if len(rates) > 1 else 1.0
        for _ in range(WIDEN if len(rates) > 1 else 0):
            best = max(scores, key=scores.__getitem__)
            if best not in (min(scores), max(scores)):
                break
            rate = float(f"{best * ratio if best == max(scores) else best / ratio:.2g}")
            scores[rate] = self.tune(rate)
        best = max(scores, key=scores.__getitem__)
        for seed in seeds:
            self.one("test", best, seed, self.condition, {})

    def tune(self, rate: float) -> float:
        """Return the validation score at this rate; larger is better."""
        at = self.suite.get("tune_condition", self.condition.get("name"))
        condition = next(x for x in self.suite.get("condition", [{}]) if x.get("name") == at)
        line = self.one("tune", rate, self.suite["tune_seed"], condition, self.suite.get("tune", {}))
        summary = line["summary"]
        by_loss = self.suite.get("tune_by") == "loss"
        figure = summary["metrics"]["clients"]["loss"] if by_loss else summary["federated"]
        if figure is None:
            return -math.inf  # the run diverged
        return float(figure if summary["higher_is_better"] and not by_loss else -figure)

    def one(
        self, purpose: str, rate: float, seed: int, condition: dict[str, Any], changes: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the line of one run from the results, or run it."""
        from fedspan import config as settings
        from fedspan.runs.execution import resume, run

        tree = merged(merged(self.suite["config"], condition.get("config", {})), changes)
        tree = merged(tree, self.arm.get("config", {}))
        tree = merged(tree, {"seed": seed, "local": {"learning_rate": rate}, "method": self.arm["method"]})
        digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
        for line in read(self.results):
            if line["config_hash"] == digest and line["arm"] == self.arm["name"]:
                return line
        out = self.work / f"{self.arm['name']}-{condition.get('name', 'only')}-{purpose}-{rate:g}-{seed}-{digest}"
        began = time.perf_counter()
        if (out / "config.toml").exists():
            result = resume(out)
        else:
            shutil.rmtree(out, ignore_errors=True)
            # The number of workers changes no figure, so it is not part of the hashed settings.
            result = run(settings.from_mapping(merged(tree, {"engine": {"workers": self.workers}})), out)
        line = {
            "suite": self.results.parent.name,
            "arm": self.arm["name"],
            "condition": condition.get("name"),
            "purpose": purpose,
            "learning_rate": rate,
            "seed": seed,
            "config_hash": digest,
            "revision": self.loaded,
            "wall_seconds": round(time.perf_counter() - began, 1),
            "summary": result.summary,
            "rounds": [brief(record) for record in result.history],
        }
        with self.results.open("ab", buffering=0) as file:  # one call, so that shards cannot cut into each other
            file.write((json.dumps(line) + "\n").encode())
        print(self.arm["name"], purpose, rate, seed, result.summary["federated"], line["wall_seconds"], flush=True)
        return line


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """Return the kept fields of a round's record, diagnostics with four digits."""
    kept = {k: record[k] for k in KEPT if k in record}
    figures = {k: digits(v) for k, v in (record.get("diagnostics") or {}).items() if k != "worst"}
    return {**kept, "diagnostics": figures} if figures else kept


def digits(value: Any) -> Any:
    """Round numbers to four significant digits, in mappings too."""
    if isinstance(value, dict):
        return {k: digits(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def read(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def merged(x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    """Return x updated with y, section by section."""
    out = dict(x)
    for key, value in y.items():
        out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) and key != "method" else value
    return out


def revision() -> str:
    """Return the checked-out commit, marked `-dirty` when tracked files other than results differ from it."""
    words = ["git", "describe", "--always", "--exclude=*"]
    commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    words = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/*/results.jsonl"]
    changed = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return f"{commit}-dirty" if changed else commit


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
