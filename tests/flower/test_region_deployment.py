"""The folder of a federation in regions: every machine's files, and settings and names that cannot be one."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedspan.cli.flower import app
from fedspan.config import load
from fedspan.flower import deployment
from fedspan.flower.region_app import _region
from fedspan.support.errors import FedspanError

NORTH, SOUTH = ["--region", "north=mayo,ucl"], ["--region", "south=charite,bern"]
METHOD = ["--set", "method.name=glora_sums", "--set", "privacy.secure_sums=true"]
SECRET = {"ca.key", "server.key", "node.key", "identity.key", "runtime.key"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployments") / "tree"
    hosts = ["--host", "top.example.org", "--region-host", "north=north.example.org"]
    done = CliRunner().invoke(app, ["init", str(folder), *NORTH, *SOUTH, *hosts, *METHOD])
    assert done.exit_code == 0, done.output
    return folder


def test_every_machine_gets_its_own_folder_and_keys(made: Path) -> None:
    files = {str(path.relative_to(made)): path for path in made.rglob("*") if path.is_file()}
    keys = [path.read_bytes() for path in files.values() if path.name in SECRET]
    # Of three servers, two ways up, and four sites.
    assert len(keys) == len(set(keys)) == 3 * 2 + 2 * 2 + 4 * 3
    assert not (made / "sites").exists()
    uplink = {path.name for path in (made / "regions/north/uplink").iterdir()}
    assert uplink == {"start.sh", "environment.sh", "ca.crt", "node.key", "node.pub", "runtime.key"}
    assert (made / "regions/north/uplink/ca.crt").read_bytes() == (made / "server/ca.crt").read_bytes()
    assert (made / "regions/north/sites/mayo/ca.crt").read_bytes() != (made / "server/ca.crt").read_bytes()
    assert json.loads((made / "server/clients.json").read_text()) == {"north": "north", "south": "south"}
    known = json.loads((made / "regions/south/server/clients.json").read_text())
    assert known == {"charite": "client-2", "bern": "client-3"}
    for script in ("server/serve.sh", "server/superlink.sh", "uplink/start.sh", "sites/mayo/start.sh"):
        subprocess.run(["sh", "-n", str(made / "regions/north" / script)], check=True)
    assert not (made / "regions/north/server/run.sh").exists()


def test_a_regions_script_starts_its_own_app_under_a_name_that_can_be_one(made: Path, tmp_path: Path) -> None:
    server = shutil.copytree(made / "regions/north/server", tmp_path / "server")
    (tmp_path / "flwr").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >../asked\n')
    (tmp_path / "flwr").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    for given, status, name in (([], 0, "region"), (["b-2"], 0, "b-2"), (["../x"], 2, None)):
        (tmp_path / "asked").unlink(missing_ok=True)
        done = subprocess.run([server / "serve.sh", *given], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr.startswith("run name ../x: expected")) == (status, name is None)
        asked = (tmp_path / "asked").read_text().splitlines() if name else None
        assert asked == (["run", "app", "fedspan", "--stream", "-c", f'run-name="{name}"'] if name else None)
    port = deployment.read(made / "regions/north").superlink_port
    assert f'address = "127.0.0.1:{port}"' in (server / "flwr/config.toml").read_text()


def test_all_have_one_table_of_regions_and_regions_run_their_own_app(made: Path) -> None:
    regions = {"north": ("client-0", "client-1"), "south": ("client-2", "client-3")}
    settings = list(made.rglob("config.toml"))
    assert len(settings) == 3 + 4
    assert all(load(path).deployment.regions == regions for path in settings)
    above, below = (made / folder / "server/app/pyproject.toml" for folder in ("", "regions/north"))
    assert 'serverapp = "fedspan.flower.server_app:app"' in above.read_text()
    assert 'serverapp = "fedspan.flower.region_app:app"' in below.read_text()
    assert "--region" in (made / "regions/north/uplink/start.sh").read_text()
    assert "--region" not in (made / "regions/north/sites/mayo/start.sh").read_text()
    found = _region(made / "regions/north/server")
    assert found == ("north", (made / "regions/north/uplink").resolve())
    with pytest.raises(FedspanError, match="of a region's server"):
        _region(made / "server")


def test_no_two_processes_of_one_machine_share_a_port(made: Path) -> None:
    folders = deployment.regions_in(made)
    assert [path.name for path in folders] == ["north", "south"]
    plans = [deployment.read(path) for path in (made, *folders)]
    assert [plan.port for plan in plans] == [8443, 8445, 8447]
    assert [plan.hosts[0] for plan in plans] == ["top.example.org", "north.example.org", "localhost"]
    ports = [port for plan in plans for port in (plan.port, plan.superlink_port)]
    ports += [site.runtime_port for plan in plans for site in plan.sites]
    assert len(ports) == len(set(ports)) == 3 * 2 + 2 + 4


def test_compose_files_of_every_machine_hold_together(made: Path) -> None:
    """All that a region's services run and mount is there, their ports are its proxy's, and the way up leads above."""
    for number, name in enumerate(("north", "south"), 1):
        region = made / "regions" / name
        services = yaml.safe_load((region / "compose.yml").read_text())["services"]
        assert set(services) == {"superlink", "proxy", "register", "serve", "uplink"}
        port = 8443 + 2 * number
        assert [s["ports"] for s in services.values() if "ports" in s] == [[f"{port}:{port}"]]
        for service in services.values():
            mounted = dict(volume.split(":")[1::-1] for volume in service["volumes"])
            inside = region / mounted[service["working_dir"]]
            script = (service.get("entrypoint") or service["command"])[0]
            assert (inside / script).stat().st_mode & 0o100
            assert all((region / host).exists() for host in mounted.values())
            assert set(service.get("depends_on", ())) <= set(services)
            assert "build" not in service or (region / service["build"] / "Dockerfile").exists()
        app, up = services["superlink"], services["uplink"]
        assert "./uplink:/region/uplink" in set(app["volumes"]) & set(up["volumes"]), "they share a socket"
        assert app["user"] == up["user"], "whose other end each of them checks"
        assert up["environment"] == {"FEDSPAN_SERVER": "${FEDSPAN_SERVER:-top.example.org:8443}"}
        assert f"listen 0.0.0.0:{port} ssl;" in (region / "server/container/listen.conf").read_text()
    assert (made / "server/compose.yml").exists()
    assert (made / "regions/north/sites/mayo/compose.yml").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            [*NORTH, "--region", "south=ucl,bern", *METHOD],
            "--region south=ucl,bern: ucl is in north already",
        ),
        (["--region", "north", *METHOD], "--region north: expected NAME=SITE,SITE"),
        ([*NORTH, *NORTH, *METHOD], "--region north is given twice"),
        (["--region", "No=a,b", *METHOD], "--region No=a,b: the name 'No': expected lower-case letters"),
        (["--region", "=a,b", *METHOD], "--region =a,b: the name '': expected lower-case letters"),
        ([*NORTH, *SOUTH, "--set", "method.name=local", *METHOD[2:]], "is a control for one process"),
        ([*NORTH, "--region", "ucl=bern,charite", *METHOD], "--region ucl=…: a site has this name"),
        ([*NORTH, "--sites", "2", *METHOD], "--sites 2 with --region"),
        ([*NORTH, *SOUTH], "the server of glora needs every client's own update"),
        ([*NORTH, "--region", "south=bern", *METHOD], "south has 1 of the clients; expected at least 2"),
        ([*NORTH, *SOUTH, "--region-host", "west=h", *METHOD], "--region-host west=h: expected REGION=NAME"),
        (["--region-host", "north=h"], "expected --region too"),
        (["--set", "deployment.regions={north = ['client-0']}", "--sites", "1"], "deployment.regions is set"),
    ],
)
def test_what_is_no_federation_in_regions_is_refused(tmp_path: Path, words: list[str], reason: str) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "tree"), *words])
    assert isinstance(done.exception, FedspanError), done.output
    assert reason in str(done.exception)
    assert not (tmp_path / "tree").exists()
