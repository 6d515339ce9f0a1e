"""A run folder with its diagnostics, and how the figures are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspan import methods
from fedspan.config import load
from fedspan.display.run_folder import read_run
from fedspan.methods.base import MethodInfo
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True)
class Inspection:
    """One run with its diagnostics."""

    folder: Path
    info: MethodInfo
    rounds: Sequence[Mapping[str, Any]]
    """The records of `metrics.jsonl` that hold diagnostics."""

    def series(self, figure: str) -> list[float | None]:
        """Return the figure by round, None where it does not apply."""
        return [record["diagnostics"].get(figure) for record in self.rounds]

    def last(self, figure: str) -> Any:
        """Return the figure of the last round."""
        return self.rounds[-1]["diagnostics"].get(figure)

    def ranks(self) -> list[str]:
        """Return the ranks whose readout was measured in some round, ascending."""
        return sorted(
            {rank for record in self.rounds for rank in record["diagnostics"].get("readout_loss") or {}}, key=int
        )

    def known(self, figure: str) -> list[float]:
        """Return the figure in the rounds where it applies."""
        return [value for value in self.series(figure) if value is not None]


def read(folder: Path) -> Inspection:
    """Read the run in `folder`, finished or not.

    Raises
    ------
    FedspanError
        When the folder holds no run, or one that was run without diagnostics.
    """
    _, history = read_run(folder)
    rounds = [record for record in history if record.get("diagnostics")]
    if not rounds:
        if not history:
            raise FedspanError(f"{folder}: no round is finished yet")
        raise FedspanError(f"{folder}: its rounds hold no diagnostics; run it with --set evaluation.diagnostics=true")
    return Inspection(folder, methods.create(**load(folder / "config.toml").method).info, rounds)


def percent(value: float | None) -> str:
    """Return a relative error: 12%, 0.0031%, 0 for rounding, an en dash where it does not apply."""
    if value is None:
        return "–"
    if value < 1e-6:
        return "0"
    return f"{100 * value:.3g}%" if value < 10 else f"{value:.3g}×"


def angle(value: float | None) -> str:
    """Return an angle such as 12.3°, or an en dash where it does not apply."""
    return "–" if value is None else f"{value:.1f}°"
