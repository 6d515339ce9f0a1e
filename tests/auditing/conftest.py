"""Tiny federations that are audited: one that learns its rows by heart, one under privacy, one of skewed classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from audited import Audited, secrets, words

import fedspan
from fedspan.auditing.canaries import CanaryKey


def _run(base: Path, folder: Path, method: str, repeats: tuple[int, ...], **sections: Any) -> Audited:
    rows = secrets(160)
    members, others = (
        tiny.write_jsonl(folder / f"{name}.jsonl", part) for name, part in (("in", rows[:60]), ("out", rows[60:]))
    )
    planted, key = folder / "planted.jsonl", folder / "key.json"
    fedspan.plant_canaries([members], planted, key, count=2, repeats=repeats, seed=4)
    config = tiny.config(
        base,
        planted,
        method,
        data={"test": [str(others)]},
        federation={"num_clients": 2, "participation": 1.0, "rounds": 2, "ranks": 4},
        evaluation={"base": False, "per_rank": False, "local": False, "max_new_tokens": 2, "every": 5},
        **sections,
    )
    run = fedspan.run(config, folder / "run").out
    return Audited(run, members, others, key, fedspan.audit(run, canaries=key, candidates=199))


@pytest.fixture(scope="session")
def overfitted(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """All weights trained for long on few rows."""
    local = {"steps": 80, "batch_size": 16, "learning_rate": 6e-3}
    return _run(bases["llama"], tmp_path_factory.mktemp("overfitted"), "fedavg", (30, 1), local=local)


@pytest.fixture(scope="session")
def private(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The same rows by DP-SGD."""
    return _run(
        bases["llama"],
        tmp_path_factory.mktemp("private"),
        "ffa_lora",
        (1,),
        local={"steps": 5, "batch_size": 8, "learning_rate": 1e-2},
        privacy={"dp": "example", "noise_multiplier": 1.0, "clip": 1.0},
    )


@pytest.fixture(scope="session")
def skewed(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of ten classes, each with a mixture of its own."""
    folder, rng = tmp_path_factory.mktemp("skewed"), np.random.default_rng(2)
    shares = np.arange(1, 11) / 55
    files = []
    for name, own in (("a", shares), ("b", shares[::-1])):
        labels = rng.choice(10, 70, p=own).tolist() + list(range(10))
        rows = [{"text": f"{'ABCDEFGHIJ'[x] * 3} {words(rng, 2)}", "label": x} for x in labels]
        files.append(tiny.write_jsonl(folder / f"{name}.jsonl", rows))
    test = [{"text": f"{'ABCDEFGHIJ'[i % 10] * 3} {words(rng, 2)}", "label": i % 10} for i in range(300)]
    config = tiny.config(
        bases["bert"],
        files[0],
        "ffa_lora",
        data={"train": [*map(str, files)], "test": [str(tiny.write_jsonl(folder / "test.jsonl", test))]},
        federation={"num_clients": 2, "participation": 1.0, "partition": "files", "rounds": 1, "ranks": 4},
        local={"steps": 8, "batch_size": 16, "learning_rate": 1e-2},
        evaluation={"base": False, "per_rank": False, "local": False},
    )
    return fedspan.run(config, folder / "run").out


@pytest.fixture(scope="session")
def key_of(overfitted: Audited) -> CanaryKey:
    from fedspan.auditing.canaries import read_key

    return read_key(overfitted.key)
