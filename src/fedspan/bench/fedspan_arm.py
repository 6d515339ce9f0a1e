"""The rounds suite's fedspan arm: `python -m fedspan.bench.fedspan_arm --spec SPEC.json --out OUT.json`.

It runs in a new process and does what a user's experiment does: data files, a configuration, `fedspan.run`, a PEFT
folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedspan.bench import tiny
from fedspan.config import Config, from_mapping


def configuration(spec: Mapping[str, Any], files: Sequence[Path], test: Path, engine: str, workers: int) -> Config:
    """Return the experiment as the library's settings."""
    return from_mapping(
        {
            "seed": spec["seed"],
            "device": "cpu",
            "model": {"name": spec["model"]},
            "adapter": {"alpha": spec["alpha"], "target_modules": spec["target_modules"]},
            "data": {
                "task": "files",
                "train": [str(path) for path in files],
                "test": [str(test)],
                "template": "{instruction}",
                "input_column": "",
            },
            "federation": {
                "num_clients": spec["num_clients"],
                "rounds": spec["rounds"],
                "participation": spec["participation"],
                "ranks": spec["rank"],
                "partition": "files",
            },
            "local": {
                "steps": spec["local_steps"],
                "batch_size": spec["batch_size"],
                "learning_rate": spec["learning_rate"],
                "weight_decay": spec["weight_decay"],
                "clip_norm": "none" if spec["clip_norm"] is None else spec["clip_norm"],
            },
            # The other arms measure nothing between the rounds.
            "evaluation": {
                "every": spec["rounds"],
                "base": False,
                "local": False,
                "diagnostics": False,
                "max_new_tokens": 1,
            },
            "engine": {"name": engine, "workers": workers},
            "method": {"name": "fedit"},
        }
    )


def write_data(path: Path, folder: Path) -> tuple[list[Path], Path]:
    """Write one JSONL file per client, and one example as test data; return their paths."""
    files = []
    with np.load(path, allow_pickle=False) as archive:
        for name in sorted(archive.files):
            files.append(_jsonl(folder / f"{name}.jsonl", archive[name]))
        test = _jsonl(folder / "test.jsonl", archive[sorted(archive.files)[0]][:1])
    return files, test


def _jsonl(path: Path, tokens: np.ndarray) -> Path:
    rows = [tiny.text(torch.from_numpy(row)) for row in tokens]
    lines = [json.dumps({"instruction": prompt, "output": answer}) + "\n" for prompt, answer in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def process_age() -> float:
    """Return the seconds since this process was started."""
    started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment and write OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    from fedspan.runs.events import Event
    from fedspan.runs.execution import run

    spec = json.loads(options.spec.read_text(encoding="utf-8"))
    ends: list[float] = []

    def on_event(event: Event) -> None:
        if event.kind == "round" or (event.kind == "phase" and event.data["phase"] == "federation"):
            ends.append(process_age())

    folder = Path(tempfile.mkdtemp(dir=options.out.parent))
    files, test = write_data(Path(spec["data"]), folder)
    result = run(configuration(spec, files, test, options.engine, options.workers), folder / "run", on_event)
    used = [resource.getrusage(target).ru_maxrss * 1024 for target in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    report = {
        "wall_seconds": process_age(),
        "startup_seconds": ends[0],
        "round_seconds": [after - before for before, after in pairwise(ends)],
        "final_adapter": str(result.adapter),
        "train_loss": [record["train_loss"] for record in result.history],
        # An upper bound: every worker counts as much as the largest.
        "peak_rss_bytes": used[0] + (options.workers * used[1] if options.workers > 1 else 0),
    }
    options.out.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
