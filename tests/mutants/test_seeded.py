"""The seeded bugs are about the source as it is."""

from __future__ import annotations

import pytest
from seeded import MUTANTS, ROOT, SOURCE, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.what for mutant in MUTANTS])
def test_a_mutant_changes_one_piece_of_the_source(mutant: Mutant) -> None:
    """Otherwise it would be dead, or alive, for no reason."""
    assert (SOURCE / mutant.file).read_text(encoding="utf-8").count(mutant.piece) == 1
    assert mutant.bug != mutant.piece
    assert all((ROOT / path).exists() for path in mutant.tests.split())
