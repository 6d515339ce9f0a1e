"""Columns of text, kept as one run of UTF-8: they are lists of strings in every respect but memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedspan.data import Rows
from fedspan.data.rows import concatenate
from fedspan.data.strings import ColumnBuilder, Strings, Tuples, joined, taken

TEXTS = st.lists(st.text(max_size=8) | st.sampled_from(["", "\ud800", "é\x00", "\U0001f600"]), max_size=12)


@given(TEXTS, TEXTS, st.data())
def test_texts_are_those_of_a_list(one: list[str], other: list[str], data: st.DataObject) -> None:
    column = Strings.of(one)
    assert column == one
    assert list(column) == one
    assert [column[i] for i in range(-len(one), len(one))] == one + one
    assert column[1:3] == one[1:3]
    assert joined([column, Strings.of(other), Strings.of([])]) == one + other
    assert (column == Strings.of(other)) == (one == other)
    rows = data.draw(st.lists(st.integers(0, len(one) - 1), max_size=20)) if one else []
    expected = [one[i] for i in rows]
    assert column.take(rows) == expected
    assert taken(Tuples([column, column]), np.asarray(rows, dtype=int)) == [(text, text) for text in expected]
    broken = [i for i, text in enumerate(one) if any("\ud800" <= c <= "\udfff" for c in text)]
    assert column.surrogate() == (broken[0] if broken else None)
    with pytest.raises(IndexError):
        column[len(one)]


def test_rows_of_texts_are_taken_and_joined_as_lists_are() -> None:
    texts = Tuples([Strings.of(["a", "b", "c"]), Strings.of(["", "x", "yy"])])
    rows = Rows("classification", texts, [0, 1, 0], ["", "", ""])
    plain = Rows("classification", list(texts), [0, 1, 0], ["", "", ""])
    for indices in ([2, 0], np.array([1]), []):
        assert rows.take(indices).inputs == plain.take(indices).inputs
    assert concatenate([rows, rows]).inputs == concatenate([plain, rows]).inputs == [*texts, *texts]
    assert texts[-1] == ("c", "yy")
    assert texts[:2] == [("a", ""), ("b", "x")]


def test_a_column_becomes_a_list_at_the_first_value_that_is_no_text() -> None:
    builder = ColumnBuilder()
    for value in ("a", "b", None, 3, "c"):
        builder.append(value)
    assert len(builder) == 5
    assert builder.build() == ["a", "b", None, 3, "c"]
