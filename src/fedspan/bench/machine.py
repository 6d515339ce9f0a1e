"""The machine: its description, the peak rates from which floors are computed, and whether it is idle."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedspan.support.peak_memory import peak_memory, reset_peak_memory

_GEMM = 1024
_READ = 2**26  # float32 numbers: 256 MiB, more than any cache holds


@dataclass(frozen=True, slots=True)
class Machine:
    """The properties of a machine on which timings depend. Rates are for `threads` threads of one process."""

    cpu: str
    cores: int
    """Cores that this process may use."""
    memory_bytes: int
    device: str
    threads: int
    dtype: str
    bandwidth: float
    """Bytes per second when memory is read once."""
    gemm: float
    """Floating point operations per second of a square matrix product."""
    torch: str
    python: str

    def record(self) -> dict[str, Any]:
        """Return the fields for a JSON record."""
        return asdict(self)

    def seconds(self, num_bytes: float, flops: float) -> float:
        """Return the least time in which these bytes can be read and these operations done on this machine."""
        return max(num_bytes / self.bandwidth, flops / self.gemm)


def measure(device: torch.device, threads: int, quick: bool) -> Machine:
    """Describe the machine and measure its two peak rates (about a second)."""
    torch.set_num_threads(threads)
    size = 2 * _GEMM if device.type == "cuda" else _GEMM
    x, y = torch.ones((size, size), device=device), torch.ones((size, size), device=device)
    gemm = 2 * size**3 / _fastest(lambda: x @ y, device, 3 if quick else 10)
    numbers = torch.ones(_READ, device=device)
    bandwidth = 4 * _READ / _fastest(numbers.sum, device, 3 if quick else 10)
    return Machine(
        cpu=_name(device),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_meminfo("MemTotal"),
        device=device.type,
        threads=threads,
        dtype="float32",
        bandwidth=bandwidth,
        gemm=gemm,
        torch=torch.__version__,
        python=platform.python_version(),
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    """Return the clock's seconds, after all work queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fastest(work: Callable[[], Any], device: torch.device, times: int) -> float:
    work()
    best = float("inf")
    for _ in range(times):
        began = now(device)
        work()
        best = min(best, now(device) - began)
    return best


def calibration(device: torch.device) -> float:
    """Return the seconds of a fixed piece of work, the best of three; it varies only when something else is running.

    A chain of products and sums on 2 MiB, whose time depends on clock speed, caches and other processes.
    """
    x = torch.full((512, 512), 1e-3, device=device)

    def work() -> None:
        y = x
        for _ in range(4):
            y = (y @ x).add_(x)

    return _fastest(work, device, 3)


def _meminfo(name: str) -> int:
    """Return a line of /proc/meminfo in bytes; 0 on systems without it."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return 0
    line = next((x for x in path.read_text().splitlines() if x.startswith(name + ":")), "x: 0")
    return int(line.split()[1]) * 1024


def memory_limit(device: torch.device) -> int:
    """Return the bytes that a case may take: half of the free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return _meminfo("MemAvailable") // 2 or 2**32


def start_peak(device: torch.device) -> int:
    """Start a new measurement of peak memory; return the bytes in use now (0 where the system does not report them)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return reset_peak_memory()


def peak(device: torch.device) -> int:
    """Return the peak memory since `start_peak` in bytes (0 where the system does not report it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
