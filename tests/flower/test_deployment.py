"""A deployment's folder: what is in it, who may read it, and whether other programs agree that it is right."""

import errno
import json
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner

from fedspan.cli.flower import app
from fedspan.config import load
from fedspan.data.load import load as load_corpus
from fedspan.federation.client_names import numbered_ids
from fedspan.federation.clients import make_clients
from fedspan.flower import certificates, deployment, node_keys, trial
from fedspan.flower.log_levels import ENVIRONMENT
from fedspan.flower.node_clients import NodeClients
from fedspan.site.settings import SiteSettings

SITES = ("charite", "mayo", "ucl")
HOSTS = ("fed.example.org", "10.0.0.5", "::1")
SECRET = {"ca.key", "server.key", "node.key", "identity.key", "runtime.key"}


def config(num_clients: int = len(SITES), *settings: str):
    return load(overrides=[f"federation.num_clients={num_clients}", *settings])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployments") / "fed"
    deployment.write(folder, deployment.plan(SITES, HOSTS), config())
    return folder


def files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_site_gets_its_own_keys_and_nobody_elses(made: Path) -> None:
    keys = [path.read_bytes() for name, path in files(made).items() if path.name in SECRET]
    assert len(keys) == 2 + 3 * len(SITES)
    assert len(set(keys)) == len(keys)
    everything = {name: path.read_bytes() for name, path in files(made).items()}
    for name in SITES:
        own = {path: content for path, content in everything.items() if path.startswith(f"sites/{name}/")}
        assert {Path(path).name for path in own} >= {
            *(
                "site.toml",
                "config.toml",
                "ca.crt",
                "node.key",
                "node.pub",
                "identity.key",
                "runtime.key",
                "sites.json",
            ),
            *("start.sh", "environment.sh", "compose.yml"),
        }
        for key in keys:
            assert (key in own.values()) == any(key == own[path] for path in own if Path(path).name in SECRET)
        assert everything[f"server/nodes/{name}.pub"] == own[f"sites/{name}/node.pub"]
    # The authority's key is in its own folder alone, and no site's secret is at the server.
    assert [name for name, content in everything.items() if content == everything["ca/ca.key"]] == ["ca/ca.key"]
    assert {path.name for path in (made / "server").rglob("*.key")} == {"server.key"}


def test_secrets_are_their_owners_alone_and_scripts_can_be_run(made: Path) -> None:
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    for name, path in files(made).items():
        mode = stat.S_IMODE(path.stat().st_mode)
        private = b"PRIVATE KEY" in path.read_bytes() or path.name == "runtime.key"
        assert private == (path.name in SECRET), name
        runs = name.endswith(".sh") and path.name not in ("environment.sh", "flwr_command.sh")
        assert mode == (0o600 if private else 0o755 if runs else 0o644), name


def test_a_strange_umask_changes_no_mode(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.umask(int(sys.argv[2], 8))\nfrom pathlib import Path\n"
        "from fedspan.config import load; from fedspan.flower import deployment\n"
        "deployment.write(Path(sys.argv[1]), deployment.plan(['a']), load(overrides=['federation.num_clients=1']))"
    )
    for mask in ("000", "077"):
        folder = tmp_path / mask
        subprocess.run([sys.executable, "-c", code, str(folder), mask], check=True)
        assert stat.S_IMODE((folder / "server/server.key").stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "server/superlink.sh").stat().st_mode) == 0o755
        assert stat.S_IMODE((folder / "sites").stat().st_mode) == 0o700


def test_openssl_accepts_the_certificates_under_every_name(made: Path) -> None:
    server, ca = made / "server/server.crt", made / "server/ca.crt"

    def verified(*options: str) -> bool:
        command = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            "sslserver",
            "-CAfile",
            str(ca),
            *options,
            str(server),
        ]
        return subprocess.run(command, capture_output=True).returncode == 0

    assert verified()
    for host in ("fed.example.org", "localhost", "superlink"):
        assert verified("-verify_hostname", host), host
    for address in ("10.0.0.5", "::1", "127.0.0.1"):
        assert verified("-verify_ip", address), address
    assert not verified("-verify_hostname", "other.example.org")
    assert not verified("-verify_ip", "10.0.0.6")


