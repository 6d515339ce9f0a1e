"""Peak resident memory of a script, as the operating system counts it: the head of scripts that tests run."""

PEAK = """
import ctypes, sys
from pathlib import Path

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

def reset():
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator only hoards would hide what is taken anew
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
"""
