"""The lock of a deployment's packages, made and used by pip with a local folder of wheels as its only index."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedspan.cli.flower import app
from fedspan.config import load
from fedspan.flower import deployment, requirements_lock
from fedspan.support.versions import installed_version

VERSION = installed_version("fedspan")


def wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    """Write a wheel with one module and nothing else."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: flower\n{requires}"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for place, content in files.items():
            archive.writestr(place, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{place},,\n" for place in [*files, f"{info}/RECORD"]))
    return path


@pytest.fixture
def index(tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder, "fedspan", VERSION, 'Requires-Dist: Other_Part>=1; extra == "flower"\n')
    wheel(folder, "other_part", "1.5")
    return folder


def locked(folder: Path, index: Path) -> list[Path]:
    deployment.write(folder, deployment.plan(["a", "b"]), load(overrides=["federation.num_clients=2"]))
    result = CliRunner().invoke(app, ["lock", str(folder), "--find-links", str(index), "--no-index"])
    assert result.exit_code == 0, result.output
    return [Path(line) for line in result.output.splitlines()]


def install(lock: Path, index: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(index)]
    command += ["--require-hashes", "-r", str(lock), "--target", str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_lock_holds_every_package_with_its_hash_and_no_place(tmp_path: Path, index: Path) -> None:
    written = locked(tmp_path / "fed", index)
    assert [path.parent.parent.parent.name for path in written] == ["server", "a", "b"]
    text = written[0].read_text()
    assert {path.read_text() for path in written} == {text}
    hashes = {path.name.split("-")[0]: hashlib.sha256(path.read_bytes()).hexdigest() for path in index.glob("*.whl")}
    body = [line for line in text.splitlines() if not line.startswith("#")]
    assert body == [
        f"fedspan=={VERSION} \\",
        f"    --hash=sha256:{hashes['fedspan']}",
        "other-part==1.5 \\",
        f"    --hash=sha256:{hashes['other_part']}",
    ]
    for place in ("://", "file:", str(index), "index-url", "find-links"):
        assert place not in text


@pytest.mark.slow
def test_pip_installs_what_is_locked_and_refuses_another_file(tmp_path: Path, index: Path) -> None:
    lock = locked(tmp_path / "fed", index)[0]
    done = install(lock, index, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/other_part.py").read_text() == "version = '1.5'\n"
    with zipfile.ZipFile(index / "other_part-1.5-py3-none-any.whl", "a") as archive:
        archive.writestr("added.py", "")
    refused = install(lock, index, tmp_path / "other")
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_resolved_or_has_no_hash_is_refused_in_one_line(tmp_path: Path, index: Path) -> None:
    (index / "other_part-1.5-py3-none-any.whl").unlink()
    with pytest.raises(ValueError, match=r"^pip cannot resolve fedspan\[flower\].*Other_Part") as refused:
        requirements_lock.resolve(f"fedspan[flower]=={VERSION}", ["--no-index", "--find-links", str(index)])
    assert "\n" not in str(refused.value)
    package = {"metadata": {"name": "x", "version": "1"}, "download_info": {"dir_info": {}}}
    with pytest.raises(ValueError, match="pip gives no SHA-256 hash for x 1"):
        requirements_lock.render({"install": [package]})
    package["download_info"] = {"archive_info": {"hashes": {"sha256": "0" * 64}}}
    package["metadata"]["version"] = "1\n--index-url x"
    with pytest.raises(ValueError, match="expected a plain name"):
        requirements_lock.render(json.loads(json.dumps({"install": [package]})))
    with pytest.raises(ValueError, match="has no container/wheels"):
        requirements_lock.write(tmp_path)


@pytest.mark.parametrize(
    "archive", [{"hashes": {"sha256": "0" * 64}}, {"hash": "sha256=" + "0" * 64}], ids=["new", "old"]
)
def test_both_forms_in_which_pip_gives_a_hash_are_read(archive: dict[str, object]) -> None:
    """pip 23.1 and later, and those before, such as Debian 12's 23.0.1."""
    package = {"metadata": {"name": "x", "version": "1"}, "download_info": {"archive_info": archive}}
    assert "x==1 \\\n    --hash=sha256:" + "0" * 64 in requirements_lock.render({"install": [package]})
    package["download_info"] = {"archive_info": {"hash": "md5=" + "0" * 32}}
    with pytest.raises(ValueError, match="pip gives no SHA-256 hash"):
        requirements_lock.render({"install": [package]})
