"""A whole deployment on one machine: brought up over loopback with all its locks on, used once, and taken down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fedspan.config import Config, with_absolute_paths
from fedspan.flower import deployment
from fedspan.flower.deployment import Deployment
from fedspan.flower.process_tree import ProcessTree
from fedspan.support.errors import FedspanError

Say = Callable[[str], None]

READY = 60.0
"""Seconds that a process has to answer after its start."""
_LOOK = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial leaves behind."""

    out: Path
    """The run's folder."""
    summary: dict[str, Any]
    seconds: Mapping[str, float]
    """`start`: until the first round is done; `rounds`: from there to the result; `end`: for taking everything down."""


def prepare(folder: Path, sites: Sequence[str], config: Config) -> Deployment:
    """Write a deployment for a trial, on ports that are free now."""
    taken = free_ports(len(sites) + 2)
    made = deployment.plan(sites, (), taken[0], taken[1], taken[2:])
    deployment.write(folder, made, with_absolute_paths(config))
    return made


def chosen_proxy(proxy: str) -> str:
    """The proxy to start: nginx or python.

    Raises
    ------
    ValueError
        For another name, and when nginx is asked for and not installed.
    """
    if proxy not in ("auto", "nginx", "python"):
        raise FedspanError(f"proxy {proxy!r}: expected nginx, python, or auto")
    found = shutil.which("nginx", path=_path())
    if proxy == "nginx" and found is None:
        raise FedspanError(
            "nginx is not installed: install it (such as `apt install nginx-light`), or take the proxy that comes with "
            "fedspan with --proxy python"
        )
    if proxy == "auto":
        return "python" if found is None else "nginx"
    return proxy


def up(folder: Path, say: Say, *, proxy: str = "auto", timeout: float = 3600.0, run: str | None = None) -> Outcome:
    """Bring a deployment up on loopback, run its federation, and take everything down, whatever happens.

    Parameters
    ----------
    folder
        As `fedspan flower init` or `prepare` made it, for this machine alone.
    say
        Is told one line at a time how it goes.
    timeout
        Seconds for all of it.
    run
        Name of the run's folder under `server/runs`; none: a new one.  An unfinished one is gone on with.

    Raises
    ------
    ValueError
        When the folder is no such deployment, a port is taken, a process ends that should not, or time is over; one
        line, with the log that says more.
    """
    plan, kind, name = deployment.read(folder), chosen_proxy(proxy), run or _new_run(folder)
    if not plan.local:
        raise FedspanError(f"{folder} is a deployment for {plan.hosts[0]}: expected one for localhost, for a trial")
    for port in (plan.port, plan.superlink_port, *(site.runtime_port for site in plan.sites)):
        if not _is_free(port):
            raise FedspanError(
                f"port {port} of {folder} is in use: expected it to be free; is this deployment up already?"
            )
    began = time.monotonic()
    with _signals_as_errors(), ProcessTree(folder / "logs") as house:
        try:
            start(house, folder, plan, kind, say)
            out = folder / "server" / "runs" / name
            started, ended = _federate(house, plan, out, say, began + timeout)
        finally:
            say("taking everything down")
    seconds = {"start": started - began, "rounds": ended - started, "end": time.monotonic() - ended}
    return Outcome(out, json.loads((out / "summary.json").read_text(encoding="utf-8")), seconds)


