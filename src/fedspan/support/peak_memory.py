"""What the process has held at most, as Linux tells it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> int:
    """Start a new measurement of the process's peak resident memory; its value now, in bytes."""
    if _CLEAR.exists() and os.access(_CLEAR, os.W_OK):
        # Memory that glibc's allocator only hoards would hide what is taken anew.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        _CLEAR.write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Peak resident memory since the last reset, in bytes; 0 on systems that do not tell."""
    if not _STATUS.exists():
        return 0
    line = next((x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024
