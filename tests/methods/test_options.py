"""Every option of every method says what it takes, what it is by default and what it means."""

from __future__ import annotations

import inspect
import re

import pytest

from fedspan import methods
from fedspan.methods import METHODS, create, options


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_meaning_and_the_default_of_the_signature(name: str) -> None:
    listed = options(name)
    parameters = inspect.signature(METHODS[name]).parameters
    assert {o.name: o.default for o in listed} == {key: p.default for key, p in parameters.items()}
    assert [o.name for o in listed] == list(parameters)
    for option in listed:
        assert re.match(r".{12,}[.)]$", option.meaning), f"{name}.{option.name} says {option.meaning!r}"
        assert not option.meaning.startswith("As in"), option


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_documented_that_is_no_option(name: str) -> None:
    from fedspan.methods.option_docs import _meanings

    assert _meanings(METHODS[name]).keys() == {option.name for option in options(name)}


def test_the_values_of_an_option_are_in_words() -> None:
    listed = {option.name: option for option in options("glora")}
    assert listed["server_rank"].type == "int, 'auto', 'double' or 'none'"
    assert listed["momentum"].type == "float"
    assert listed["sides"].type == "'left' or 'both'"
    assert (listed["sides"].default, listed["server_rank"].default) == ("left", None)


def test_a_meaning_stands_once() -> None:
    """What `fedgalore` takes over from `fedftg` is written there alone."""
    first, second = ({o.name: o.meaning for o in options(name)} for name in ("fedftg", "fedgalore"))
    assert {name for name in first if second[name] == first[name]} == first.keys() - {"galore_rank"}


def test_the_defaults_are_values_that_the_method_takes() -> None:
    for name in METHODS:
        create(name, **{option.name: option.default for option in options(name)})


def test_a_name_that_is_none_is_refused() -> None:
    for call in (create, options):
        with pytest.raises(ValueError, match="unknown method 'glory'; did you mean 'glora'"):
            call("glory")
        with pytest.raises(ValueError, match="unknown method 3"):
            call(3)
    with pytest.raises(ValueError, match=r"unknown key 'method.rank' for glora; did you mean"):
        create("glora", rank=3)
    with pytest.raises(ValueError, match="fedit has no options"):
        methods.create("fedit", rank=3)
