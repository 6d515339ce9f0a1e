"""The clock, the watch over an arm's processes, and the result file."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


def now() -> float:
    """Seconds since the machine started: one clock for all processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_start() -> float:
    """`now()` when this process was started, to a clock tick."""
    after_name = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


class Watch:
    """This process and its descendants, looked at twice a second.

    `bytes` is the largest sum of resident sets: pages that processes share count once for each of them.
    `cpu_seconds` is what they used of the processors, less what a process used after the last look at it: unlike the
    clock it hardly depends on what else the machine does.
    """

    def __init__(self, interval: float = 0.5) -> None:
        self.bytes = 0
        self.processes = 0
        self._ticks: dict[tuple[int, int], int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(interval,), daemon=True)
        self._thread.start()

    def _watch(self, interval: float) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(interval)

    def _sample(self) -> None:
        parent, pages, ticks = {}, {}, {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    fields = Path(entry.path, "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                except OSError:  # it ended meanwhile
                    continue
                pid = int(entry.name)
                parent[pid], pages[pid] = int(fields[1]), int(fields[21])
                ticks[pid] = (int(fields[19]), int(fields[11]) + int(fields[12]))
        tree, frontier = set(), {os.getpid()}
        while frontier:
            tree |= frontier
            frontier = {pid for pid, above in parent.items() if above in frontier} - tree
        self._ticks |= {(pid, ticks[pid][0]): ticks[pid][1] for pid in tree if pid in ticks}
        self.processes = max(self.processes, len(tree))
        self.bytes = max(self.bytes, sum(pages.get(pid, 0) for pid in tree) * os.sysconf("SC_PAGE_SIZE"))

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all processes seen."""
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Look a last time."""
        self._stop.set()
        self._thread.join()
        self._sample()


@dataclass(slots=True)
class Log:
    """Times and losses of the rounds; the first round begins with its first client."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first_step: float | None = None
    client_seconds: float = 0.0

    def add(self, losses: Sequence[float], weights: Sequence[float], started: Sequence[float], seconds: float) -> None:
        """Note a round that has just been aggregated; `seconds` sums its clients' local work."""
        if self.first_step is None:
            self.first_step = min(started)
        self.ends.append(now())
        self.losses.append(float(np.average(losses, weights=weights)))
        self.client_seconds += seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a JSON record."""
        return {
            "ends": self.ends,
            "losses": self.losses,
            "first_step": self.first_step,
            "client_seconds": self.client_seconds,
        }


def write_result(
    out: str | Path, arm: str, rounds: int, log: Log, adapter: Mapping[str, np.ndarray], watch: Watch, **more: Any
) -> None:
    """Write OUT.json and, beside it, the final adapter. To be called last: it reads the clock.

    Raises
    ------
    ValueError
        When the arm did not complete its rounds.
    """
    from safetensors.numpy import save_file

    if len(log.ends) != rounds or log.first_step is None:
        raise ValueError(f"{arm} completed {len(log.ends)} rounds; expected {rounds}")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_suffix(".adapter.safetensors")
    save_file({name: np.ascontiguousarray(a, dtype=np.float32) for name, a in adapter.items()}, path)
    bounds = [log.first_step, *log.ends]
    start = process_start()
    watch.stop()
    result = {
        "arm": arm,
        **more,
        "wall_seconds": now() - start,
        "startup_seconds": log.first_step - start,
        "round_seconds": [after - before for before, after in itertools.pairwise(bounds)],
        "shutdown_seconds": now() - log.ends[-1],
        "client_seconds": log.client_seconds,
        "train_loss": log.losses,
        "final_adapter": str(path.resolve()),
        "peak_rss_bytes": watch.bytes,
        "peak_processes": watch.processes,
        "cpu_seconds": watch.cpu_seconds,
        "versions": versions(),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "numpy", "flwr", "ray", "nvflare", "protobuf"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
