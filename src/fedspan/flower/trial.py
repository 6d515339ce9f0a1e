"""A whole deployment on one machine: started on loopback with all its security, used for one run, and taken down."""

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
from fedspan.display.progress import number
from fedspan.flower import deployment, region_deployment
from fedspan.flower.deployment import Deployment
from fedspan.flower.process_tree import ProcessTree
from fedspan.support.errors import FedspanError
from fedspan.wire.names import check_name
from fedspan.wire.unix_socket import socket_path

Notify = Callable[[str], None]

READY = 300.0
"""Seconds that a process has to become ready after its start, on a machine that others use too. One that ends before
is noticed at once."""
LOADING = 600.0
"""Seconds that a region's server has to load what it needs."""
_POLL = 0.1
IN_MEMORY = ":flwr-in-memory:"
"""Flower's name of a database that is in its SuperLink's memory."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a trial."""

    out: Path
    """The run's folder."""
    summary: dict[str, Any]
    seconds: Mapping[str, float]
    """`start`: until the end of the first round; `rounds`: from there to the result; `end`: to take everything down."""


def prepare(folder: Path, sites: Sequence[str], config: Config) -> Deployment:
    """Write a deployment for a trial, on ports that are free now."""
    port, superlink_port, *runtime_ports = free_ports(len(sites) + 2)
    clients = deployment.clients_of(config, sites)
    plan = deployment.plan(sites, (), port, superlink_port, runtime_ports, clients)
    deployment.write(folder, plan, with_absolute_paths(config))
    return plan


def prepare_regions(folder: Path, regions: Mapping[str, Sequence[str]], config: Config) -> None:
    """Write a deployment in regions for a trial, on ports that are free now.

    Parameters
    ----------
    regions
        Region -> its sites.
    config
        Settings whose `deployment.regions` has the clients of these sites.
    """
    sites = [site for names in regions.values() for site in names]
    clients = dict(zip(sites, deployment.clients_of(config, sites), strict=True))
    ports = free_ports(region_deployment.num_ports(regions))
    plan = region_deployment.plan(regions, clients, free=ports)
    region_deployment.write(folder, plan, with_absolute_paths(config))


def choose_proxy(proxy: str) -> str:
    """Return the proxy to start, `nginx` or `python`; `auto` is nginx where it is installed.

    Raises
    ------
    FedspanError
        For another name, and when nginx is requested but not installed.
    """
    if proxy not in ("auto", "nginx", "python"):
        raise FedspanError(f"proxy {proxy!r}: expected nginx, python, or auto")
    installed = shutil.which("nginx", path=program_path()) is not None
    if proxy == "nginx" and not installed:
        raise FedspanError(
            "nginx is not installed: install it (for example `apt install nginx-light`), or use the proxy that "
            "comes with fedspan: --proxy python"
        )
    if proxy == "auto":
        return "nginx" if installed else "python"
    return proxy


def up(
    folder: Path,
    notify: Notify,
    *,
    proxy: str = "auto",
    timeout: float = 3600.0,
    run: str | None = None,
    in_memory: bool = False,
) -> Outcome:
    """Start a deployment on loopback, run its federation, and take everything down, whatever happens.

    Parameters
    ----------
    folder
        A deployment for this machine only, made by `fedspan flower init` or `prepare`.
    notify
        Called with each line about the progress.
    timeout
        Longest time for everything, in seconds.
    run
        Name of the run's folder under `server/runs`; none: a new one. An unfinished run is resumed.
    in_memory
        Keep the SuperLink's messages in memory; none is left when the trial has ended.

    Raises
    ------
    FedspanError
        When the folder holds no such deployment, a port is in use, a process ends early, or the time is over; one line
        that names the log with the details.
    """
    kind = choose_proxy(proxy)
    plans = {path: deployment.read(path) for path in (folder, *deployment.regions_in(folder))}
    name = _new_run(folder) if run is None else check_name(run, "--run")
    for path, plan in plans.items():
        _check_startable(path, plan)
    began = time.monotonic()
    with _signals_as_interrupts(), ProcessTree(folder / "logs") as tree:
        try:
            _, *regions = plans
            start(tree, folder, plans[folder], kind, notify, sites=not regions, in_memory=in_memory)
            for region in regions:
                start_region(tree, region, plans[region], kind, notify, in_memory=in_memory)
            out = folder / "server" / "runs" / name
            started, ended = _federate(tree, out, notify, began + timeout)
        finally:
            notify("taking everything down")
    seconds = {"start": started - began, "rounds": ended - started, "end": time.monotonic() - ended}
    return Outcome(out, json.loads((out / "summary.json").read_text(encoding="utf-8")), seconds)


def _check_startable(folder: Path, plan: Deployment) -> None:
    """Check that a deployment is for this machine only, and that its ports are free."""
    if not plan.local:
        raise FedspanError(f"{folder} is a deployment for {plan.hosts[0]}: expected one for localhost")
    for port in (plan.port, plan.superlink_port, *(site.runtime_port for site in plan.sites)):
        if not _is_free(port):
            raise FedspanError(
                f"port {port} of {folder} is in use: expected it to be free; is this deployment running already?"
            )


