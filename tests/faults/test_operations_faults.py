"""Faults of operation: a log that was edited, one key at two sites, a site that was upgraded alone, an old certificate.

The SuperLink keeps its messages in memory here, so that this is tried too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from conftest import Outcome
from deployed import SITES, SLACK, Deployed, Run, deployed, until

from fedspan.events import chain, places
from fedspan.events.chain import FILE
from fedspan.events.verify import Report, verify
from fedspan.flower import certificates, trial
from fedspan.flower.certificates import KeyPair

pytestmark = pytest.mark.faults

LIMIT = SLACK * 100
"""Seconds for one script."""


@pytest.fixture(scope="module")
def up(bases: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    config = tiny.config(
        bases["bert"],
        texts,
        "ffa_lora",
        federation={"num_clients": len(SITES), "rounds": 2, "participation": 1.0},
        evaluation={"every": 99, "diagnostics": False, "per_rank": False, "base": False},
        engine={"name": "sequential"},
        deployment={"wait": 900, "deadline": 120},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSPAN_DATABASE", trial.IN_MEMORY)
        with deployed(tmp_path_factory.mktemp("operations") / "federation", config) as made:
            for site in SITES:
                made.start(site)
            yield made


def report_on(up: Deployed) -> Report:
    return verify([chain.read(path) for path in places.logs_in(up.folder)])


def script(up: Deployed, *command: str, folder: str = "server") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **up.environment}
    return subprocess.run(
        command,
        cwd=up.folder / folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


def end(up: Deployed, site: str) -> None:
    process = "fedspan.flower.client_app_process"
    until(lambda: bool(up.pids(process, site=site)), 120, f"{site} is up")
    up.kill(process, site=site)
    until(lambda: up.ended(site) is not None, 60, f"the end of {site}")


def run(up: Deployed, name: str) -> Run:
    begun = up.begin(name)
    up.end(begun)
    assert begun.finished(), begun.log.read_text()[-3000:]
    return begun


def test_a_line_of_a_log_is_edited(up: Deployed, outcomes: Outcome) -> None:
    first = run(up, "logged")
    assert not (up.folder / "server/state/superlink.db").exists()
    report = report_on(up)
    assert report.findings == []
    assert len(report.checked) == 4 + 3
    opening = chain.read(first.out / FILE).entries[0]
    assert {"ca.crt", "server.crt", "nodes/client-1.pub", "identity of client-1"} <= opening["keys"].keys()

    log = up.folder / "sites/client-1" / FILE
    whole = log.read_bytes()
    log.write_bytes(whole.replace(b'"kind":"update"', b'"kind":"Update"', 1))
    found = report_on(up).findings
    assert any(str(log) in finding and "does not follow" in finding for finding in found)
    # The worker is restarted, and does not write behind lines that are no chain.
    up.kill("fedspan.site.worker", site="client-1")
    up.configure(federation={"min_success": 2, "min_clients": 2}, deployment={"wait": 60})
    second = run(up, "edited")
    (line,) = {line.partition(" (incident")[0] for line in second.said("is not taken in") if "client-1" in line}
    assert "its settings, its base or its data cannot be used" in line
    assert f"{FILE}: line" in up.log("client-1")
    outcomes(
        "a line of a site's log is edited",
        "`fedspan log verify` names the line; the site's worker refuses to go on with the log; the run went on with "
        "the others",
        line,
        time.monotonic() - second.began,
    )
    log.write_bytes(whole)
    up.kill("fedspan.site.worker", site="client-1")


def test_a_site_is_upgraded_alone(up: Deployed, outcomes: Outcome) -> None:
    end(up, "client-2")
    time.sleep(65)  # or Flower takes the restart for a second node of this key
    place = Path(__file__).parent / "other_version"
    before = os.environ.get("PYTHONPATH", "")
    name = "client-2-upgraded"
    environment = {**up.environment, "PYTHONPATH": os.pathsep.join([str(place), before])}
    up.tree.start(name, ["./start.sh"], up.folder / "sites/client-2", environment)
    log = up.folder / "logs" / f"{name}.log"
    # On a busy machine its worker takes longer to load than the run waits for sites.
    until(lambda: "client-2 is ready" in log.read_text(errors="replace"), 240, "the upgraded worker is ready")
    up.configure(federation={"min_success": 2, "min_clients": 2}, deployment={"wait": 60})
    begun = run(up, "upgraded")
    lines = [line for line in begun.said("is not taken in") if "client-2" in line and "schema" in line]
    assert "both sides need the same version of fedspan" in lines[0]
    outcomes(
        "a site is upgraded to a version with another schema of messages",
        "asked it nothing, went on with the others",
        lines[0],
        time.monotonic() - begun.began,
    )


def test_two_sites_with_one_key(up: Deployed, tmp_path: Path, outcomes: Outcome) -> None:
    """At the server, where the second is not registered; and on two machines, where the second does not connect."""
    nodes = up.folder / "server/nodes"
    own = (nodes / "client-1.pub").read_bytes()
    (nodes / "client-1.pub").write_bytes((nodes / "client-0.pub").read_bytes())
    done = script(up, "./register.sh")
    (nodes / "client-1.pub").write_bytes(own)
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert "holds the same key as client-0: expected a different key for each site" in said

    twin = Path(
        shutil.copytree(up.folder / "sites/client-0", tmp_path / "twin", ignore=shutil.ignore_patterns("*.sock"))
    )
    for path in (twin / "start.sh", twin / "environment.sh"):
        path.write_text(path.read_text().replace(f" {up.plan.sites[0].runtime_port}", f" {trial.free_ports(1)[0]}"))
    began = time.monotonic()
    second = subprocess.run(
        ["./start.sh"],
        cwd=twin,
        env={**os.environ, **up.environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert second.returncode == 1
    assert up.ended("client-0") is None
    outcomes(
        "two sites have one node key",
        "`register.sh` refused the second, naming both; a copy of a connected site's folder ended when it was started, "
        "and the first stayed connected",
        said.rpartition("/")[2],
        time.monotonic() - began,
    )


def test_the_servers_certificate_has_expired(up: Deployed, monkeypatch: pytest.MonkeyPatch, outcomes: Outcome) -> None:
    up.kill("fedspan.flower.superlink")
    until(lambda: up.ended("superlink") is not None, 30, "the SuperLink's end")
    monkeypatch.setattr(certificates, "SERVER_DAYS", 1 / 30)
    authority = KeyPair((up.folder / "ca/ca.key").read_bytes(), (up.folder / "ca/ca.crt").read_bytes())
    expired = certificates.server_certificate(authority, ["localhost"])
    (up.folder / "server/server.crt").write_bytes(expired.public)
    (up.folder / "server/server.key").write_bytes(expired.private)
    began = time.monotonic()
    done = script(up, "./superlink.sh")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]
    assert "server.crt has expired on" in said
    took = time.monotonic() - began
    monkeypatch.undo()
    rotate = [sys.executable, "-m", "fedspan", "flower", "keys", "rotate", ".", "--ca", "../ca"]
    assert script(up, *rotate).returncode == 0
    up.start("superlink")
    outcomes(
        "the server's certificate has expired",
        "the SuperLink did not start; after `fedspan flower keys rotate` it did",
        said.partition("/server/")[2] or said,
        took,
    )
