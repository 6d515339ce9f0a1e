"""The overhead of a round of a deployed federation: four sites on loopback, with TLS, node keys and a proxy.

    python benchmarks/flower/overhead.py [--rounds 8] [--out benchmarks/flower/results.jsonl]

Each arm is one `fedspan flower up` of the embedded task. A line holds, for every round, the seconds of waiting for
answers, the busiest site's own work within them, summed over the round's exchanges, and the server's step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEDERATION = {
    "federation.num_clients": "4",
    "federation.participation": "1.0",
    "federation.ranks": "[2,4,8,16]",
    "evaluation.base": "false",
    "evaluation.every": "1000",
}
ARMS = {
    "glora": {"method.name": "glora"},
    "glora_sums, fixed point": {"method.name": "glora_sums", "privacy.fixed_point": "true"},
    "glora_sums, secure": {"method.name": "glora_sums", "privacy.secure_sums": "true"},
    "ffa_lora, secure": {"method.name": "ffa_lora", "privacy.secure_sums": "true"},
}


def main() -> None:
    """Run every arm and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.jsonl")
    options = parser.parse_args()
    lines = [measure(name, {**FEDERATION, **arm}, options.rounds) for name, arm in ARMS.items()]
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print("| | exchanges per round | round | at the sites | transfer and polling | server's step |")
    print("|---|---|---|---|---|---|")
    for line in lines:
        print(row(line))


def measure(name: str, settings: dict[str, str], rounds: int) -> dict[str, Any]:
    """Run one deployment; return its line of results."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedspan", "flower", "up", f"{folder}/trial", "--sites", "4", "--run", "one"]
        for key, value in {**settings, "federation.rounds": str(rounds)}.items():
            command += ["--set", f"{key}={value}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        records = (Path(folder) / "trial" / "server" / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
    kept = ("round_trips", "waited_seconds", "slowest_seconds", "server_seconds", "wire_up", "wire_down")
    rounds_kept = [{key: record[key] for key in kept} for record in map(json.loads, records)]
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()[0]}
    return {"arm": name, "rounds": rounds_kept, "machine": machine}


def row(line: dict[str, Any]) -> str:
    """Return a row of medians over the rounds after the first, in seconds."""
    rounds: list[dict[str, float]] = line["rounds"]

    def median(pick: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(pick, rounds[1:]))

    waited, slowest = median(lambda r: r["waited_seconds"]), median(lambda r: r["slowest_seconds"])
    transfer = median(lambda r: r["waited_seconds"] - r["slowest_seconds"])
    step = median(lambda r: r["server_seconds"])
    round_trips = "–".join(str(int(count)) for count in sorted({r["round_trips"] for r in rounds}))
    return (
        f"| {line['arm']} | {round_trips} | {waited + step:.2f} s | {slowest:.2f} s | {transfer:.2f} s | {step:.2f} s |"
    )


if __name__ == "__main__":
    main()
