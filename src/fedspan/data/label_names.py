"""The labels of the data against those of the base's head: by their names, where both have some."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedspan.data.base_facts import BaseFacts
from fedspan.data.rows import Corpus, Rows

_MADE_UP = re.compile(r"label[_ ]?\d+", re.IGNORECASE)
_MOST_SHOWN = 6


@dataclass(frozen=True, slots=True)
class MatchedLabels:
    """A corpus whose label ids are those of the base's head, or a reason why that head cannot be used."""

    corpus: Corpus
    new_head: str | None = None
    """The reason to draw a new head, although the base may have one; none: the base's is used, where it has one."""
    note: str | None = None
    """One line on how ids or names were read; none where there is nothing to say."""


def match_labels(corpus: Corpus, base: BaseFacts) -> MatchedLabels:
    """Give the data's classes the ids that the base's head knows them by.

    * Names that are the base's, in any order and apart from upper and lower case: the data takes the base's ids.
    * Ids of the data, where one side has no names: they are the base's ids, and have the other's names.
    * Anything else does not fit: other names, another number of classes, or names without ids against a base without
      any names, whose order nobody knows.
    """
    if corpus.num_labels < 2 or base.num_labels is None or base.label_names is None:
        return MatchedLabels(corpus)
    if base.num_labels != corpus.num_labels:
        return MatchedLabels(corpus, f"it has {base.num_labels} classes, the data {corpus.num_labels}")
    ids = tuple(str(i) for i in range(corpus.num_labels))
    order = _order(corpus.label_names or ids, base.label_names)
    if order is not None:
        return _in_order(corpus, order, base.label_names)
    if corpus.label_names is None:
        if not _has_names(base.label_names):
            return MatchedLabels(corpus)
        note = f"label ids are read as the base's: {_shown(base.label_names)}"
        return MatchedLabels(replace(corpus, label_names=base.label_names), note=note)
    if not _has_names(base.label_names):
        if corpus.ids_in_data:
            return MatchedLabels(corpus)
        return MatchedLabels(corpus, f"its classes have no names to match {_some(corpus.label_names)} with")
    return MatchedLabels(
        corpus, f"its classes are {_some(base.label_names)}, the data's are {_some(corpus.label_names)}"
    )


def label_entries(num_labels: int, names: Sequence[str] | None) -> dict[str, object]:
    """Return the entries of a transformer's configuration that describe its labels.

    Parameters
    ----------
    num_labels
        Number of classes; 1 for regression.
    names
        Their names in the order of their ids; none: transformers' own (`LABEL_0`).
    """
    problem = "regression" if num_labels == 1 else "single_label_classification"
    named = list(names or (f"LABEL_{i}" for i in range(num_labels)))
    return {
        "num_labels": num_labels,
        "id2label": {str(i): name for i, name in enumerate(named)},
        "label2id": {name: i for i, name in enumerate(named)},
        "problem_type": problem,
    }


def _order(own: Sequence[str], base: Sequence[str]) -> list[int] | None:
    """Return the base's id of every class of the data, or None where their names are not the same."""
    for key in (str, _folded):
        places = {key(name): i for i, name in enumerate(base)}
        wanted = [key(name) for name in own]
        if len(places) == len(base) and set(wanted) == places.keys():
            return [places[name] for name in wanted]
    return None


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _in_order(corpus: Corpus, order: Sequence[int], names: tuple[str, ...]) -> MatchedLabels:
    note = None
    if list(order) != sorted(order):
        note = f"labels are numbered as the base numbers them: {_shown(names)}"
        parts = [None if rows is None else _renumbered(rows, order) for rows in _splits(corpus)]
        train, test, unseen, validation = parts
        assert train is not None
        assert test is not None
        corpus = replace(corpus, train=train, test=test, unseen=unseen, validation=validation)
    # Ids against names that are ids, or that transformers made up, have no names to show.
    named = names if corpus.label_names is not None or note is not None else None
    return MatchedLabels(replace(corpus, label_names=named), note=note)


def _splits(corpus: Corpus) -> tuple[Rows, Rows, Rows | None, Rows | None]:
    return corpus.train, corpus.test, corpus.unseen, corpus.validation


def _renumbered(rows: Rows, order: Sequence[int]) -> Rows:
    return replace(rows, targets=[order[target] for target in rows.targets])


def made_up(names: Sequence[str]) -> bool:
    """Return whether these are names that transformers makes up (`LABEL_0`), or the numbers themselves."""
    return all(_MADE_UP.fullmatch(name) for name in names) or list(names) == [str(i) for i in range(len(names))]


def _has_names(names: Sequence[str]) -> bool:
    return not made_up(names)


def _shown(names: Sequence[str]) -> str:
    pairs = [f"{i} = {name}" for i, name in enumerate(names[:_MOST_SHOWN])]
    return ", ".join(pairs) + (", …" if len(names) > _MOST_SHOWN else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_MOST_SHOWN])) + (", …" if len(names) > _MOST_SHOWN else "")
