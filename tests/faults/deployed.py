"""A deployment whose parts can be started, killed and started again one by one, and several runs on it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from memory_transport import MemoryTransport, make_sites

from fedspan.config import Config, to_toml
from fedspan.flower import deployment, trial
from fedspan.flower.process_tree import MARK, ProcessTree
from fedspan.runs import checkpoint
from fedspan.runs.execution import serve

INJECT = Path(__file__).parent / "inject"
SITES = ["client-0", "client-1", "client-2"]
SLACK = 6
"""Every limit below is that of an idle machine. One that others use too is given so many times as long: a process that
starts, with all that it imports, then takes minutes. Nothing waits longer for it that goes well."""


def until(so: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait, `SLACK` times as long as is given at most; the seconds that it took."""
    began, limit = time.monotonic(), SLACK * seconds
    while not so():
        assert time.monotonic() - began < limit, f"not within {limit:g} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


@dataclass
class Run:
    """One start of `run.sh`."""

    name: str
    out: Path
    log: Path
    began: float
    process: str
    """Its name in the process tree."""

    def records(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finished(self) -> bool:
        return (self.out / "summary.json").exists()

    def said(self, pattern: str = "") -> list[str]:
        """Return the server's lines about its sites and about its end."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        found = [line.partition("site: line=")[2] for line in text.splitlines() if "site: line=" in line]
        found += [line for line in text.splitlines() if line.startswith("fedspan: ")]
        return [line for line in found if re.search(pattern, line)]

    def why(self) -> str:
        """The one line that it ended with."""
        (line,) = self.said("^fedspan: ")
        return line.removeprefix("fedspan: ")

    def state(self) -> dict[str, torch.Tensor]:
        return state_of(self.out)


def state_of(out: Path) -> dict[str, torch.Tensor]:
    """The server's state after the last finished round."""
    return tiny.state_tensors(checkpoint.read(out / "checkpoint" / "federation.safetensors").state)


@dataclass
class Deployed:
    """SuperLink, proxy and sites on this machine."""

    tree: ProcessTree
    folder: Path
    plan: deployment.Deployment
    config: Config
    mishaps: Path
    _count: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _named: dict[str, str] = field(default_factory=dict)
    """Part -> the name of its latest process in the process tree."""

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": trial.program_path(), "PYTHON": sys.executable}

    # Parts

    def start(self, part: str, command: Sequence[str] = ("./start.sh",)) -> str:
        """Restart a part: `superlink`, `proxy` or a site."""
        name = f"{part}-{next(self._count)}"
        server, extra = self.folder / "server", dict(self.environment)
        if part == "superlink":
            where, command = server, ["./superlink.sh"]
        elif part == "proxy":
            where, command = server, ["./proxy.sh"]
            extra |= {"FEDSPAN_PROXY": trial.choose_proxy("auto"), "FEDSPAN_NGINX": "master_process off;"}
        elif part in SITES:
            where = self.folder / "sites" / part
            paths = [str(INJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
            extra |= {"PYTHONPATH": os.pathsep.join(paths), "FEDSPAN_MISHAPS": str(self.mishaps)}
        else:
            where = server
        self.tree.start(name, command, where, extra)
        self._named[part] = name
        port = {"superlink": self.plan.superlink_port, "proxy": self.plan.port}.get(part)
        if port is not None:
            self.tree.wait(name, lambda: trial.answers(port, server / "ca.crt"), trial.READY)
        return name

    def ended(self, part: str) -> int | None:
        """The exit status of a part's latest process."""
        return self.tree.ended(self._named[part])

    def log(self, part: str) -> str:
        return (self.folder / "logs" / f"{self._named[part]}.log").read_text(errors="replace")

    def pids(self, *words: str, site: str | None = None) -> list[int]:
        """Return this deployment's processes whose command line has all of these words."""
        found = []
        mark = f"{MARK}={self.tree._mark}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                line = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                place = os.readlink(entry / "cwd")
            except OSError:
                continue
            inside = site is None or Path(place) == self.folder / "sites" / site
            if inside and line and all(word in line for word in words) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
        return found

    def kill(self, *words: str, site: str | None = None) -> None:
        """Send `kill -9` to those processes; there must be some."""
        found = self.pids(*words, site=site)
        assert found, f"no process of {words} in {site}"
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not set(found) & set(self.pids(*words, site=site)), 10, f"{words} ended")

    def configure(self, **sections: Mapping[str, Any]) -> None:
        """Other settings for the server alone, such as its deadline."""
        tree = self.config.model_dump()
        for section, values in sections.items():
            tree[section] = {**tree[section], **values}
        self.server_config = Config.model_validate(tree)
        (self.folder / "server" / "config.toml").write_text(to_toml(self.server_config))

    def settle(self, config: Config) -> None:
        """Write other settings for everyone; the workers restart."""
        self.config = config
        for site in SITES:
            (self.folder / "sites" / site / "config.toml").write_text(to_toml(config))
        self.configure()
        self.kill("fedspan.site.worker")

    # Mishaps

    def order(self, site: str, **order: Any) -> None:
        """Have something go wrong at that site, once: `do`, `at` a kind of message of a `round` (from 0)."""
        path = self.mishaps / f"{site}.json"
        held = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*held, {"where": "worker", "at": "ask", **order}]))

    def happened(self) -> int:
        """Return the number of mishaps so far."""
        path = self.mishaps / "done.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    # Runs

    def begin(self, name: str) -> Run:
        """Start a run, or continue one."""
        process = f"run-{name}-{next(self._count)}"
        self.tree.start(process, ["./run.sh", name], self.folder / "server", self.environment)
        out = self.folder / "server" / "runs" / name
        return Run(name, out, self.folder / "logs" / f"{process}.log", time.monotonic(), process)

    def end(self, run: Run, seconds: float = 300) -> float:
        """Wait until a run is over, its process too; the seconds since its start."""
        until(
            lambda: self.tree.ended(run.process) is not None,
            seconds,
            f"the end of {run.name}: {run.log.read_text()[-2000:]}",
        )
        until(lambda: not self.pids("flwr-serverapp"), 30, "the ServerApp's end")
        return time.monotonic() - run.began

    def reference(
        self, folder: Path, lost: Mapping[str, Sequence[int]], **sections: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Return the result of the federation in this process without those clients' answers in those rounds."""
        tree = self.server_config.model_dump()
        for section, values in sections.items():
            tree[section] = {**tree[section], **values}
        config = Config.model_validate(tree)
        sites = make_sites(config, SITES, folder / "sites")
        transport = MemoryTransport({name: site.answer for name, site in sites.items()})

        def mishap(node: str, header: dict[str, Any], content: bytes) -> str | None:
            return "gone" if header["kind"] == "ask" and header["round"] in lost.get(node, ()) else None

        transport.mishap = mishap
        serve(config, folder / "run", lambda event: None, transport)
        return state_of(folder / "run")


@contextmanager
def deployed(folder: Path, config: Config) -> Iterator[Deployed]:
    """A deployment with SuperLink and proxy up and the sites registered, not yet started."""
    trial.prepare(folder, SITES, config)
    mishaps = folder / "mishaps"
    mishaps.mkdir()
    with ProcessTree(folder / "logs") as tree:
        made = Deployed(tree, folder.resolve(), deployment.read(folder), config, mishaps.resolve())
        made.configure()
        made.start("superlink")
        made.start("proxy")
        tree.finish(made.start("register", ["./register.sh"]), trial.READY)
        yield made


def lost(run: Run) -> dict[str, list[int]]:
    """Client -> the rounds (from 0) in which its answer did not count."""
    found: dict[str, list[int]] = {}
    for record in run.records():
        for client in record["rejected"]:
            found.setdefault(client, []).append(record["round_num"] - 1)
    return found