def test_certificates_say_no_more_than_they_should(made: Path) -> None:
    ca = x509.load_pem_x509_certificate((made / "ca/ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((made / "server/server.crt").read_bytes())
    now = datetime.now(UTC)
    assert round((server.not_valid_after_utc - now).total_seconds() / 86400) == 825
    assert ca.not_valid_after_utc > server.not_valid_after_utc
    assert server.not_valid_before_utc < now
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    key = load_pem_private_key((made / "server/server.key").read_bytes(), None)
    assert key.public_key() == server.public_key()


def test_a_server_certificate_cannot_vouch_for_others(tmp_path: Path) -> None:
    """The server's key is not enough to make certificates that sites would accept."""
    authority = certificates.certificate_authority("a")
    server = certificates.server_certificate(authority, ["localhost"])
    forged = certificates.server_certificate(server, ["evil.example.org"])
    for name, content in {"ca": authority.public, "server": server.public, "forged": forged.public}.items():
        (tmp_path / name).write_bytes(content)
    command = ["openssl", "verify", "-CAfile", str(tmp_path / "ca"), "-untrusted", str(tmp_path / "server")]
    assert subprocess.run([*command, str(tmp_path / "server")], capture_output=True).returncode == 0
    assert subprocess.run([*command, str(tmp_path / "forged")], capture_output=True).returncode != 0


def test_ssh_keygen_reads_the_node_keys(made: Path, tmp_path: Path) -> None:
    for name in SITES:
        key = made / "sites" / name / "node.key"
        result = subprocess.run(["ssh-keygen", "-y", "-f", str(key)], capture_output=True, text=True, check=True).stdout
        public = (made / "server" / "nodes" / f"{name}.pub").read_text()
        assert result.split()[:2] == public.split()[:2]
        assert public.split() == ["ecdsa-sha2-nistp384", public.split()[1], name]
    assert sorted(node_keys.read_keys(made / "server" / "nodes")) == sorted(SITES)


def test_identities_are_those_of_the_clients_as_a_run_names_them(made: Path) -> None:
    ids = numbered_ids(len(SITES))
    for name, client_id in zip(SITES, ids, strict=True):
        site = made / "sites" / name
        result = tomllib.loads((site / "site.toml").read_text())
        assert result == {"client_id": client_id, "identity": "identity.key"}
        read = SiteSettings.read(site)  # as a site reads its folder
        assert (read.client_id, read.rank, read.own_data) == (client_id, None, False)
        public = load_pem_private_key((site / result["identity"]).read_bytes(), None).public_key().public_bytes_raw()
        known = json.loads((site / "sites.json").read_text())
        assert sorted(known) == list(ids)
        assert bytes.fromhex(known[client_id]) == public
        assert read.trusted is not None
        assert read.trusted[client_id] == public


@pytest.mark.parametrize("count", [1, 10, 11])
def test_client_ids_are_those_of_a_run_in_one_process(count: int) -> None:
    settings = config(count, "federation.partition='iid'")
    corpus = load_corpus(settings.data, settings.seed)
    clients = make_clients(corpus, settings.federation, settings.seed, settings.data.client_holdout)
    assert [client.client_id for client in clients] == list(numbered_ids(count))


def test_sites_are_called_after_the_training_files(tmp_path: Path) -> None:
    """With the client ids that a run in one process has, whatever the sites' order; by order for other names."""
    files = ("ucl.csv", "charite.csv", "Mayo_2.csv")
    named = load(overrides=[f"data.train={json.dumps(files)}"])
    assert deployment.named_sites(named) == {"ucl": "ucl", "charite": "charite", "mayo-2": "Mayo_2"}
    sites = ["charite", "mayo-2", "ucl"]
    assert deployment.clients_of(named, sites) == ["charite", "Mayo_2", "ucl"]
    assert deployment.clients_of(named, ["a", "b", "c"]) == ["ucl", "charite", "Mayo_2"]
    with pytest.raises(ValueError, match=r"sites ucl, mayo, x: the training files are called ucl, charite, mayo-2;"):
        deployment.clients_of(named, ["ucl", "mayo", "x"])
    assert deployment.clients_of(config(), SITES) == list(numbered_ids(3))
    done = CliRunner().invoke(app, ["init", str(tmp_path / "fed"), "--set", f"data.train={json.dumps(files)}"])
    assert done.exit_code == 0, done.output
    assert "3 sites: ucl, charite, mayo-2" in done.output
    read = deployment.read(tmp_path / "fed")
    assert [(site.name, site.client_id) for site in read.sites] == list(deployment.named_sites(named).items())
    assert SiteSettings.read(tmp_path / "fed/sites/mayo-2").client_id == "Mayo_2"
    for wrong, said in ((("charité.csv", "b.csv"), "charité"), (("a/x.csv", "b/a/x.csv"), "called 'a'")):
        with pytest.raises(ValueError, match=said):
            deployment.named_sites(load(overrides=[f"data.train={json.dumps(wrong)}"]))


def test_configurations_are_the_same_everywhere_and_complete(made: Path) -> None:
    server = load(made / "server/config.toml")
    assert server == config()
    for name in SITES:
        assert load(made / "sites" / name / "config.toml") == server


def test_nothing_names_this_machine(made: Path) -> None:
    strange = [re.escape(str(place)) for place in (made, Path.home(), Path(sys.prefix))]
    strange.append(rf"\b{re.escape(socket.gethostname())}\b")
    for name, path in files(made).items():
        if path.name in SECRET or path.suffix in (".crt", ".pub"):  # what looks like words there is none
            continue
        text = path.read_text()
        assert not [word for word in strange if re.search(word, text)], name
        assert not re.search(r"@[A-Z_]+@", text), name
    assert "fed.example.org:8443" in (made / "sites/mayo/start.sh").read_text()


def test_shells_parse_the_scripts(made: Path) -> None:
    for name, path in files(made).items():
        if name.endswith(".sh"):
            subprocess.run(["sh", "-n", str(path)], check=True)


def test_scripts_tell_flower_to_keep_to_itself(made: Path) -> None:
    for folder in (made / "server", made / "sites/ucl"):
        script = ". ./environment.sh; env; umask"
        given = {"PATH": "/usr/bin:/bin", "NO_PROXY": "a.org", "FLWR_INTERNAL_GRPC_CONTROL_API": "1"}
        result = subprocess.run(["sh", "-c", script], cwd=folder, env=given, capture_output=True, text=True, check=True)
        lines = result.stdout.splitlines()
        assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} <= set(lines)
        assert f"FLWR_HOME={folder}/flwr" in lines
        assert {"NO_PROXY=localhost,127.0.0.1,a.org", "no_proxy=localhost,127.0.0.1,a.org"} <= set(lines)
        assert not [line for line in lines if line.startswith("FLWR_INTERNAL_GRPC")]
        assert lines[-1] == "0077"
    superlink = (made / "server/superlink.sh").read_text()
    assert "--enable-supernode-auth --disable-runtime-dependency-installation" in superlink
    # Without it, any user of a site's machine could take the site's messages.
    assert (made / "sites/ucl/start.sh").read_text().count('--superexec-auth-secret-file "$PWD/runtime.key"') == 2


def test_a_strange_run_name_is_refused(made: Path) -> None:
    for name in ("../x", 'a"b', ".hidden", "a b", "-x", "x" * 65):
        done = subprocess.run([made / "server/run.sh", name], capture_output=True, text=True)
        assert (done.returncode, done.stderr.startswith("run name")) == (2, True), name
        with pytest.raises(ValueError, match=r"--run = .*: expected at most 64"):
            trial.up(made, print, proxy="python", run=name)
    shutil.rmtree(made / "server/flwr")


def flwr_that(does: str, folder: Path) -> dict[str, str]:
    """Return an environment in which the command `flwr` is this line of shell."""
    (folder / "flwr").write_text(f"#!/bin/sh\n{does}\n")
    (folder / "flwr").chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_the_exit_status_of_a_run_says_whether_it_has_a_result(made: Path, tmp_path: Path) -> None:
    server = shutil.copytree(made / "server", tmp_path / "server")
    for does, status in (("exit 0", 1), ("exit 7", 7), ("mkdir runs/x; touch runs/x/summary.json", 0)):
        done = subprocess.run([server / "run.sh", "x"], env=flwr_that(does, tmp_path), capture_output=True, text=True)
        assert done.returncode == status, does
        assert ("the run x has no result" in done.stderr) == (status == 1)


def test_a_run_that_is_no_longer_shown_leaves_no_process(made: Path, tmp_path: Path) -> None:
    server = shutil.copytree(made / "server", tmp_path / "server")
    environment = flwr_that("echo $$ >../pid; exec sleep 600", tmp_path)
    shown = subprocess.Popen([server / "run.sh"], env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < until
        time.sleep(0.05)
    shown.terminate()
    _, said = shown.communicate(timeout=60)
    assert (shown.returncode, said) == (143, "the run federation goes on without this display\n")
    while Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/cmdline").exists():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
def test_nginx_takes_its_configuration(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    shutil.copytree(made / "server", folder)
    (folder / "state").mkdir()
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    command = [nginx, "-t", "-p", str(folder), "-e", "stderr", "-c", str(folder / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "server.crt").unlink()
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_a_deployment_for_one_machine_listens_to_it_alone(made: Path, tmp_path: Path) -> None:
    assert (made / "server/listen.conf").read_text() == "listen 0.0.0.0:8443 ssl;\n"
    deployment.write(tmp_path / "here", deployment.plan(["a"]), config(1))
    assert (tmp_path / "here/server/listen.conf").read_text() == "listen 127.0.0.1:8443 ssl;\n"
    assert not deployment.plan(["a"], ["localhost", "0.org"]).local
    assert "--host 127.0.0.1" in (made / "server/superlink.sh").read_text()


@pytest.mark.parametrize(
    ("hosts", "addresses"),
    [
        (["2001:db8::1"], ["0.0.0.0", "[::]"]),
        (["fed.example.org", "2001:db8::1"], ["0.0.0.0", "[::]"]),
        (["::1"], ["127.0.0.1", "[::1]"]),
    ],
)
def test_a_server_with_an_ipv6_address_listens_there_too(
    tmp_path: Path, hosts: list[str], addresses: list[str]
) -> None:
    deployment.write(tmp_path / "fed", deployment.plan(["a"], hosts), config(1))
    lines = (tmp_path / "fed/server/listen.conf").read_text().splitlines()
    assert lines == [f"listen {address}:8443 ssl;" for address in addresses]
    options = " ".join(f"--host {address.strip('[]')}" for address in addresses)
    assert f"fedspan.flower.proxy {options} --port 8443" in (tmp_path / "fed/server/proxy.sh").read_text()


def test_compose_files_hold_together(made: Path) -> None:
    top = yaml.safe_load((made / "docker-compose.yml").read_text())
    assert top["include"] == ["server/compose.yml"]
    server = yaml.safe_load((made / "server/compose.yml").read_text())["services"]
    assert set(top["services"]) == set(SITES)
    for name, service in top["services"].items():
        extended = service["extends"]
        site = yaml.safe_load((made / extended["file"]).read_text())["services"][extended["service"]]
        assert (made / "sites" / name / site["command"][0]).stat().st_mode & 0o100
        assert (made / "sites" / name / site["build"] / "Dockerfile").exists()
        assert "ports" not in site, "nobody connects to a site"
        assert set(service["depends_on"]) <= set(server)
    # The proxy's is the only open port; the control API stays inside.
    assert [service["ports"] for service in server.values() if "ports" in service] == [["8443:8443"]]
    for name, service in server.items():
        script = (service.get("entrypoint") or service["command"])[0]
        assert (made / "server" / script).exists(), name


def test_the_bundle_carries_no_code_and_flower_takes_it(made: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.config import get_fab_config

    assert [path.name for path in (made / "server/app").iterdir()] == ["pyproject.toml"]
    result = get_fab_config(build_fab_from_disk(made / "server/app"))
    assert result["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "fedspan.flower.server_app:app",
        "clientapp": "fedspan.flower.client_app:app",
    }


def test_read_gives_back_what_was_planned(made: Path, tmp_path: Path) -> None:
    assert deployment.read(made) == deployment.plan(SITES, HOSTS)
    with pytest.raises(ValueError, match=r"holds no deployment: expected a folder made by `fedspan flower init`"):
        deployment.read(tmp_path)


def test_a_site_makes_its_own_keys(made: Path, tmp_path: Path) -> None:
    site = tmp_path / "mayo"
    shutil.copytree(made / "sites/mayo", site)
    before = {path.name: path.read_bytes() for path in site.iterdir() if path.is_file()}
    client_id, public = deployment.renew_keys(site)
    after = {path.name: path.read_bytes() for path in site.iterdir() if path.is_file()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"node.key", "node.pub", "identity.key", "runtime.key", "sites.json"}
    assert set(after) == set(before)
    assert all(stat.S_IMODE((site / name).stat().st_mode) == 0o600 for name in changed & SECRET)
    key = load_pem_private_key(after["identity.key"], None)
    assert bytes.fromhex(public) == key.public_key().public_bytes_raw()
    known, old = json.loads(after["sites.json"]), json.loads(before["sites.json"])
    assert known == {**old, client_id: public} != old
    with pytest.raises(ValueError, match="is not a site's folder"):
        deployment.renew_keys(tmp_path)


def test_keys_are_renewed_together_or_not_at_all(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = shutil.copytree(made / "sites/ucl", tmp_path / "ucl")
    before = {name: path.read_bytes() for name, path in files(site).items()}
    write, names = deployment._write_new, []

    def full(path: Path, content: bytes, mode: int) -> None:
        write(path, content[:7], mode)
        names.append(path)
        if len(names) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(deployment, "_write_new", full)
    with pytest.raises(ValueError, match=r"ucl keeps its old keys, .*: No space left on device"):
        deployment.renew_keys(site)
    assert {name: path.read_bytes() for name, path in files(site).items()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_keys_that_root_renews_belong_to_the_site(made: Path, tmp_path: Path) -> None:
    site = shutil.copytree(made / "sites/ucl", tmp_path / "ucl")
    os.chown(site, 2001, 2002)
    deployment.renew_keys(site)
    for name in ("node.key", "node.pub", "identity.key", "runtime.key", "sites.json"):
        status = (site / name).stat()
        assert (status.st_uid, status.st_gid) == (2001, 2002), name


REFUSED = [
    ({"sites": []}, "no sites: expected at least one"),
    ({"sites": ["a", "b", "a"]}, "site 'a' is named twice"),
    ({"sites": ["../a"]}, "expected lower-case letters"),
    ({"sites": ["A"]}, "expected lower-case letters"),
    ({"sites": [""]}, "expected lower-case letters"),
    ({"sites": ["a" * 33]}, "expected lower-case letters"),
    ({"sites": ["a"], "port": 0}, "port 0: expected one between 1 and 65535"),
    ({"sites": ["a"], "port": 65535}, "port 65536, the SuperLink's: expected one"),
    ({"sites": ["a"], "port": 8601}, "collides with"),
    ({"sites": ["a"], "hosts": ["x;y"]}, "host 'x;y': expected a DNS name or an IP address"),
    ({"sites": ["a"], "hosts": ["1.2.3"]}, "host '1.2.3'"),
    ({"sites": ["a"], "hosts": ["-x.org"]}, "host '-x.org'"),
    ({"sites": ["a"], "hosts": ["x.org:1"]}, "host 'x.org:1'"),
    ({"sites": ["a"], "hosts": ["fe80::1%eth0"]}, "host 'fe80::1%eth0'"),
    ({"sites": ["a"], "hosts": ["0.0.0.0"]}, "host '0.0.0.0'"),
    ({"sites": ["a"], "hosts": ["::"]}, "host '::'"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        deployment.write(tmp_path / "fed", deployment.plan(**given), config(max(1, len(given["sites"]))))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_and_another_number_of_clients_are_refused(tmp_path: Path) -> None:
    plan = deployment.plan(["a"])
    with pytest.raises(ValueError, match=r"federation.num_clients = 3: expected 1, one for each site"):
        deployment.write(tmp_path / "fed", plan, config(3))
    (tmp_path / "fed").mkdir()
    deployment.write(tmp_path / "fed", plan, config(1))  # an empty one is as good as none
    before = {name: path.read_bytes() for name, path in files(tmp_path).items()}
    with pytest.raises(ValueError, match="exists and is not empty: expected a new folder"):
        deployment.write(tmp_path / "fed", plan, config(1))
    assert {name: path.read_bytes() for name, path in files(tmp_path).items()} == before


def test_a_name_that_cannot_become_a_new_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "broken").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "empty")
    for folder in (tmp_path / "link", tmp_path / "broken", Path(".")):
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(folder))} cannot be written .*: expected the name of a new"
        ):
            deployment.write(folder, deployment.plan(["a"]), config(1))
    assert sorted(tmp_path.rglob("*")) == before


def test_sites_are_named_once_however_many_there_are() -> None:
    with pytest.raises(ValueError, match="port 65536, a site's"):
        deployment.plan([f"s{k}" for k in range(10**6)])  # the square of that takes hours


def test_an_interrupted_init_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(certificates, "identity_key", broken)
    with pytest.raises(KeyboardInterrupt):
        deployment.write(tmp_path / "fed", deployment.plan(["a"]), config(1))
    assert list(tmp_path.iterdir()) == []


def test_tls_with_the_certificates_works_and_a_stranger_is_refused(made: Path, tmp_path: Path) -> None:
    """Python's own TLS, on a socket pair."""

    def shake(ca: bytes, name: str) -> None:
        (tmp_path / "trusted").write_bytes(ca)
        trust = ssl.create_default_context(cafile=str(tmp_path / "trusted"))
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(made / "server/server.crt", made / "server/server.key")
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trust.wrap_bio(to_client, to_server, server_hostname=name)
        server = own.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(3):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue

    ca = (made / "ca/ca.crt").read_bytes()
    shake(ca, "fed.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(ca, "other.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(certificates.certificate_authority("another").public, "fed.example.org")


def test_the_command_writes_a_deployment(tmp_path: Path) -> None:
    runner, folder = CliRunner(), tmp_path / "fed"
    done = runner.invoke(app, ["init", str(folder), "--sites", "north, south", "--host", "fed.example.org"])
    assert done.exit_code == 0, done.output
    assert deployment.read(folder) == deployment.plan(["north", "south"], ["fed.example.org"])
    assert load(folder / "server/config.toml").federation.num_clients == 2
    refused = runner.invoke(app, ["init", str(folder), "--sites", "2"])
    assert isinstance(refused.exception, ValueError)
    assert "exists and is not empty" in str(refused.exception)
    for sites, said in (("0", "expected at least one"), ("a,,b", "expected lower-case letters")):
        refused = runner.invoke(app, ["init", str(tmp_path / "other"), "--sites", sites])
        assert said in str(refused.exception)
    # A method that cannot run under these settings is refused now, not after the folders were sent to the sites.
    impossible = ["--sites", "2", "--set", "method.name=flora", "--set", "federation.sums_only=true"]
    assert isinstance(runner.invoke(app, ["init", str(tmp_path / "other"), *impossible]).exception, ValueError)
    assert not (tmp_path / "other").exists()


def test_a_trial_refuses_what_is_no_trial(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is a deployment for fed.example.org: expected one for localhost"):
        trial.up(made, print, proxy="python")
    trial.prepare(tmp_path / "here", ["a"], config(1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", deployment.read(tmp_path / "here").port))
        taken.listen()
        with pytest.raises(ValueError, match="is in use: expected it to be free"):
            trial.up(tmp_path / "here", print, proxy="python")
    with pytest.raises(ValueError, match="proxy 'apache': expected nginx, python, or auto"):
        trial.choose_proxy("apache")
    monkeypatch.setattr(trial, "program_path", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"nginx is not installed: install it .* or use .* --proxy python"):
        trial.choose_proxy("nginx")
    assert trial.choose_proxy("auto") == "python"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["hosts"], [], "hosts is empty"),
        (["hosts"], ["not a host"], "host 'not a host'"),
        (["hosts"], [5], "host 5: expected a DNS name"),
        (["hosts"], 5, "holds no deployment"),
        (["hosts"], "localhost", "holds no deployment"),
        (["hosts"], {"localhost": 1}, "holds no deployment"),
        (["port"], "8443; rm -rf /", "port '8443; rm -rf /': expected one between"),
        (["port"], 70000, "port 70000"),
        (["port"], True, "port True"),
        (["superlink_port"], None, "port None"),
        (["superlink_port"], 8443, "port 8443 collides"),
        (["sites"], [], "no sites"),
        (["sites", 0, "name"], "../mayo", "site '../mayo'"),
        (["sites", 0, "name"], 3, "site 3"),
        (["sites", 0, "name"], "mayo", "site 'mayo' is named twice"),
        (["sites", 0, "client_id"], 'x"; y', "client_id 'x\"; y'"),
        (["sites", 0, "client_id"], "client-1", "client_id 'client-1' is given twice"),
        (["sites", 0, "runtime_port"], -1, "port -1"),
        (["sites", 0], "mayo", "holds no deployment"),
    ],
)
def test_an_edited_record_is_checked(
    made: Path, tmp_path: Path, path: list[str | int], value: object, expected: str
) -> None:
    record = json.loads((made / "deployment.json").read_text())
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "deployment.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        deployment.read(tmp_path)
    assert "\n" not in str(refused.value)


def test_every_sites_key_is_bound_to_its_client_id(made: Path) -> None:
    bound = NodeClients(made / "server")
    keys = node_keys.read_keys(made / "server/nodes")
    assert [bound.client_of(keys[name]) for name in SITES] == list(numbered_ids(len(SITES)))
    with pytest.raises(ValueError, match=r"its key is not in .*nodes: expected the key of a site"):
        bound.client_of(b"another")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "holds something else"),
        ('{"charite": 3}', "holds something else"),
        ('{"charite": "a", "mayo": "a"}', "gives two sites one client id"),
        ('{"mayo": "a"}', "gives the site charite no client id"),
    ],
)
def test_damaged_bindings_are_refused(made: Path, tmp_path: Path, content: str | None, expected: str) -> None:
    shutil.copytree(made / "server/nodes", tmp_path / "nodes")
    if content is not None:
        (tmp_path / "clients.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        NodeClients(tmp_path).client_of(node_keys.read_keys(made / "server/nodes")["charite"])
    if "charite" not in expected:
        with pytest.raises(ValueError, match=expected):
            NodeClients(tmp_path).check()
