"""docs/internet_scale.md is what the committed lines say, and its fit finds the terms that figures are made of."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_page", ROOT / "benchmarks" / "scale" / "page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_committed_lines(script: ModuleType) -> None:
    assert script.page(script.read()) == script.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("terms", [(200.0, 30.0, 900.0), (200.0, 0.0, 900.0)])
def test_the_fit_finds_the_terms_and_none_below_zero(script: ModuleType, terms: tuple[float, ...]) -> None:
    sizes = [(1, 2048), (4, 8192), (1, 16384), (8, 2**20)]
    lines = [{"modules": m, "update_bytes": b, "us": terms[0] + terms[1] * m + terms[2] * b / 2**20} for m, b in sizes]
    assert script.fitted(lines, lambda x: x["us"]) == pytest.approx(terms, rel=1e-6, abs=1e-6)
    less = [line | {"us": line["us"] - 50.0 * line["modules"]} for line in lines]
    assert (script.fitted(less, lambda x: x["us"]) >= 0).all()
