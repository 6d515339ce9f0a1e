"""Rows that nothing explains, and what an audited federation of them leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedspan.auditing.dossier import Dossier

_LETTERS = "bdfgklmnprst"


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join("".join(rng.choice(list(_LETTERS), 2)) for _ in range(count))


def secrets(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Instructions whose answers nothing explains, so that a model can only know them by heart."""
    rng = np.random.default_rng(seed)
    return [{"instruction": words(rng, 3), "input": "", "output": words(rng, 3)} for _ in range(count)]


@dataclass(frozen=True)
class Audited:
    """A run, its rows in files, and its dossier."""

    run: Path
    members: Path
    others: Path
    key: Path
    dossier: Dossier
