"""Ten seeds of the embedded default: in one pass, one after the other in one process, and as commands of their own.

    python benchmarks/speed/many.py [--seeds 10] [--arms many loop commands] [--set KEY=VALUE …] >> many.jsonl

One JSON line per arm: wall seconds, and CPU seconds of the process and its children, which other work on the machine
disturbs less. Every arm is a process of its own, so that each pays for its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CODE = {
    "many": "fedspan.run_many(configs, outs)",
    "loop": "[fedspan.run(c, o) for c, o in zip(configs, outs)]",
}


def _program(arm: str, seeds: int, folder: str, settings: list[str]) -> str:
    return (
        "import fedspan\n"
        "from fedspan.config import load\n"
        f"configs = [load(None, [*{settings!r}, f'seed={{k}}']) for k in range({seeds})]\n"
        f"outs = [{folder!r} + f'/{{k}}' for k in range({seeds})]\n"
        f"{_CODE[arm]}\n"
    )


def _commands(arm: str, seeds: int, folder: str, settings: list[str]) -> list[list[str]]:
    """Return the processes of an arm, which run one after the other."""
    if arm != "commands":
        return [[sys.executable, "-c", _program(arm, seeds, folder, settings)]]
    options = [part for setting in settings for part in ("--set", setting)]
    one = [sys.executable, "-m", "fedspan", "run", *options]
    return [[*one, "--set", f"seed={k}", "--out", f"{folder}/{k}"] for k in range(seeds)]


def _used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def main() -> None:
    """Time the arms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--arms", nargs="+", default=["many", "loop", "commands"])
    parser.add_argument("--set", nargs="*", default=[])
    given = parser.parse_args()
    for arm in given.arms:
        with tempfile.TemporaryDirectory() as folder:
            began, used = time.perf_counter(), _used()
            for command in _commands(arm, given.seeds, folder, given.set):
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
            wall, cpu = time.perf_counter() - began, _used() - used
            servers = [json.loads(p.read_text())["server"] for p in sorted(Path(folder).glob("*/summary.json"))]
        line = {"arm": arm, "seeds": given.seeds, "set": given.set, "wall": wall, "cpu": cpu}
        line["load"] = os.getloadavg()[0]
        line["server"] = servers
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
