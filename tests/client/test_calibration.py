"""Laws of the width of a pass on a GPU: the narrowest that is near the best, within the memory, chosen once."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from test_cohort import clients, config, data

from fedspan.client import calibration
from fedspan.client.calibration import best_width, cohort_size
from fedspan.data import Encoded

__all__ = ["data"]


@pytest.mark.parametrize(
    ("rates", "width"),
    [
        ({1: 10, 2: 19, 4: 36, 8: 40, 16: 41, 20: 41}, 8),
        ({1: 10, 2: 11, 4: 9, 8: 0, 16: 0, 20: 0}, 2),
        ({1: 10, 2: 20, 4: 40, 8: 80, 16: 160, 20: 200}, 20),
        ({1: 10, 2: 20, 4: 0, 8: 80, 16: 160, 20: 200}, 2),  # a width that does not fit ends the search
    ],
)
def test_the_narrowest_width_near_the_best_rate(rates: dict[int, float], width: int) -> None:
    assert best_width(lambda n: rates[n], 20) == width


def test_a_width_is_measured_once_for_the_same_work(
    bases: dict[str, Path], data: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real steps; the clients, the model and its passes are as before."""
    model = tiny.load(bases["llama"], "instruction")
    group = clients(model, 2, 4, 2)
    before = {name: id(layer) for name, layer in model.model.named_modules()}
    monkeypatch.setattr(calibration, "_MEASURED", {})
    width = cohort_size(model, data["instruction"], group, config("auto"))
    assert width in (1, 2, 3)
    assert not model.passes
    assert {name: id(layer) for name, layer in model.model.named_modules()} == before
    monkeypatch.setattr(calibration, "_client_steps_per_second", None)
    assert cohort_size(model, data["instruction"], group, config("auto")) == width


def test_no_more_clients_than_fit_into_the_memory(bases: dict[str, Path], data: dict[str, Encoded]) -> None:
    model = tiny.load(bases["llama"], "instruction")
    chosen = config("auto")
    small = chosen.engine.model_copy(update={"memory": 1e-6})
    group = clients(model, 2, 4, 2)
    assert cohort_size(model, data["instruction"], group, type(chosen)(0, chosen.local, chosen.privacy, small)) == 1
