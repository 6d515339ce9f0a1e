"""The operation of a deployment: certificates that end, keys that are rotated, its state, its health page."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedspan.cli.main import main
from fedspan.config import load
from fedspan.events import fingerprints
from fedspan.events.chain import FILE
from fedspan.events.log import EventLog
from fedspan.flower import certificates, deployment, expiry, node, proxy, superlink
from fedspan.flower.health import HealthServer
from fedspan.flower.status import Status
from fedspan.support.errors import FedspanError

SITES = ["charite", "mayo"]
HOSTS = ["fed.example.org", "10.0.0.5"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operations") / "fed"
    deployment.write(folder, deployment.plan(SITES, HOSTS), load(overrides=["federation.num_clients=2"]))
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "fed"))


@pytest.fixture
def worked(made: Path) -> Path:
    """A deployment whose logs say that a run is in its second round."""
    server = EventLog(made / "server/runs/trial" / FILE, {"node": "server", "run_name": "trial"})
    for round_num in (1, 2):
        for client in ("client-0", "client-1"):
            server.append({"event": "sent", "to": client, "kind": "question", "round": round_num, "size": 100})
        server.append({"event": "received", "from": "client-0", "kind": "update", "round": round_num, "size": 50})
        server.append({"event": "received", "from": "client-1", "kind": "refusal", "code": "failed", "size": 7})
        rejected = {"client-1": "an error of its own"}
        server.append({"event": "round", "round": round_num, "num_clients": 1, "rejected": rejected})
    site = EventLog(made / "sites/mayo" / FILE, {"node": "client-1"})
    site.append({"event": "received", "from": "server", "round": 1, "size": 100})
    site.append({"event": "answered", "to": "server", "kind": "refusal", "code": "failed", "size": 7})
    return made


# Certificates


def ends(path: Path) -> datetime:
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc


@pytest.mark.parametrize("name", ["server.crt", "ca.crt"])
def test_a_certificate_is_announced_thirty_days_before_its_end_and_refused_after_it(original: Path, name: str) -> None:
    path = original / "server" / name
    end = ends(path)
    assert expiry.check([path], end - timedelta(days=30)) == []
    (line,) = expiry.check([path], end - timedelta(days=29, hours=1))
    assert f"{name} expires in 29 days, on {end:%Y-%m-%d}" in line
    assert expiry.check([path], end - timedelta(hours=1))[0].startswith(f"{path} expires in 0 days")
    with pytest.raises(FedspanError, match=rf"{name} has expired on .* UTC: expected a valid certificate; `?\S+"):
        expiry.check([path], end)
    with pytest.raises(FedspanError, match=r"is valid from .* on: expected this machine's clock to be right"):
        expiry.check([path], end - timedelta(days=9999))
    path = original / "README.md"
    with pytest.raises(FedspanError, match=r"cannot be read \(it holds none\): expected a certificate in PEM"):
        expiry.check([path])


def short_lived(made: Path, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Make certificates, of both kinds, whose validity ends in that many days."""
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "AUTHORITY_DAYS", days + 1 / 24)
        patch.setattr(certificates, "SERVER_DAYS", days + 1 / 24)
        authority = certificates.certificate_authority("a federation")
        server = certificates.server_certificate(authority, HOSTS)
    for folder in (made / "server", made / "ca", *(made / "sites").iterdir()):
        (folder / "ca.crt").write_bytes(authority.public)
    (made / "ca/ca.key").write_bytes(authority.private)
    (made / "server/server.crt").write_bytes(server.public)
    (made / "server/server.key").write_bytes(server.private)


def starts(made: Path) -> dict[str, list[str]]:
    server, site = made / "server", made / "sites/mayo"
    return {
        "superlink": [
            *("--nodes", str(server / "nodes"), "--ssl-ca-certfile", str(server / "ca.crt")),
            *("--ssl-certfile", str(server / "server.crt")),
        ],
        "proxy": [
            *("--host", "127.0.0.1", "--port", "1", "--upstream", "127.0.0.1:2", "--ca", str(server / "ca.crt")),
            *("--certificate", str(server / "server.crt"), "--key", str(server / "server.key")),
            *("--nodes", str(server / "nodes")),
        ],
        "node": ["--root-certificates", str(site / "ca.crt"), "--poll", "none"],
    }


MAINS = {"superlink": superlink.main, "proxy": proxy.main, "node": node.main}


