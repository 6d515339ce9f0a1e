"""The figures of every client, and the one that fares worst."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny

import fedspan
from fedspan.display.console import Console
from fedspan.display.report import summary_table
from fedspan.runs.client_figures import ClientFigures, worst_client


def figures(**accuracy: float) -> dict[str, ClientFigures]:
    return {name: ClientFigures({"accuracy": x, "perplexity": x}, 5, "own") for name, x in accuracy.items()}


def test_the_worst_client_is_the_lowest_or_the_highest() -> None:
    own = figures(a=0.5, b=0.2, c=0.9, d=math.nan)
    assert worst_client(own, "accuracy") == {"client_id": "b", "value": 0.2, "rows": 5, "data": "own"}
    worst = worst_client(own, "perplexity")
    assert worst is not None
    assert worst["client_id"] == "c"
    assert worst_client({}, "accuracy") is None
    assert worst_client(figures(a=math.nan), "accuracy") is None


@pytest.fixture(scope="module")
def results(bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[fedspan.Result]:
    """A run with one model and one with a model for each client, each with rows of the clients' own."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        fedspan.run(
            tiny.config(
                bases["bert"],
                texts,
                method,
                data={"client_holdout": 0.2, "metrics": ["auroc", "accuracy"]},
                federation={"rounds": 1},
                evaluation={"base": False},
            ),
            folder / method,
        )
        for method in ("flora", "fedsa_lora")
    ]


def test_every_client_has_figures_of_its_own_rows(results: list[fedspan.Result]) -> None:
    for result in results:
        summary = result.summary
        clients = summary["clients"]
        assert [client["data"] for client in clients] == ["own"] * 4
        assert sum(client["rows"] for client in clients) == summary["rows"]["own_data"]
        for name in ("auroc", "accuracy", "loss"):
            values = [client["figures"][name] for client in clients if client["figures"][name] is not None]
            assert summary["metrics"]["own_data"][name] == pytest.approx(sum(values) / len(values))
        worst = summary["worst_client"]
        assert worst is not None
        known = [client["figures"]["auroc"] for client in clients if client["figures"]["auroc"] is not None]
        assert worst["value"] == min(known)
        stored = json.loads((result.out / "summary.json").read_text())
        assert (stored["worst_client"], stored["clients"], stored["rows"]) == (worst, clients, summary["rows"])


def test_the_rows_stand_beside_the_figures(results: list[fedspan.Result]) -> None:
    for result in results:
        summary, console = result.summary, Console(width=160, record=True, file=None)
        with console.capture() as captured:
            console.print(summary_table(summary))
        lines = captured.get().splitlines()
        assert "rows" in lines[0].split()
        worst = summary["worst_client"]
        assert worst is not None
        line = next(line for line in lines if f"the worst, {worst['client_id']}, on its own data" in line)
        assert line.split()[-1] == str(worst["rows"])
        assert result.history[-1]["eval_rows"] == summary["data"]["rows"]["test"]


def test_the_classes_of_one_model_are_counted(results: list[fedspan.Result]) -> None:
    one, personal = (result.summary for result in results)
    assert personal["classes"] is None
    classes = one["classes"]
    assert classes is not None
    assert classes["classes"] == ["x", "y", "z"]
    assert sum(classes["rows"]) == sum(map(sum, classes["confusion"])) == one["rows"]["server"]
    right = sum(classes["confusion"][k][k] for k in range(3))
    assert right / one["rows"]["server"] == one["metrics"]["server"]["accuracy"]
