"""The logs in the folders of a deployment, a server, a run or a site."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedspan.events.chain import FILE
from fedspan.support.errors import FedspanError
from fedspan.support.paths import lacks

_PATTERNS = (FILE, f"runs/*/{FILE}", f"server/runs/*/{FILE}", f"sites/*/{FILE}")


def logs_in(place: Path) -> list[Path]:
    """Return the logs of a folder: its own, or those of the runs and sites in it; a log itself is taken as it is.

    Raises
    ------
    FedspanError
        When there is none.
    """
    if place.is_file():
        return [place]
    found = sorted(path for pattern in _PATTERNS for path in place.glob(pattern))
    if not found:
        raise FedspanError(
            f"{lacks(place, FILE)}: expected the folder of a run between sites, of a site, of a server or of a "
            "whole deployment"
        )
    return found


def all_logs(places: Iterable[Path]) -> list[Path]:
    """Return the logs of several folders, each once."""
    return list({path.resolve(): path for place in places for path in logs_in(place)}.values())