def start_region(
    tree: ProcessTree, folder: Path, plan: Deployment, proxy: str, notify: Notify, in_memory: bool = False
) -> None:
    """Start the processes of one region: its server, that server's way up, and its sites."""
    start(tree, folder, plan, proxy, notify, sites=False, in_memory=in_memory, prefix=f"{folder.name}-")
    region, environment = folder.resolve(), script_environment()
    serve = f"{folder.name}-serve"
    tree.start(serve, ["./serve.sh"], region / "server", environment)
    # Servers start one after the other: Flower starts a run's process again where it takes long over its imports.
    tree.wait(serve, socket_path(region / "uplink").exists, LOADING)
    tree.start(f"{folder.name}-uplink", ["./start.sh"], region / "uplink", environment)
    for site in plan.sites:
        tree.start(site.name, ["./start.sh"], region / "sites" / site.name, environment)
    notify(f"the server of the region {folder.name} is served; its sites are starting")


def start(
    tree: ProcessTree,
    folder: Path,
    plan: Deployment,
    proxy: str,
    notify: Notify,
    sites: bool = True,
    in_memory: bool = False,
    prefix: str = "",
) -> None:
    """Start the server's and the sites' processes with the scripts of the deployment itself.

    Parameters
    ----------
    prefix
        Of the names of the server's processes, where there are several servers.
    """
    server, environment = folder.resolve() / "server", script_environment()
    ca = server / "ca.crt"
    state = {"FEDSPAN_DATABASE": IN_MEMORY} if in_memory else {}
    tree.start(f"{prefix}superlink", ["./superlink.sh"], server, {**environment, **state})
    tree.wait(f"{prefix}superlink", lambda: answers(plan.superlink_port, ca), READY)
    notify(f"SuperLink on 127.0.0.1:{plan.superlink_port}, with TLS and node authentication")
    # A single process: workers of nginx would survive a kill -9 of their master.
    single = {"FEDSPAN_PROXY": proxy, "FEDSPAN_NGINX": "master_process off;"}
    tree.start(f"{prefix}proxy", ["./proxy.sh"], server, {**environment, **single})
    tree.wait(f"{prefix}proxy", lambda: answers(plan.port, ca), READY)
    notify(f"proxy ({proxy}) on {plan.addresses[0]}:{plan.port}, which forwards the fleet API and nothing else")
    tree.start(f"{prefix}register", ["./register.sh"], server, environment)
    tree.finish(f"{prefix}register", READY)
    if sites:
        for site in plan.sites:
            tree.start(site.name, ["./start.sh"], folder.resolve() / "sites" / site.name, environment)
        notify(f"{len(plan.sites)} sites registered and starting: {', '.join(site.name for site in plan.sites)}")


def answers(port: int, ca: Path) -> bool:
    """Return whether a server on that port of this machine shows a certificate signed by this authority.

    Raises
    ------
    FedspanError
        When it shows another certificate.
    """
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
    """Return ports of the loopback that are free now."""
    # All are open at the same time, so that they differ.
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _federate(tree: ProcessTree, out: Path, notify: Notify, deadline: float) -> tuple[float, float]:
    """Start the run and follow it to its end; return the times of the end of the first round, and of the run."""
    lasting = [name for name in tree.names if not name.endswith("register")]
    tree.start("run", ["./run.sh", out.name], out.parent.parent, script_environment())
    records, summary = _JsonlTail(out / "metrics.jsonl"), out / "summary.json"
    first: float | None = None
    while True:
        # Before the records are read, so that the last round is reported even if the run ends in between.
        finished, ended = summary.exists(), tree.ended("run") is not None
        for record in records.read():
            first = first or time.monotonic()
            notify(round_line(record))
        if finished:
            now = time.monotonic()
            return first or now, now
        _check_running(tree, lasting)
        if ended and not summary.exists():
            raise FedspanError(f"the run ended without a result: {tree.exit_report('run')}")
        if time.monotonic() > deadline:
            raise FedspanError(f"the run did not end in time (--timeout); its folder is {out}")
        time.sleep(_POLL)


def _check_running(tree: ProcessTree, names: Sequence[str]) -> None:
    """Raise an error when a process has ended that should run as long as the run does."""
    for name in names:
        if tree.ended(name) is not None:
            raise FedspanError(tree.exit_report(name))


def round_line(record: Mapping[str, Any]) -> str:
    """Return a round's record of `metrics.jsonl` in one line."""
    count = record["num_clients"]
    parts = [f"round {record['round_num']}: {count} site{'s' * (count != 1)}"]
    parts += [f"{name} {number(value)}" for name, value in (record.get("eval") or {}).items()]
    if record.get("rejected"):
        parts.append("left out: " + "; ".join(f"{client} ({reason})" for client, reason in record["rejected"].items()))
    return ", ".join(parts)


class _JsonlTail:
    """The objects that were added to a JSONL file since the last read."""

    def __init__(self, path: Path) -> None:
        # Lines of an earlier part of a resumed run are skipped.
        self._path, self._seen = path, path.stat().st_size if path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        if len(content) < self._seen:  # rewritten from a checkpoint
            self._seen = 0
        complete = content.rfind(b"\n") + 1  # the last line may still be being written
        lines, self._seen = content[self._seen : complete].splitlines(), max(complete, self._seen)
        yield from (json.loads(line) for line in lines if line.strip())


def _new_run(folder: Path) -> str:
    runs = folder / "server" / "runs"
    number = 1
    while (runs / f"trial-{number}").exists():
        number += 1
    return f"trial-{number}"


def script_environment() -> dict[str, str]:
    """Return the variables that the scripts of a deployment need."""
    return {"PATH": program_path(), "PYTHON": sys.executable}


def program_path() -> str:
    """Return the search path for programs: Flower's are beside this Python, nginx may be in /usr/sbin."""
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
def _signals_as_interrupts() -> Iterator[None]:
    """Make SIGTERM and SIGHUP act like Ctrl-C, so that everything is taken down in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A signal that was ignored from the start stays ignored: `nohup fedspan flower up` outlives its terminal.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