def start(house: ProcessTree, folder: Path, plan: Deployment, proxy: str, say: Say, sites: bool = True) -> None:
    """Start the server's processes and the sites', by the very scripts of the deployment."""
    server, environment = folder.resolve() / "server", {"PATH": _path(), "PYTHON": sys.executable}
    ca = server / "ca.crt"
    house.start("superlink", ["./superlink.sh"], server, environment)
    house.wait("superlink", lambda: answers(plan.superlink_port, ca), READY)
    say(f"SuperLink on 127.0.0.1:{plan.superlink_port}, with TLS and the authentication of nodes")
    # One process, so that nothing of nginx is left when it is killed.
    single = {"FEDSPAN_PROXY": proxy, "FEDSPAN_NGINX": "master_process off;"}
    house.start("proxy", ["./proxy.sh"], server, {**environment, **single})
    house.wait("proxy", lambda: answers(plan.port, ca), READY)
    say(f"proxy ({proxy}) on {plan.listen}:{plan.port}, which lets the fleet API through and nothing else")
    house.start("register", ["./register.sh"], server, environment)
    house.finish("register", READY)
    if sites:
        for site in plan.sites:
            house.start(site.name, ["./start.sh"], folder.resolve() / "sites" / site.name, environment)
        say(f"{len(plan.sites)} sites registered and starting: {', '.join(site.name for site in plan.sites)}")


def answers(port: int, ca: Path) -> bool:
    """Whether something on that port of this machine shows a certificate that this authority vouches for."""
    trust = ssl.create_default_context(cafile=str(ca))
    try:
        with (
            socket.create_connection(("127.0.0.1", port), 5) as plain,
            trust.wrap_socket(plain, server_hostname="localhost"),
        ):
            return True
    except ssl.SSLCertVerificationError as error:
        raise FedspanError(f"port {port} belongs to another server ({error.verify_message})") from None
    except OSError:
        return False


def free_ports(count: int) -> list[int]:
    """Ports of this machine's loopback that nobody listens on now."""
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def _federate(house: ProcessTree, plan: Deployment, out: Path, say: Say, deadline: float) -> tuple[float, float]:
    """Start the run and follow it to its end; when its first round was done, and when all was."""
    server = out.parent.parent
    house.start("run", ["./run.sh", out.name], server, {"PATH": _path(), "PYTHON": sys.executable})
    records = _Tail(out / "metrics.jsonl")
    first: float | None = None
    watched = ["superlink", "proxy", *(site.name for site in plan.sites)]
    while True:
        finished, over = (out / "summary.json").exists(), house.ended("run") is not None
        for record in records.read():
            first = first or time.monotonic()
            say(round_line(record))
        if finished:
            now = time.monotonic()
            return first or now, now
        for name in watched:
            if house.ended(name) is not None:
                raise FedspanError(house.obituary(name))
        if over and not (out / "summary.json").exists():
            raise FedspanError(f"the run ended without a result: {house.obituary('run')}")
        if time.monotonic() > deadline:
            raise FedspanError(f"the run was not done in time (--timeout); its folder is {out}")
        time.sleep(_LOOK)


def round_line(record: Mapping[str, Any]) -> str:
    """A round's record of `metrics.jsonl` in one line."""
    count = record["num_clients"]
    parts = [f"round {record['round_num']}: {count} site{'s' * (count != 1)}"]
    parts += [f"{name} {value:.3f}" for name, value in (record.get("eval") or {}).items()]
    if record.get("rejected"):
        parts.append("left out: " + "; ".join(f"{who} ({why})" for who, why in record["rejected"].items()))
    return ", ".join(parts)


class _Tail:
    """The objects of a JSONL file that have come since the last look."""

    def __init__(self, path: Path) -> None:
        # What an earlier part of the run wrote has been told then.
        self._path, self._seen = path, path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        if len(content) < self._seen:  # rewritten from a checkpoint
            self._seen = 0
        whole = content.rfind(b"\n") + 1
        lines, self._seen = content[self._seen : whole].splitlines(), max(whole, self._seen)
        yield from (json.loads(line) for line in lines if line.strip())


def _new_run(folder: Path) -> str:
    runs = folder / "server" / "runs"
    number = 1
    while (runs / f"trial-{number}").exists():
        number += 1
    return f"trial-{number}"


def _path() -> str:
    """Where programs are looked for: Flower's are beside this Python."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath), "/usr/sbin"])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def _signals_as_errors() -> Iterator[None]:
    """SIGTERM and SIGHUP leave as Ctrl-C does, so that everything is taken down in order."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
