"""Memory that is free on this machine."""

from __future__ import annotations

from pathlib import Path

_UNKNOWN = 8 * 2**30


def free_memory() -> int:
    """Return the bytes that can be taken without swapping; 8 GiB where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return _UNKNOWN
    line = next((x for x in path.read_text().splitlines() if x.startswith("MemAvailable:")), None)
    return _UNKNOWN if line is None else int(line.split()[1]) * 1024
