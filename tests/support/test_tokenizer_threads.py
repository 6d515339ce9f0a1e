"""Data is tokenised on all cores, and no forked process is left with a tokenizer's lost threads."""

from __future__ import annotations

import os

import pytest
import tiny

from fedspan.config import DataConfig
from fedspan.data.encoding import encode
from fedspan.data.rows import Rows
from fedspan.support import tokenizer_threads
from fedspan.support.tokenizer_threads import all_cores, forking, one_core

NAME = "TOKENIZERS_PARALLELISM"


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_threads, "_ours", None)
    monkeypatch.setenv(NAME, "")  # so that it is put back
    monkeypatch.delenv(NAME)


def test_a_command_uses_all_cores_for_its_data_alone() -> None:
    one_core()
    assert os.environ[NAME] == "false"
    with all_cores():
        assert os.environ[NAME] == "true"
        with forking():
            assert os.environ[NAME] == "false"
    assert os.environ[NAME] == "false"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with all_cores():
        assert NAME not in os.environ
    for value in ("true", "false"):
        monkeypatch.setenv(NAME, value)
        one_core()
        with all_cores():
            assert os.environ[NAME] == value


def test_a_forked_process_stays_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of its parent's tokenizers are not there, and it would wait for them forever."""
    one_core()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with all_cores():
        assert os.environ[NAME] == "false"


def test_data_is_encoded_on_all_cores() -> None:
    tokenizer, seen = tiny.tokenizer(), set[str | None]()

    class Watched:
        def __call__(self, *args: object, **options: object) -> object:
            seen.add(os.environ.get(NAME))
            return tokenizer(*args, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

    one_core()
    encode(Rows("classification", [("abc",)], [0], [""]), Watched(), DataConfig())
    assert seen == {"true"}
    assert os.environ[NAME] == "false"
