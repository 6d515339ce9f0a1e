"""Peak resident memory of the process, from Linux's /proc."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> int:
    """Start a new measurement of the process's peak resident memory, and return its value now, in bytes."""
    if _CLEAR.exists() and os.access(_CLEAR, os.W_OK):
        # Memory that glibc's allocator keeps although it is free would hide new allocations.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        _CLEAR.write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Return the peak resident memory since the last reset, in bytes; 0 on systems without /proc."""
    if not _STATUS.exists():
        return 0
    line = next((x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024
