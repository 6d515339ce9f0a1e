"""A deployment's exact packages: every version with the hash of the file that pip would install now.

pip itself resolves them (`pip install --dry-run --report`). The lock names no index and no host: it is used with
whatever index a machine has, which can then deliver nothing but these files.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedspan.support.errors import FedspanError, one_line
from fedspan.support.files import write_bytes
from fedspan.support.versions import installed_version

NAME = "requirements.lock"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[A-Za-z0-9.!+_-]+")
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def places(folder: Path) -> list[Path]:
    """Return the folders of a deployment, of a server or of a site into whose containers wheels are copied.

    Raises
    ------
    FedspanError
        When the folder is none of these.
    """
    found = sorted(
        path for pattern in ("", "server/", "sites/*/") for path in folder.glob(f"{pattern}container/wheels")
    )
    if not found:
        raise FedspanError(f"{folder} has no container/wheels: expected a folder made by `fedspan flower init`")
    return found


def resolve(requirement: str, pip_arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Return pip's report on what it would install for a requirement on this machine, installed packages ignored.

    Raises
    ------
    FedspanError
        When pip cannot resolve it, with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--report", str(report), *pip_arguments, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not report.exists():
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise FedspanError(f"pip cannot resolve {requirement}: {one_line(lines[-1] if lines else 'no output')}")
        content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return content


def render(report: dict[str, Any]) -> str:
    """Return the lock of a report: one package with its hash after the other, sorted.

    Raises
    ------
    FedspanError
        For a package without a hash, such as one that would be installed from a folder.
    """
    entries = dict(_entry(package) for package in report["install"])
    head = (
        f"# The packages of this deployment, for Python {platform.python_version_tuple()[0]}."
        f"{platform.python_version_tuple()[1]} on {platform.system()} {platform.machine()}.\n"
        f"# pip install --require-hashes -r {NAME}\n"
    )
    return head + "".join(entries[name] for name in sorted(entries))


def _entry(package: dict[str, Any]) -> tuple[str, str]:
    metadata = package["metadata"]
    name, version = str(metadata["name"]), str(metadata["version"])
    archive = package["download_info"].get("archive_info", {})
    # pip before 23.1 has the older form of PEP 610 alone, "sha256=…".
    digest = archive.get("hashes", {}).get("sha256", "") or str(archive.get("hash", "")).removeprefix("sha256=")
    if not _SHA256.fullmatch(digest):
        raise FedspanError(f"pip gives no SHA-256 hash for {name} {version}: expected a wheel or an archive of it")
    if not _PACKAGE.fullmatch(name) or not _VERSION.fullmatch(version):
        raise FedspanError(f"pip reports a package {name!r} {version!r}: expected a plain name and a version")
    plain = re.sub(r"[-_.]+", "-", name).lower()
    return plain, f"{plain}=={version} \\\n    --hash=sha256:{digest}\n"


def write(folder: Path, pip_arguments: Sequence[str] = (), requirement: str | None = None) -> list[Path]:
    """Write the lock beside the wheels of every container of a deployment; return the files.

    Parameters
    ----------
    pip_arguments
        Further arguments of pip, such as `--find-links` with a folder of wheels; they are not written down.
    requirement
        By default the installed version of fedspan with Flower.
    """
    folders = places(folder)
    wanted = requirement or f"fedspan[flower]=={installed_version('fedspan')}"
    content = render(resolve(wanted, pip_arguments)).encode()
    for place in folders:
        write_bytes(place / NAME, content)
    return [place / NAME for place in folders]
