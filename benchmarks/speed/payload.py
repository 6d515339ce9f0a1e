"""100 MB of weights through the whole chain: two sites on loopback, full weights both ways, in the open and masked.

    python benchmarks/speed/payload.py [--rounds 3] [--arms plain secure] > payload.jsonl

The base is MiniLM's with a larger vocabulary, so that its weights take 102 MB; each site trains one step on 8 rows.
Each arm is one `fedspan flower up`. Its line has the CPU seconds of one round by kind of process (over the rounds after
the first) and the largest resident memory of one process, as /proc shows them four times a second: of a process that
ends in between the last look counts. `codec` is one message's encoding and decoding in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import minilm

from fedspan.methods.messages import Update
from fedspan.wire import protocol

VOCABULARY = 38_000
ARMS = {"plain": {}, "secure": {"privacy.secure_sums": "true"}}
SETTINGS = {
    "method.name": "fedavg",
    "federation.num_clients": "2",
    "federation.participation": "1.0",
    "local.steps": "1",
    "local.batch_size": "8",
    "local.optimizer": "sgd",
    "evaluation.base": "false",
    "evaluation.local": "false",
    "evaluation.every": "1000",
    "deployment.wait": "1800",
    "deployment.deadline": "1800",
}
ROLES = {
    "flwr-serverapp": "server",
    "fedspan.site.worker": "site",
    "fedspan.flower.superlink": "SuperLink",
    "fedspan.flower.node": "SuperNode",
    "fedspan.flower.client_app_process": "client app",
    "nginx": "proxy",
    "fedspan.flower.proxy": "proxy",
}
"""By a part of the command line."""
_TICK = os.sysconf("SC_CLK_TCK")
_PAUSE = 0.25
MARK = "FEDSPAN_PAYLOAD"
"""Variable in the environment of the processes that are measured."""


class Processes:
    """CPU seconds and largest memory of the processes of a deployment, by command."""

    def __init__(self) -> None:
        self.cpu: dict[int, float] = {}
        self.peak: dict[int, int] = {}
        self.role: dict[int, str] = {}

    def look(self) -> None:
        """Take note of what runs now."""
        for pid in _marked():
            with suppress(OSError, StopIteration):
                folder = Path("/proc") / str(pid)
                self.role[pid] = _role((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                self.cpu[pid] = (int(fields[11]) + int(fields[12])) / _TICK
                high = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM:"))
                self.peak[pid] = int(high.split()[1]) // 1024

    def seconds(self) -> dict[str, float]:
        """Return the CPU seconds so far by role."""
        total: dict[str, float] = defaultdict(float)
        for pid, seconds in self.cpu.items():
            total[self.role[pid]] += seconds
        return dict(total)

    def peaks(self) -> dict[str, int]:
        """Return the largest memory of a single process of each role, in MiB."""
        total: dict[str, int] = defaultdict(int)
        for pid, mib in self.peak.items():
            total[self.role[pid]] = max(total[self.role[pid]], mib)
        return dict(total)


_MARKED = f"{MARK}={os.getpid()}".encode()


def _marked() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and _MARKED in (entry / "environ").read_bytes():
                yield int(entry.name)


def _role(command: str) -> str:
    return next((role for part, role in ROLES.items() if part in command), "others")


def measure(name: str, base: Path, rows: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Run one deployment; return its line of results."""
    command = [sys.executable, "-m", "fedspan", "flower", "up", str(folder), "--sites", "2", "--run", "one"]
    data = {"model.name": str(base), "data.task": "files", "data.train": json.dumps([str(rows)])}
    for key, value in {**SETTINGS, **data, **ARMS[name], "federation.rounds": str(rounds)}.items():
        command += ["--set", f"{key}={value}"]
    records = folder / "server" / "runs" / "one" / "metrics.jsonl"
    seen, after = Processes(), dict[int, dict[str, float]]()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(os.getpid())}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        while process.poll() is None:
            seen.look()
            done = len(records.read_text().splitlines()) if records.exists() else 0
            after.setdefault(done, seen.seconds())
            time.sleep(_PAUSE)
    if process.returncode:
        sys.stderr.write("".join(f"{path}:\n{path.read_text()[-4000:]}\n" for path in (folder / "logs").glob("*.log")))
        raise RuntimeError(f"{name}: {' '.join(command)} ended with {process.returncode}")
    first, last = after[1], after.get(rounds, seen.seconds())
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    kept = ("wire_up", "wire_down", "payload_down", "round_trips", "waited_seconds", "slowest_seconds")
    return {
        "arm": name,
        "cpu_per_round": {k: round((last[k] - first.get(k, 0.0)) / (rounds - 1), 2) for k in sorted(last)},
        "peak_mib": dict(sorted(seen.peaks().items())),
        "round": {key: lines[-1][key] for key in kept},
        "load": os.getloadavg()[0],
    }


def codec() -> dict[str, Any]:
    """Return the CPU seconds of one message of 100 MB in and out of its bytes."""
    update = Update("client-0", 1.0, {}, {"weights": torch.randn(25_600, 1000)})
    outgoing = protocol.MessageTensors()
    began = time.process_time()
    content = protocol.encode({"update": protocol.put_update(outgoing, update, "float32")}, outgoing)
    encoded = time.process_time()
    protocol.decode(content)
    decoded = time.process_time()
    return {"arm": "codec", "bytes": len(content), "encode": encoded - began, "decode": decoded - encoded}


def write_rows(path: Path) -> Path:
    """Write texts of a few words with two labels."""
    rows = [{"text": f"w{4 + i} w{50 + i % 7}", "label": "ab"[i % 2]} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    """Measure every arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    given = parser.parse_args()
    print(json.dumps(codec()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        base = minilm.write_base(Path(folder) / "base", vocabulary=VOCABULARY)
        rows = write_rows(Path(folder) / "rows.jsonl")
        for name in given.arms:
            print(json.dumps(measure(name, base, rows, Path(folder) / name, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
