"""Suggestions for a mistyped name."""

from __future__ import annotations

import pytest

from fedspan.support.suggest import nearest

NAMES = ("fedavg", "glora", "glora_plus", "lora_fair", "lora_fair_ridge", "Text")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("GLoRA", "glora"),
        ("LoRA-FAIR", "lora_fair"),
        ("GLoRA plus", "glora_plus"),
        ("fed-avg", "fedavg"),
        ("glroa", "glora"),
        ("text", "Text"),
    ],
)
def test_the_name_that_was_meant(given: str, meant: str) -> None:
    assert nearest(given, NAMES) == f"; did you mean {meant!r}?"


def test_all_names_where_none_is_near() -> None:
    assert nearest("zzz", ("b", "a")) == "; expected one of a, b"
