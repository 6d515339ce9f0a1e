"""The CPU seconds of every process of a deployment in each round, with the SuperLink's database on disk and in memory.

    python benchmarks/flower/cpu.py [--rounds 8] [--sites 4] [--out benchmarks/flower/cpu.jsonl]

Each arm is one deployment of the embedded task, as `fedspan flower up` starts it. CPU time is read from
/proc, so that other work on the machine counts for little: only what processes do while they wait depends on it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedspan.config import load
from fedspan.flower import trial

FEDERATION = [
    "federation.participation=1.0",
    "evaluation.base=false",
    "evaluation.every=1000",
    # Little training, so that the rounds are of messages.
    "data.max_train=60",
    "data.max_test=10",
    "local.steps=1",
]
ARMS = {
    "glora": ["method.name=glora"],
    "glora_sums, secure sums": ["method.name=glora_sums", "privacy.secure_sums=true"],
}
KINDS = {
    "fedspan.flower.superlink": "SuperLink",
    "nginx": "proxy",
    "fedspan.flower.proxy": "proxy",
    "flwr-serverapp": "run",
    "fedspan.flower.node": "SuperNodes",
    "fedspan.flower.client_app_process": "executors",
    "fedspan.site.worker": "workers",
}
_TICKS = os.sysconf("SC_CLK_TCK")


def used(folder: Path) -> dict[str, float]:
    """Return the CPU seconds so far of the living processes in a folder, by their kind."""
    found: dict[str, float] = defaultdict(float)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if not Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        kind = next((KINDS[key] for key in KINDS if any(word.endswith(key) for word in words)), "other")
        found[kind] += (int(fields[11]) + int(fields[12])) / _TICKS
    return dict(found)


def peak(folder: Path) -> float:
    """Return the largest memory that the SuperLink in a folder has had, in MiB."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "fedspan.flower.superlink" in words and Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                text = (entry / "status").read_text()
                return round(int(text.partition("VmHWM:")[2].split()[0]) / 1024, 1)
        except OSError:
            continue
    return 0.0


def measure(arm: str, rounds: int, sites: int, in_memory: bool) -> dict[str, Any]:
    """Run one deployment; return the CPU seconds of each kind of process after each round."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "trial"
        own = [f"federation.rounds={rounds}", f"federation.num_clients={sites}"]
        trial.prepare(folder, [f"client-{k}" for k in range(sites)], load(overrides=[*FEDERATION, *ARMS[arm], *own]))
        after: list[dict[str, float]] = []

        def notify(line: str) -> None:
            if line.startswith("round "):
                after.append({"wall": time.monotonic(), **used(folder)})
            elif line.startswith("taking") and after:
                after[-1]["SuperLink's largest memory, MiB"] = peak(folder)

        trial.up(folder, notify, in_memory=in_memory)
    return {
        "arm": arm,
        "sites": sites,
        "database": "memory" if in_memory else "disk",
        "after": after,
        "load": os.getloadavg()[0],
    }


def row(line: dict[str, Any]) -> str:
    """Return the medians over the rounds after the first, in CPU seconds."""
    after = line["after"]
    steps = [{key: y.get(key, 0.0) - x.get(key, 0.0) for key in y} for x, y in itertools.pairwise(after)]
    kinds = ("SuperLink", "proxy", "run", "SuperNodes", "executors", "workers")
    cells = [f"{statistics.median(step.get(kind, 0.0) for step in steps):.2f} s" for kind in kinds]
    return f"| `{line['arm']}` | {line['database']} | {' | '.join(cells)} |"


def main() -> None:
    """Measure every arm with both databases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cpu.jsonl"))
    parser.add_argument("--sites", type=int, default=4)
    options = parser.parse_args()
    lines = [measure(arm, options.rounds, options.sites, in_memory) for arm in ARMS for in_memory in (False, True)]
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print("| | database | SuperLink | proxy | run | SuperNodes | executors | workers |")
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        print(row(line))


if __name__ == "__main__":
    main()
