"""What Flower and Ray are told so that they neither call home nor install anything."""

from __future__ import annotations

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables; without the third a run installs a torch of its own with CUDA, 5.5 GB."""


def hush() -> None:
    """Set them where they are not set, before flwr or ray is imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
