"""Settings that keep Flower and Ray quiet: no telemetry, no update checks, no installation, only errors in the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables; without the third, a run installs its own torch with CUDA, 5.5 GB."""


def set_environment() -> None:
    """Set the variables of `ENVIRONMENT` that are not set; effective only before flwr and ray are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def errors_only() -> Iterator[None]:
    """Keep Flower's log at errors: otherwise it logs every step, and that `run_simulation` is deprecated."""
    logger = logging.getLogger("flwr")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate


def without_traceback(*kinds: type[BaseException]) -> None:
    """Have Flower log errors of these kinds without their traceback: one line says all that a user needs."""

    def drop(record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], kinds):
            record.exc_info = None
        return True

    logging.getLogger("flwr").addFilter(drop)
