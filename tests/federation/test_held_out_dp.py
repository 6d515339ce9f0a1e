"""Figures of held-out rows under differential privacy: how much noise there is, and how it is counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from fedspan.data.metric_blocks import RowResults
from fedspan.data.metric_sums import HEADER, StatisticsLayout
from fedspan.federation.held_out import Collected, HeldOutTerms
from fedspan.privacy.accountant import DPEvent
from fedspan.privacy.accounting import total_epsilon
from fedspan.privacy.held_out_dp import mean_of_client, noised_mean, noised_rows
from fedspan.privacy.pld import PLDAccountant
from fedspan.privacy.secret_file import FOLDER
from fedspan.runs.execution import run

pytestmark = pytest.mark.usefixtures("bases")


def layout() -> StatisticsLayout:
    return StatisticsLayout.of(["accuracy", "macro_f1"], 3, bounded=True)


def rows(seed: int, num_rows: int) -> RowResults:
    rng = np.random.default_rng(seed)
    predicted, references = (rng.integers(3, size=num_rows).tolist() for _ in range(2))
    return RowResults([1.0] * num_rows, [1] * num_rows, predicted, references)


def test_the_noise_has_the_stated_deviation() -> None:
    """z Δ for one client's rows, z Δ / K for the mean over clients, each to 5 standard errors over 400 draws."""
    form, vector = layout(), layout().vector(rows(1, 20))
    by_rows, by_clients = [], []
    for number in range(400):
        drawn = noised_rows(form, vector, 1.5, (number,), lambda: 7, lambda release: None)
        assert drawn[0] == vector[0]
        by_rows.append(drawn[HEADER:] - vector[HEADER:])
        mean = noised_mean(form, mean_of_client(form, vector), 4, 1.5, (number,), lambda: 7, lambda release: None)
        by_clients.append(mean[HEADER:] - mean_of_client(form, vector)[HEADER:] / 4)
    count = 400 * (form.size - HEADER)
    for found, expected in ((by_rows, 1.5 * form.sensitivity), (by_clients, 1.5 * form.sensitivity / 4)):
        assert float(np.std(found)) == pytest.approx(expected, rel=5 / math.sqrt(2 * count))
        assert abs(float(np.mean(found))) < 5 * expected / math.sqrt(count)


def test_the_noise_is_the_same_for_the_same_sum_and_another_for_another() -> None:
    """A resumed run that comes to the same statistics releases the same thing; the release is counted by its digest."""
    form, vector = layout(), layout().vector(rows(1, 20))
    releases: list[str] = []
    first, again = (noised_rows(form, vector, 1.0, ("run", 1), lambda: 7, releases.append) for _ in range(2))
    assert (first == again).all()
    other = noised_rows(form, layout().vector(rows(2, 20)), 1.0, ("run", 1), lambda: 7, releases.append)
    later = noised_rows(form, vector, 1.0, ("run", 2), lambda: 7, releases.append)
    assert len(set(releases)) == 3
    differences = [np.abs(x - first)[HEADER:].min() for x in (other, later)]
    assert min(differences) > 0


def test_one_clients_mean_is_bounded_whatever_its_rows() -> None:
    form = layout()
    for num_rows in (1, 3, 200):
        mean = mean_of_client(form, form.vector(rows(num_rows, num_rows)))
        assert np.linalg.norm(mean) <= form.sensitivity * (1 + 1e-12)
        assert (mean[:HEADER] == 0).all()  # neither its number of rows nor its loss leaves it
    assert not mean_of_client(form, form.vector(rows(0, 0))).any()


def test_a_client_beyond_the_bound_is_not_taken() -> None:
    form = HeldOutTerms(layout(), "client", sums=False)
    assert form.problem(np.zeros(form.size)) is None
    assert form.problem(np.full(form.size, 2.0)) is not None
    assert form.evaluation(Collected()) is None


def private(base: Path, texts: Path, **privacy: Any) -> Any:
    return tiny.config(
        base,
        texts,
        "ffa_lora",
        data={"client_holdout": 0.3, "metrics": ["accuracy"]},
        federation={"participation": 1.0, "rounds": 2, "weighting": "equal"},
        evaluation={"where": "clients", "diagnostics": False, "per_rank": False, "base": False},
        privacy={"noise_multiplier": 2.0, "delta": 1e-3, **privacy},
    )


def test_client_level_privacy_counts_every_evaluation(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Two rounds, and after each an evaluation of all clients: four releases of one multiplier."""
    result = run(private(bases["bert"], texts, dp="client"), tmp_path / "run")
    four = [DPEvent(2.0, 1.0, 4)]
    assert result.summary["epsilon"] == pytest.approx(total_epsilon(four, 1e-3, PLDAccountant), rel=1e-3)
    found = result.summary["client_evaluation"]
    assert found is not None
    assert (found["rows"], found["per_client"], found["unweighted"], found["worst"]) == (None, None, None, None)
    ledger = json.loads((tmp_path / "run" / FOLDER / "ledger.json").read_text())
    assert sum(name.startswith("held-out/") for name in ledger["samples"]) == 2


def test_an_evaluation_beyond_the_budget_is_not_made(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Enough for a round and its evaluation, and for another round, not for a second evaluation."""
    spent = [total_epsilon([DPEvent(2.0, 1.0, count)], 1e-3, PLDAccountant) for count in (3, 4)]
    lines: list[str] = []
    config = private(bases["bert"], texts, dp="client", epsilon=sum(spent) / 2)
    result = run(config, tmp_path / "run", lambda e: lines.append(e.data["line"]) if e.kind == "budget" else None)
    assert result.summary["epsilon"] == pytest.approx(spent[0], rel=1e-3)
    assert [record["client_evaluation"] is None for record in result.history] == [False, True]
    assert any("are not evaluated after round 2" in line for line in lines)


def test_example_level_privacy_counts_held_out_rows_in_a_ledger_of_their_own(
    bases: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    """Nobody's row is in both, so that what is spent is the larger of the two."""
    config = private(bases["bert"], texts, dp="example")
    result = run(config, tmp_path / "run")
    folder = tmp_path / "run" / FOLDER
    held = sorted(path.name for path in folder.glob("ledger-*.held-out.json"))
    assert held == [f"ledger-client-{k}.held-out.json" for k in range(4)]
    two = total_epsilon([DPEvent(2.0, 1.0, 2)], 1e-3, PLDAccountant)
    assert result.summary["epsilon"] >= two * (1 - 1e-3)
    found = result.summary["client_evaluation"]
    assert found is not None
    assert found["per_client"] is not None
    assert found["rows"] == sum(own["rows"] for own in found["per_client"].values())
    assert all(math.isnan(own["figures"]["loss"] or math.nan) for own in found["per_client"].values())
