"""A million simulated clients through sampling, rounds, folds and trees of servers, on generated updates.

    python benchmarks/scale/million.py [--part width messages start million …] [--limit-mib 1024]

One JSON line per case, appended to `results.jsonl` beside this file; a case that is there is not done again, and the
rounds of the part `million` go on from their checkpoint. Every case has a process of its own whose memory is limited
(RLIMIT_DATA). Times are CPU seconds of one thread. `page.py` makes docs/internet_scale.md of the lines.

The federation has a million clients, of which every client exists while it is drawn alone. Sampling, the round
(`fedspan.federation.rounds.conduct`), the folds, the passes over trees of servers (`fedspan.streaming`) and the
checkpoint are the library's own; only local training is replaced: a client's factors are those that it was sent plus
one of 97 drawn steps, scaled by a number of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from fedspan.client.training import LocalResult
from fedspan.data import partition
from fedspan.federation.clients import Client
from fedspan.federation.round_spool import round_spool
from fedspan.federation.rounds import RunState, run_round
from fedspan.federation.sampling import PoissonSampler, UniformSampler
from fedspan.methods import METHODS
from fedspan.methods.base import Method, ServerState
from fedspan.methods.messages import Broadcast, Factors, Payload, Request, Template, Update
from fedspan.runs import checkpoint
from fedspan.runs.checkpoint import Checkpoint
from fedspan.streaming import Progress, Tree, aggregate_stream, sum_pass
from fedspan.support.peak_memory import peak_memory, reset_peak_memory
from fedspan.support.seeding import generator
from fedspan.wire import protocol
from fedspan.wire.sizes import partial_bytes, payload_bytes

HERE = Path(__file__).parent
POPULATION = 1_000_000
ROUNDS, COHORT = 100, 10_000
SHAPES = {"small": (64, 4, 1), "deep": (64, 4, 4), "wide": (256, 8, 1), "large": (1024, 16, 8)}
"""Name -> (d, r, number of d×d modules)."""
_NONE = np.zeros(0, dtype=np.int64)
_POOL = 97


class Clients(Sequence[Client]):
    """A federation whose clients exist while they are looked at."""

    def __init__(self, number: int, rank: int) -> None:
        self.number, self.rank, self._width = number, rank, len(str(number - 1))

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, at: int) -> Client: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Client]: ...
    def __getitem__(self, at: int | slice) -> Client | Sequence[Client]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self.number))]
        return Client(f"client-{at:0{self._width}d}", self.rank, _NONE, _NONE, stated=8 + at % 7)


@dataclass(slots=True)
class Trained:
    """Local training's stand-in: called with a window of clients, as the engine is."""

    pool: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, template: Template) -> Trained:
        rng, r = generator("scale"), template.rank
        return cls(
            {
                name: (
                    torch.randn((_POOL, m, r), generator=rng).mul_(0.01),
                    torch.randn((_POOL, r, n), generator=rng).mul_(0.01),
                )
                for name, (m, n) in template.modules.items()
            }
        )

    def update(self, client: Client, sent: Broadcast, round_num: int) -> Update:
        """Return a client's update, which depends on it, the round and what was sent alone."""
        number = int(client.client_id.removeprefix("client-"))
        step, size = (7 * number + 13 * round_num) % _POOL, 0.5 + number % 89 / 89
        modules: dict[str, Payload] = {}
        for name, f in sent.adapter.items():
            b, a = self.pool[name]
            modules[name] = Factors(torch.add(f.b, b[step], alpha=size), torch.add(f.a, a[step], alpha=size), f.scaling)
        return Update(client.client_id, client.weight("examples"), modules, {})

    def __call__(
        self, window: Sequence[tuple[Client, Broadcast]], round_num: int
    ) -> Iterator[tuple[LocalResult, float]]:
        for client, sent in window:
            yield LocalResult(self.update(client, sent, round_num), 1.0, 1), 0.0


