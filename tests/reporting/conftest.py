"""A comparison folder of tiny real runs, as `fedspan compare` leaves it."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import tiny

import fedspan

CONDITIONS = {"all clients": 1.0, "half of them": 0.5}
ARMS = ("glora", "flora")
VERDICTS = {"flora": "better", "hetlora": "worse", "ffa_lora": "open"}
SEEDS = (0, 1)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Path:
    """Two conditions, two arms, two seeds; in `comparison.json` the means are the runs', the verdicts made up."""
    folder = tmp_path_factory.mktemp("study") / "suite"
    data = tiny.write_jsonl(tmp_path_factory.mktemp("rows") / "texts.jsonl", tiny.words())
    cells = [(condition, arm, seed) for condition in CONDITIONS for arm in ARMS for seed in SEEDS]
    outs = [folder / "runs" / condition / arm / f"seed-{seed}" for condition, arm, seed in cells]
    configs = [
        {
            "seed": seed,
            "model": {"name": str(bases["bert"])},
            "data": {"task": "files", "train": [str(data)], "max_train": 48, "max_test": 12},
            "federation": {
                "num_clients": 4,
                "rounds": 3,
                "participation": CONDITIONS[condition],
                "partition": "iid",
                "ranks": [2, 2, 4, 4],
            },
            "local": {"steps": 1, "batch_size": 4},
            "evaluation": {"local": (condition, arm, seed) == cells[0]},
            "method": {"name": arm},
        }
        for condition, arm, seed in cells
    ]
    results = fedspan.run_many(configs, outs)
    figures = {cell: result.summary["federated"] for cell, result in zip(cells, results, strict=True)}
    (folder / "suite.toml").write_text('name = "tiny"\n', encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps(_comparison(figures)), encoding="utf-8")
    return folder


def _comparison(figures: dict[tuple[str, str, int], Any]) -> dict[str, Any]:
    cells, differences = [], []
    for condition in CONDITIONS:
        for arm in ARMS:
            values = {str(seed): figures[condition, arm, seed] for seed in SEEDS}
            cells.append(
                {
                    "condition": condition,
                    "arm": arm,
                    "n": len(SEEDS),
                    "mean": statistics.fmean(values.values()),
                    "std": statistics.stdev(values.values()),
                    "values": values,
                    "settings": {"local.learning_rate": 0.003},
                }
            )
        for arm, verdict in VERDICTS.items():
            mean = {"better": 0.05, "worse": -0.04, "open": 0.01}[verdict]
            width = 0.12 if verdict == "open" else 0.02
            differences.append(
                {
                    "condition": condition,
                    "arm": arm,
                    "baseline": "glora",
                    "mean": mean,
                    "low": mean - width,
                    "high": mean + width,
                    "p": 0.01,
                    "p_adjusted": 0.03,
                    "verdict": verdict,
                    "seeds_for_a_point": 40,
                }
            )
    return {
        "name": "A tiny comparison",
        "metric": "accuracy",
        "higher_is_better": True,
        "figure": "last",
        "margin": 0.02,
        "confidence": 0.95,
        "baseline": "glora",
        "seeds": list(SEEDS),
        "conditions": list(CONDITIONS),
        "arms": ["glora", *VERDICTS],
        "cells": cells,
        "differences": differences,
    }


@pytest.fixture(scope="session")
def page(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of that comparison."""
    from fedspan import reporting
    from fedspan.cli.report import diagnostics_in_words

    return reporting.write(reporting.read([suite]), tmp_path_factory.mktemp("page") / "r.html", diagnostics_in_words)
