"""The dossier of a real adapter: MiniLM with FFA-LoRA on sentences of SST-2, with and without example-level privacy.

    python benchmarks/audit/minilm.py BASE DATA [FOLDER]

BASE is MiniLM's folder (`recipes/real_bases.py`), DATA the folder with `glue/sst2/train.jsonl.gz`. Two sites have 100
sentences each, and six canaries are planted at the first, 1, 5, 20, 1, 5 and 20 times. Six rounds of 15 steps. The
dossiers are written into FOLDER (runs/minilm), and one line for each arm into minilm.jsonl. About six minutes of one
core.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import fedspan

RESULTS = Path(__file__).with_name("minilm.jsonl")
SITES, ROWS, OTHERS = ("site-a", "site-b"), 100, 300
FEWEST_WORDS = 8
ARMS: dict[str, dict[str, Any]] = {
    "no noise": {},
    "example-level privacy": {"dp": "example", "noise_multiplier": 1.0, "clip": 1.0},
}


def prepare(data: Path, folder: Path) -> dict[str, Path]:
    """Write the sites' rows, with canaries at the first, and comparable rows that nobody trains on."""
    with gzip.open(data / "glue/sst2/train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    whole = [row for row in rows if len(row["sentence"].split()) >= FEWEST_WORDS]
    random.Random(0).shuffle(whole)
    folder.mkdir(parents=True)
    paths = {name: folder / f"{name}.jsonl" for name in (*SITES, "others")}
    for name, count in zip(paths, (ROWS, ROWS, OTHERS), strict=True):
        own, whole = whole[:count], whole[count:]
        lines = [json.dumps({"text": row["sentence"].strip(), "label": row["label"]}) for row in own]
        paths[name].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    planted, key = folder / "planted" / f"{SITES[0]}.jsonl", folder / "canaries.key.json"
    planted.parent.mkdir()
    fedspan.plant_canaries([paths[SITES[0]]], planted, key, count=6, repeats=(1, 5, 20), seed=0)
    return {**paths, SITES[0]: planted, "key": key}


def measure(arm: str, base: Path, paths: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Train and audit one arm, and write its dossier."""
    from fedspan.auditing import files

    began = time.process_time()
    config: dict[str, Any] = {
        "model": {"name": str(base)},
        "data": {
            "task": "files",
            "train": [str(paths[name]) for name in SITES],
            "test": [str(paths["others"])],
            "max_length": 48,
        },
        "method": {"name": "ffa_lora"},
        "federation": {"num_clients": 2, "partition": "files", "participation": 1.0, "rounds": 6, "ranks": 8},
        "local": {"steps": 15, "batch_size": 16, "learning_rate": 3e-3},
        "evaluation": {"local": False, "per_rank": False, "every": 6, "diagnostics": False},
        "engine": {"workers": 1},
        "privacy": ARMS[arm],
    }
    run = fedspan.run(config, folder / "minilm-sst2", quiet=True)
    dossier = fedspan.audit(run.out, canaries=paths["key"])
    files.write(dossier, folder / "audit")
    found = dossier.as_json()
    return {
        "arm": arm,
        "metric": run.summary["metric"],
        "base": run.summary["base"],
        "value": run.summary["federated"],
        "epsilon": run.summary["epsilon"],
        "findings": found["findings"],
        "attacks": found["membership"]["attacks"],
        "control": found["membership"]["control"],
        "canaries": found["canaries"],
        "canaries_p_value": found["canaries_p_value"],
        "messages": found["messages"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Measure both arms."""
    base, data, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path((*sys.argv[3:], "runs/minilm")[0])
    paths = prepare(data, folder / "data")
    lines = [measure(arm, base, paths, folder / arm.replace(" ", "-")) for arm in ARMS]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