@dataclass(frozen=True, slots=True)
class Region:
    """The updates of one region's clients, made again in every pass."""

    method: Method
    clients: Sequence[Client]
    trained: Trained
    sent: Broadcast
    round_num: int

    def __iter__(self) -> Iterator[Update]:
        for client in self.clients:
            yield self.method.encode(self.trained.update(client, self.sent, self.round_num), self.sent, None)[0]


@dataclass(slots=True)
class Setting:
    """A method over one shape, before its first round."""

    method: Method
    template: Template
    trained: Trained
    state: RunState
    clients: Clients = field(init=False)

    @classmethod
    def of(cls, method: str, shape: str) -> Setting:
        d, rank, count = SHAPES[shape]
        template = Template({f"layer{i}": (d, d) for i in range(count)}, rank, num_clients=POPULATION)
        made = METHODS[method]()
        return cls(made, template, Trained.of(template), RunState(made.init(template, {})))

    def __post_init__(self) -> None:
        self.clients = Clients(POPULATION, self.template.rank)

    def draw(self, number: int, round_num: int) -> list[Client]:
        """Return the clients of a round."""
        sampler = UniformSampler(number / POPULATION)
        return [self.clients[i] for i in sampler.draw(len(self.clients), round_num)]

    def regions(self, state: ServerState, cohort: Sequence[Client], number: int) -> Tree:
        """Return the cohort as a tree: so many regional servers of neighbours below one."""
        sent = self.method.broadcast(state, Request(self.template.rank))
        bounds = np.linspace(0, len(cohort), number + 1).astype(int).tolist()
        parts = pairwise(bounds)
        return Tree([Region(self.method, cohort[i:j], self.trained, sent, state.round_num) for i, j in parts])

    def making(self, state: ServerState, cohort: Sequence[Client]) -> float:
        """Return the CPU seconds of making the cohort's updates as the sites would, and nothing else."""
        began = time.process_time()
        for _ in self.regions(state, cohort, 1).children[0]:
            pass
        return time.process_time() - began


def _one_round(setting: Setting, number: int, round_num: int, made: float | None = None) -> dict[str, float]:
    """Take a round of so many clients; return its CPU seconds, by part.

    Parameters
    ----------
    made
        The seconds of making this many updates, where they were measured before.
    """
    before, start = setting.state.state, time.process_time()
    cohort = setting.draw(number, round_num)
    drawn = time.process_time()
    with tempfile.TemporaryDirectory() as folder, round_spool(Path(folder, "round"), 64 * 2**20) as spool:
        setting.state, _ = run_round(setting.method, setting.state, cohort, setting.trained, spool=spool)
    whole = time.process_time() - drawn
    making = setting.making(before, cohort) if made is None else made
    return {"sampling": drawn - start, "making": making, "round": whole - making}


def _one_tree(setting: Setting, number: int, round_num: int) -> dict[str, float]:
    """Take the server's step of a round over a tree; return its CPU seconds, by part."""
    state, start, passes = setting.state.state, time.process_time(), 0

    def count(progress: Progress) -> None:
        nonlocal passes
        passes = progress.pass_num + 1

    cohort = setting.draw(number, round_num)
    drawn = time.process_time()
    tree = setting.regions(state, cohort, max(1, round(number**0.5)))
    after, _ = aggregate_stream(setting.method, state, tree, on_progress=count)
    whole = time.process_time() - drawn
    setting.state = replace(setting.state, state=after)
    making = passes * setting.making(state, cohort)
    return {"sampling": drawn - start, "making": making, "round": whole - making, "passes": passes}


