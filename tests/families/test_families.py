"""Every family of bases gets the right result, or one line that says why not before anything is trained."""

from __future__ import annotations

from pathlib import Path

import family_table
import pytest
from families import FAMILIES, Family
from family_runs import study

FAST = [family for family in FAMILIES if family.fast]
REST = [family for family in FAMILIES if not family.fast]


def check(family: Family, folder: Path) -> None:
    findings = study(family, folder)
    assert not findings.wrong
    assert family_table.row(findings) == family_table.rows()[family.name]


@pytest.mark.parametrize("family", FAST, ids=lambda family: family.name)
def test_a_family_of_the_fast_half_is_as_the_table_says(family: Family, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.families
@pytest.mark.parametrize("family", REST, ids=lambda family: family.name)
def test_a_family_of_the_rest_is_as_the_table_says(family: Family, tmp_path: Path) -> None:
    check(family, tmp_path)


def test_the_table_has_every_family_once_and_no_row_is_wrong() -> None:
    rows = family_table.rows()
    assert list(rows) == [family.name for family in FAMILIES]
    assert len(rows) >= 60
    assert not [row for row in rows.values() if "crash" in row or "wrong" in row]


def test_every_kind_of_layers_is_in_the_fast_half() -> None:
    assert {family.layers for family in FAST} == {family.layers for family in FAMILIES}
