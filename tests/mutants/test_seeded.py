"""The seeded bugs are about the source as it is."""

from __future__ import annotations

import pytest
from mutant import Mutant
from seeded import MUTANTS, ROOT, SOURCE


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.what for mutant in MUTANTS])
def test_a_mutant_changes_one_piece_of_the_source(mutant: Mutant) -> None:
    """Otherwise it would be dead, or alive, for no reason."""
    assert (SOURCE / mutant.file).read_text(encoding="utf-8").count(mutant.piece) == 1
    assert mutant.bug != mutant.piece
    for tests in mutant.tests.split():
        path, _, name = tests.partition("[")[0].partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") if name else (ROOT / path).exists()