def width(how: str, method: str, shape: str, number: int) -> dict[str, Any]:
    """Measure rounds of one size, after one that warms up; small rounds are repeated."""
    setting, take = Setting.of(method, shape), {"round": _one_round, "tree": _one_tree}[how]
    take(setting, min(number, 100), 0)
    repeats = max(1, min(50, 1000 // number))
    before = reset_peak_memory()
    parts = [take(setting, number, round_num) for round_num in range(1, repeats + 1)]
    grown = peak_memory() - before
    means = {name: sum(x[name] for x in parts) / repeats for name in parts[0]}
    d, rank, modules = SHAPES[shape]
    return {
        "d": d,
        "r": rank,
        "modules": modules,
        "update_bytes": 8 * d * rank * modules,
        "repeats": repeats,
        "cpu_seconds": means,
        "us_per_client": 1e6 * (means["round"] + means["sampling"]) / number,
        "grown_mib": grown / 2**20,
    }


def messages(shape: str) -> dict[str, Any]:
    """Measure a site's message at the server: made as the site makes it, taken apart and checked to be finite."""
    setting = Setting.of("fedit", shape)
    sent = setting.method.broadcast(setting.state.state, Request(None))
    update = setting.trained.update(setting.clients[5], sent, 1)
    head = {"kind": "answer", "train_loss": 1.0, "seconds": 1.0, "optimizer_bytes": 0}
    times: dict[str, list[float]] = {"encode": [], "decode": [], "broadcast": []}
    for _ in range(60):
        marks = [time.process_time()]
        outgoing = protocol.MessageTensors()
        content = protocol.encode(head | {"update": protocol.put_update(outgoing, update, "float32")}, outgoing)
        marks.append(time.process_time())
        header, tensors = protocol.decode(content)
        received = protocol.get_update(header["update"], tensors, "client-5")
        assert all(bool(torch.isfinite(t).all()) for t in received.named_tensors().values())
        marks.append(time.process_time())
        outgoing = protocol.MessageTensors()
        moved = replace(sent, adapter={name: f.map(lambda x: x + 1) for name, f in sent.adapter.items()})
        marks.append(time.process_time())
        protocol.encode({"broadcast": protocol.put_broadcast(outgoing, moved, sent, "float32")}, outgoing)
        marks.append(time.process_time())
        for name, i in (("encode", 0), ("decode", 1), ("broadcast", 3)):
            times[name].append(marks[i + 1] - marks[i])
    d, rank, modules = SHAPES[shape]
    us = {name: 1e6 * sorted(x)[len(x) // 2] for name, x in times.items()}
    partial = sum_pass(setting.method, setting.state.state, [update])
    sizes = {
        "update_bytes": payload_bytes(update),
        "message_bytes": len(content),
        "partial_bytes": partial_bytes(partial),
    }
    return {"d": d, "r": rank, "modules": modules, **sizes, "us": us}


def start(number: int) -> dict[str, Any]:
    """Measure the division of two rows for each client, which a run does once."""
    before, began = reset_peak_memory(), time.process_time()
    parts = partition.iid(2 * number, number, np.random.default_rng(0))
    clients = [Client(f"client-{k:07d}", 4, part, _NONE) for k, part in enumerate(parts)]
    seconds = time.process_time() - began
    return {
        "us_per_client": 1e6 * seconds / len(clients),
        "bytes_per_client": (peak_memory() - before) / len(clients),
    }


def coins() -> dict[str, Any]:
    """Measure the secret coins of client-level privacy, one for every client of the federation."""
    sampler = PoissonSampler(COHORT / POPULATION, lambda: 2**70 + 1)
    sampler.draw(POPULATION, 0)
    began = time.process_time()
    for round_num in range(1, 6):
        sampler.draw(POPULATION, round_num)
    return {"ns_per_client": 1e9 * (time.process_time() - began) / (5 * POPULATION)}


def million(method: str, shape: str, out: Path, memory_mib: float) -> None:
    """Take the rounds of ten thousand that are missing, a line for each, with the checkpoint that a run writes."""
    setting, path = Setting.of(method, shape), checkpoint_path(method, out)
    if path.exists():
        saved = checkpoint.read(path)
        setting.state = RunState(saved.state, saved.client_states, saved.seen, saved.counted)
    made: float | None = None
    for round_num in range(setting.state.state.round_num, ROUNDS):
        before = reset_peak_memory()
        line: dict[str, Any] = {"case": ["million", method, shape, round_num + 1]}
        if (round_num + 1) % 25 == 0:
            line["tree"] = _as_a_tree(setting, round_num)
        seconds = _one_round(setting, COHORT, round_num, made)
        made = seconds["making"]
        state, began = setting.state, time.process_time()
        checkpoint.write(path, Checkpoint(state.state, state.client_states, state.seen, counted=state.counted))
        seconds["checkpoint"] = time.process_time() - began
        line |= {"clients": COHORT, "distinct": len(state.counted), "cpu_seconds": seconds, "limit_mib": memory_mib}
        line |= {"peak_mib": peak_memory() / 2**20, "before_mib": before / 2**20}
        append(out, line)
    path.unlink(missing_ok=True)


def checkpoint_path(method: str, out: Path) -> Path:
    """Return the checkpoint of the rounds in a file of lines."""
    return out.with_suffix(f".{method}.safetensors")


def _as_a_tree(setting: Setting, round_num: int) -> dict[str, Any]:
    """Return the same round's step over a hundred regions, beside that over one source."""
    state, cohort = setting.state.state, setting.draw(COHORT, round_num)
    tree = setting.regions(state, cohort, 100)
    began = time.process_time()
    over_tree, _ = aggregate_stream(setting.method, state, tree)
    seconds = time.process_time() - began - setting.making(state, cohort)
    flat, _ = aggregate_stream(setting.method, state, setting.regions(state, cohort, 1).children[0])
    pairs = [(x, flat.modules[n][p]) for n, held in over_tree.modules.items() for p, x in held.items()]
    largest = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
    return {"regions": 100, "cpu_seconds": seconds, "largest_difference": largest}


def cases(parts: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the cases that are not rounds of `million`."""
    if "width" in parts:
        sizes = (10, 100, 1_000, 10_000)
        for how, method in (("round", "fedit"), ("tree", "glora"), ("round", "glora")):
            yield from (("width", how, method, "small", k) for k in sizes)
        yield from (("width", "round", "fedit", shape, k) for shape in ("deep", "wide") for k in (100, 10_000))
        yield from (("width", "tree", "glora", shape, 1_000) for shape in ("deep", "wide"))
        yield from (("width", how, m, "large", 100) for how, m in (("round", "fedit"), ("tree", "glora")))
    if "messages" in parts:
        yield from (("messages", shape) for shape in SHAPES)
    if "start" in parts:
        yield from (("start", k) for k in (10_000, 100_000))
        yield ("coins",)
    if "width" in parts:
        yield from (("width", how, m, "small", 100_000) for how, m in (("round", "fedit"), ("tree", "glora")))


def append(out: Path, line: dict[str, Any]) -> None:
    """Write one line."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def child(case: Sequence[Any], out: Path, limit_mib: int) -> None:
    """Do one case under the limit."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mib * 2**20,) * 2)
    torch.set_num_threads(1)
    part, *arguments = case
    if part == "million":
        million(*arguments, out, limit_mib)
        return
    measured: Callable[..., dict[str, Any]] = {
        "width": width,
        "messages": messages,
        "start": start,
        "coins": coins,
    }[part]
    append(out, {"case": list(case), "limit_mib": limit_mib, **measured(*arguments), "peak_mib": peak_memory() / 2**20})


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["width", "messages", "start", "million"])
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--limit-mib", type=int, default=1024)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        child(json.loads(options.case), options.out, options.limit_mib)
        return
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    wanted = [*cases(options.part)]
    if "million" in options.part and not any(x["case"][0] == "million" and x["case"][3] == ROUNDS for x in lines):
        wanted.append(("million", "fedit", "small"))
        if not checkpoint_path("fedit", options.out).exists() and any(x["case"][0] == "million" for x in lines):
            raise SystemExit(
                f"{options.out} has rounds of a million clients, and their checkpoint is not beside it: expected "
                "another --out, or --part without 'million'"
            )
    done = {json.dumps(x["case"]) for x in lines}
    for case in wanted:
        if json.dumps(case) not in done:
            command = [sys.executable, __file__, "--out", options.out, "--limit-mib", options.limit_mib, "--case"]
            subprocess.run([*map(str, command), json.dumps(case)], check=True)


if __name__ == "__main__":
    main()