@pytest.mark.parametrize("part", MAINS)
def test_neither_server_nor_site_starts_with_an_expired_certificate(
    made: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """And says so in one line, where TLS would say nothing that a person understands."""
    short_lived(made, monkeypatch, -0.01)
    arguments = [word for word in starts(made)[part] if word not in ("--poll", "none")]
    with pytest.raises(SystemExit, match=r"^error: \S+ has expired on .*; `fedspan|^error: \S+ has expired .*; a new"):
        MAINS[part](arguments)


@pytest.mark.parametrize("part", MAINS)
def test_server_and_site_warn_when_they_start(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    short_lived(made, monkeypatch, 12.5)

    class Started(Exception):
        pass

    def started(*args: object) -> None:
        raise Started

    # Whatever each does next.
    monkeypatch.setattr(superlink, "guard", started)
    monkeypatch.setattr(proxy, "_listening", started)
    monkeypatch.setattr(node, "shorten_sleeps", started)
    arguments = [word for word in starts(made)[part] if word not in ("--poll", "none")]
    with pytest.raises(Started):
        MAINS[part](arguments)
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == (1 if part == "node" else 2)
    assert all(line.startswith("warning: ") and "expires in 12 days" in line for line in warned)


# Rotation


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_servers_certificate_is_rotated_with_its_key(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(made)
    assert main(["flower", "keys", "rotate", str(made / "server"), "--ca", str(made / "ca")]) == 0
    said = capsys.readouterr().out
    after = content(made)
    assert {name for name in after if after[name] != before[name]} == {"server/server.crt", "server/server.key"}
    old, new = (x509.load_pem_x509_certificate(each["server/server.crt"]) for each in (before, after))
    names = [c.extensions.get_extension_for_class(x509.SubjectAlternativeName).value for c in (old, new)]
    assert set(names[0]) == set(names[1])
    assert old.subject == new.subject
    authority = x509.load_pem_x509_certificate(after["server/ca.crt"])
    key = authority.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(new.signature, new.tbs_certificate_bytes, new.signature_algorithm_parameters)
    assert new.public_key() != old.public_key()
    assert stat.S_IMODE((made / "server/server.key").stat().st_mode) == 0o600
    assert fingerprints.of_certificate(made / "server/server.crt") in said
    assert "start superlink.sh and proxy.sh again" in said


def test_a_sites_keys_are_rotated_where_they_are_used(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, before = made / "sites/mayo", content(made)
    assert main(["flower", "keys", "rotate", str(site)]) == 0
    said, after = capsys.readouterr().out, content(made)
    changed = {name.removeprefix("sites/mayo/") for name in after if after[name] != before[name]}
    assert changed == {"node.key", "node.pub", "identity.key", "runtime.key", "sites.json"}
    assert fingerprints.of_node_key(site / "node.pub") in said
    assert json.loads(after["sites/mayo/sites.json"])["client-1"] in said


def test_what_cannot_be_rotated_is_refused_and_left(
    made: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = tmp_path / "strange"
    deployment.write(strange, deployment.plan(SITES), load(overrides=["federation.num_clients=2"]))
    before = content(made)
    for arguments, expected in (
        (["server"], "is a server's folder: expected --ca DIR"),
        (["server", "--ca", str(strange / "ca")], "is not the"),
        (["server", "--ca", str(made / "sites/mayo")], "ca.key cannot be read (No such file or directory)"),
        (["sites/mayo", "--ca", str(made / "ca")], "expected it for a server's folder only"),
        (["nobody"], "is not a site's folder"),
    ):
        assert main(["flower", "keys", "rotate", str(made / arguments[0]), *arguments[1:]]) == 2
        assert expected in capsys.readouterr().err
    assert content(made) == before
    short_lived(made, monkeypatch, -0.01)
    assert main(["flower", "keys", "rotate", str(made / "server"), "--ca", str(made / "ca")]) == 2
    assert "ca.crt has expired" in capsys.readouterr().err


def test_fingerprints_are_those_of_ssh_and_openssl(original: Path) -> None:
    shown = subprocess.run(
        ["ssh-keygen", "-lf", original / "sites/mayo/node.pub"], capture_output=True, text=True, check=True
    ).stdout
    assert fingerprints.of_node_key(original / "sites/mayo/node.pub") == shown.split()[1]
    command = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", original / "server/server.crt"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = fingerprints.of_folder(original / "server")
    assert found["server.crt"] == shown.strip().rpartition("=")[2].replace(":", "").lower()
    assert found.keys() == {"ca.crt", "server.crt", "nodes/charite.pub", "nodes/mayo.pub"}


# State


def test_the_status_says_round_answers_refusals_last_event_and_certificates(
    worked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["flower", "status", str(worked)]) == 0
    said = capsys.readouterr().out
    assert "server (trial)  after round 2, last event round at 20" in said
    assert "answered in round 2: client-0\n" in said
    assert "left out in it: client-1: an error of its own" in said
    assert "refusals: 2 failed" in said
    assert f"server.crt until {ends(worked / 'server/server.crt'):%Y-%m-%d}" in said
    assert main(["flower", "status", str(worked / "sites/mayo"), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["healthy"], state["logs"][0]["node"], state["logs"][0]["refusals"]) == (
        True,
        "client-1",
        {"failed": 1},
    )
    assert main(["flower", "status", str(worked / "nowhere")]) == 2
    assert "holds neither events.jsonl nor certificates" in capsys.readouterr().err


def test_the_status_names_what_is_wrong(
    worked: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_lived(worked, monkeypatch, -0.01)
    log = worked / "sites/mayo" / FILE
    log.write_bytes(log.read_bytes().replace(b'"size":100', b'"size":101'))
    assert main(["flower", "status", str(worked)]) == 2
    done = capsys.readouterr()
    assert "has expired on" in done.err
    assert "a line was edited, cut, moved or added" in done.out
    assert "PROBLEM: " in done.out


# Health


@pytest.fixture
def health(worked: Path) -> Iterator[HealthServer]:
    with HealthServer(worked, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: HealthServer, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_health_and_metrics_follow_the_logs(health: HealthServer, worked: Path) -> None:
    code, text = get(health, "/health")
    assert (code, json.loads(text)["problems"]) == (200, [])
    assert "answered in round 2: client-0" in get(health, "/")[1]
    code, text = get(health, "/metrics")
    assert code == 200
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert samples["fedspan_healthy"] == "1.0"
    assert samples['fedspan_round{node="server",run="trial"}'] == "2.0"
    assert samples['fedspan_events_total{node="server",run="trial",event="sent"}'] == "4.0"
    assert samples['fedspan_refusals_total{node="client-1",code="failed"}'] == "1.0"
    assert samples['fedspan_received_bytes_total{node="server",run="trial"}'] == "114.0"
    end = float(samples['fedspan_certificate_expiry_timestamp_seconds{file="server/server.crt"}'])
    assert datetime.fromtimestamp(end, UTC) == ends(worked / "server/server.crt")
    told = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert {sample.partition("{")[0] for sample in samples} == set(told)
    assert len(told) == len(set(told))

    log = EventLog(worked / "server/runs/trial" / FILE, {"node": "server", "run_name": "trial"})
    log.append({"event": "round", "round": 3, "num_clients": 0, "rejected": {'a"\n': "x"}})
    assert 'fedspan_round{node="server",run="trial"} 3.0' in get(health, "/metrics")[1]
    with log.path.open("ab") as file:
        file.write(b'{"number":99}\n')
    code, text = get(health, "/health")
    assert (code, json.loads(text)["healthy"]) == (503, False)
    assert "fedspan_healthy 0.0" in get(health, "/metrics")[1]


def test_the_page_is_of_the_loopback_alone_and_for_no_other_name(health: HealthServer) -> None:
    assert health.server_address[0] == "127.0.0.1"
    assert get(health, "/metrics", "evil.example.org:9464") == (403, "forbidden\n")
    assert get(health, "/metrics", f"localhost:{health.server_port}")[0] == 200
    assert get(health, "/../etc/passwd")[0] == 404
    with pytest.raises(FedspanError, match=r"port \d+ cannot be used"):
        HealthServer(health.status.folder, health.server_port)


def test_the_page_of_a_script_ends_with_it(original: Path) -> None:
    """Whatever ends the script: nothing tells the page."""
    command = (
        f"{sys.executable} -m fedspan.flower.health {original / 'server'} --port 0 --parent $$ & echo $!; exec sleep 60"
    )
    shell = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    page = int(shell.stdout.readline())
    time.sleep(0.2)
    shell.kill()
    shell.wait()
    shell.stdout.close()
    end = time.monotonic() + 60
    while Path(f"/proc/{page}").exists() and "Z" not in Path(f"/proc/{page}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_deployment_that_has_not_begun_has_a_state(original: Path) -> None:
    state = Status(original / "server")
    assert state.problems() == []
    assert "no message yet" in list(state.lines())
    assert os.listdir(original / "server/runs") == []
