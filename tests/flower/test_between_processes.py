"""A federation between real processes, over TLS, node keys and the proxy, against the same one in this process."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from run_folders import state_of

from fedspan.config import Config
from fedspan.flower import deployment, trial
from fedspan.runs import checkpoint
from fedspan.runs.execution import run

pytest.importorskip("cryptography")


def settings(base: Path, texts: Path, name: str, count: int, **privacy: Any) -> Config:
    """So many clients of different ranks where the method allows it, all of them in each of two rounds."""
    return tiny.config(
        base,
        texts,
        name,
        federation={"num_clients": count, "participation": 1.0, "ranks": tuple(range(2, 2 + count))},
        evaluation={"diagnostics": False, "per_rank": False, "base": False},
        engine={"name": "sequential"},
        deployment={"wait": 120, "deadline": 120},
        privacy=privacy,
    )


def named_in_processes(folder: Path) -> list[str]:
    """The command lines of processes that name a folder or work in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line, place = (entry / "cmdline").read_bytes().decode(errors="replace"), os.readlink(entry / "cwd")
        except OSError:
            continue
        if int(entry.name) != os.getpid() and (str(folder) in line or Path(place).is_relative_to(folder)):
            found.append(line.replace("\0", " "))
    return found


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("method", "count", "there", "here"),
    [
        pytest.param("flexlora", 2, {}, {}, marks=pytest.mark.long),
        # More than half of the sites unmask a sum, and at least two of them: three sites at least.
        pytest.param("glora_sums", 3, {"secure_sums": True}, {"fixed_point": True}, marks=pytest.mark.slow),
    ],
)
def test_real_sites_come_to_the_bits_of_one_process(
    bases: dict[str, Path],
    texts: Path,
    tmp_path: Path,
    method: str,
    count: int,
    there: dict[str, Any],
    here: dict[str, Any],
) -> None:
    """The masks cancel, the transport changes no bit, and neither a process nor a port is left."""
    folder, alone = tmp_path / "federation", tmp_path / "alone"
    sites = [f"site-{k}" for k in range(count)]
    trial.prepare(folder, sites, settings(bases["bert"], texts, method, count, **there))
    lines: list[str] = []
    result = trial.up(folder, lines.append, timeout=240)
    end = time.monotonic() + 5
    while named_in_processes(folder) and time.monotonic() < end:
        time.sleep(0.1)
    assert named_in_processes(folder) == []
    plan = deployment.read(folder)
    ports = [plan.port, plan.superlink_port, *(site.runtime_port for site in plan.sites)]
    assert [port for port in ports if listens(port)] == []

    run(settings(bases["bert"], texts, method, count, **here), alone)
    tiny.same(state_of(result.out), state_of(alone))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (result.out / "adapter" / name).read_bytes() == (alone / "adapter" / name).read_bytes(), name
    history = checkpoint.read(result.out / "checkpoint" / "federation.safetensors").history
    assert [(record["num_clients"], record["rejected"]) for record in history] == [(count, {})] * 2
    assert all(record["wire_up"] > 0 for record in history)
