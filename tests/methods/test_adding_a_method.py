"""The worked example of docs/adding_a_method.md is taken from the page, registered, and held to what it claims."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from federations import Case, assert_same, build, distance, gauge, received, regauged, served

from fedspan import methods
from fedspan.methods.base import Method
from fedspan.runs.execution import run

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_method.md"
Factory = Callable[..., Method]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Factory:
    """One file, and one line."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    file = tmp_path / "clipped_flora.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("clipped_flora", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    factory: Factory = module.clipped_flora
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "clipped_flora": factory})
    return factory


def test_it_has_ten_lines(example: Factory) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    body = code.split("def clipped_flora")[1].splitlines()[2:]
    assert len([line for line in body if line.strip()]) <= 10


def test_it_is_what_it_claims(example: Factory) -> None:
    case = Case("clipped_flora", example)
    fed = build(case, 1, ranks=(2, 3, 1), counts=(3, 1, 2))
    assert distance(received(fed, served(fed)[0]), fed.ideal) > 0.05  # not exact
    other = regauged(fed, lambda k, rank: gauge(np.random.default_rng(k), rank, 1e3))
    assert_same(received(other, served(other)[0]), received(fed, served(fed)[0]), 1e-9)
    # Nobody's part is above the bound, and a bound that nobody reaches changes nothing.
    top = max(np.linalg.norm(value) for value in received(fed, served(fed)[0]).values())
    assert top <= 1.0 + 1e-12
    free = build(Case("free", lambda: example(bound=1e9)), 1, ranks=(2, 3, 1), counts=(3, 1, 2))
    assert_same(received(free, served(free)[0]), free.ideal, 1e-12)


def test_it_runs_by_its_name(example: Factory, bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    config = tiny.config(
        bases["bert"], texts, "clipped_flora", method={"bound": 0.5}, federation={"ranks": [1, 2, 4, 8]}
    )
    result = run(config, tmp_path / "run")
    assert result.summary["method"] == "clipped_flora"
    assert result.adapter is not None
    with pytest.raises(ValueError, match="bound"):
        methods.create("clipped_flora", bound="much")
