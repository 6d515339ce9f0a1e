"""The data's labels take the ids that the base's head knows them by, or the head is drawn anew."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedspan.data.base_facts import BaseFacts
from fedspan.data.label_names import label_entries, match_labels
from fedspan.data.rows import Corpus, Rows


def corpus(names: tuple[str, ...] | None, num_labels: int = 3) -> Corpus:
    ids = [i % num_labels for i in range(3)]
    rows = Rows("classification", [(f"text {i}",) for i in range(3)], ids, [""] * 3)
    return Corpus("classification", rows, rows.take([1]), rows.take([2]), None, names, num_labels, ("accuracy",))


def base(*names: str) -> BaseFacts:
    return BaseFacts(num_labels=len(names), label_names=names)


@pytest.mark.parametrize("stated", [("c", "a", "b"), ("C ", "A", "b")])
def test_labels_are_numbered_as_the_base_numbers_them(stated: tuple[str, ...]) -> None:
    matched = match_labels(corpus(("a", "b", "c")), base(*stated))
    assert matched.new_head is None
    assert matched.corpus.train.targets == [1, 2, 0]
    assert matched.corpus.test.targets == [2]
    assert matched.corpus.unseen is not None
    assert matched.corpus.unseen.targets == [0]
    assert matched.corpus.label_names == stated
    assert matched.note is not None
    assert "0 = " + stated[0] in matched.note


def test_names_that_differ_in_case_alone_are_matched_as_they_are_written() -> None:
    assert match_labels(corpus(("A", "a", "b")), base("b", "a", "A")).corpus.train.targets == [2, 1, 0]


def test_ids_are_the_base_s_ids_and_take_its_names() -> None:
    matched = match_labels(corpus(None), base("no", "maybe", "yes"))
    assert (matched.new_head, matched.corpus.train.targets) == (None, [0, 1, 2])
    assert matched.corpus.label_names == ("no", "maybe", "yes")
    assert matched.note == "label ids are read as the base's: 0 = no, 1 = maybe, 2 = yes"


@pytest.mark.parametrize("stated", [("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2")])
def test_ids_meet_names_that_say_nothing(stated: tuple[str, ...]) -> None:
    matched = match_labels(corpus(None), base(*stated))
    assert (matched.new_head, matched.note, matched.corpus.label_names) == (None, None, None)
    assert matched.corpus.train.targets == [0, 1, 2]


def test_ids_against_names_that_are_ids_in_another_order() -> None:
    assert match_labels(corpus(None), base("2", "0", "1")).corpus.train.targets == [1, 2, 0]


@pytest.mark.parametrize(
    ("names", "stated", "reason"),
    [
        (("a", "b", "c"), ("a", "b", "d"), "its classes are 'a', 'b', 'd', the data's are 'a', 'b', 'c'"),
        (("a", "b", "c"), ("LABEL_0", "LABEL_1", "LABEL_2"), "its classes have no names"),
        (("a", "b", "c"), ("a", "b"), "it has 2 classes, the data 3"),
        (None, ("a", "b"), "it has 2 classes, the data 3"),
    ],
)
def test_labels_that_do_not_fit_need_a_new_head(
    names: tuple[str, ...] | None, stated: tuple[str, ...], reason: str
) -> None:
    given = corpus(names)
    matched = match_labels(given, base(*stated))
    assert matched.corpus is given
    assert matched.new_head is not None
    assert matched.new_head.startswith(reason)


def test_ids_with_names_of_their_own_are_the_ids_of_a_base_without_any() -> None:
    """As of a Hub data set, whose ids are the ones that bases were trained on."""
    given = replace(corpus(("negative", "neutral", "positive")), ids_in_data=True)
    matched = match_labels(given, base("LABEL_0", "LABEL_1", "LABEL_2"))
    assert (matched.new_head, matched.corpus) == (None, given)
    assert match_labels(given, base("bad", "so so", "good")).new_head is not None


def test_made_up_names_match_themselves() -> None:
    assert (
        match_labels(corpus(("LABEL_0", "LABEL_1", "LABEL_2")), base("LABEL_0", "LABEL_1", "LABEL_2")).new_head is None
    )


def test_regressions_and_bases_that_state_nothing_are_left_alone() -> None:
    for given, stated in ((corpus(None, 1), base("x")), (corpus(("a", "b", "c")), BaseFacts())):
        assert match_labels(given, stated).corpus is given
        assert match_labels(given, stated).new_head is None


def test_entries_of_a_configuration() -> None:
    assert label_entries(2, ("no", "yes")) == {
        "num_labels": 2,
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "problem_type": "single_label_classification",
    }
    assert label_entries(1, None)["problem_type"] == "regression"
