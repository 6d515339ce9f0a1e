"""Two regions of two sites each between real processes: the bits of one process, and logs that agree."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tiny
from run_folders import state_of
from test_between_processes import named_in_processes, settings

from fedspan.config import Config
from fedspan.events import chain
from fedspan.events.verify import verify
from fedspan.flower import region_deployment, trial
from fedspan.runs.execution import run

pytest.importorskip("cryptography")
REGIONS = {"north": ["a", "b"], "south": ["c", "d"]}
CLIENTS = {site: f"client-{k}" for k, site in enumerate("abcd")}


def in_tree(base: Path, texts: Path) -> Config:
    config = settings(base, texts, "glora_sums", 4, secure_sums=True)
    # A machine that does other work too takes its time over twenty processes.
    patient = config.deployment.model_copy(update={"wait": 900, "deadline": 900})
    return region_deployment.in_regions(config.model_copy(update={"deployment": patient}), REGIONS, CLIENTS)


@pytest.mark.long
def test_two_real_regions_come_to_the_bits_of_one_process(bases: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Three servers, each with its SuperLink and its proxy; the logs of both levels agree with each other."""
    folder, alone = tmp_path / "tree", tmp_path / "alone"
    trial.prepare_regions(folder, REGIONS, in_tree(bases["bert"], texts))
    lines: list[str] = []
    result = trial.up(folder, lines.append, timeout=1800, in_memory=True)
    end = time.monotonic() + 5
    while named_in_processes(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert named_in_processes(folder) == []

    run(settings(bases["bert"], texts, "glora_sums", 4, fixed_point=True), alone)
    tiny.same(state_of(result.out), state_of(alone))
    history = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert [(record["num_clients"], record["rejected"]) for record in history] == [(4, {})] * 2
    above = [result.out / chain.FILE, *(folder / "regions" / name / "uplink" / chain.FILE for name in REGIONS)]
    assert verify([chain.read(path) for path in above]).findings == []
    for name, sites in REGIONS.items():
        region = folder / "regions" / name
        below = [region / "server" / "runs" / "region" / chain.FILE]
        below += [region / "sites" / site / chain.FILE for site in sites]
        assert verify([chain.read(path) for path in below]).findings == []
