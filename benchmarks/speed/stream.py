"""Two demonstrations of a server that never holds its clients' updates.

    python benchmarks/speed/stream.py --clients 100000 [--limit-mib 1024] [--out results.jsonl]
    python benchmarks/speed/stream.py --spool FOLDER [--layers 32] [--cold] [--out results.jsonl]

`--clients`: so many simulated updates, made anew in every pass, folded by GLoRA and FlexLoRA under a limit on the
process's memory. `--spool`: the linear layers of a 7B-shaped model, 100 clients, written to FOLDER as float16 (8 GB)
and aggregated from there; the files are deleted afterwards unless --keep. Every line of the result is one step.

The truth is known. Client k holds B_k = (U S + σ_k E) G and A_k = Gᵀ (Vᵀ + τ_k F) with U, V orthonormal, S decreasing,
E, F noise and G a random orthogonal gauge of its own; the signs σ, τ run through all four combinations in every four
clients, who share E and F and their number of examples, so that the mean of the products is U S Vᵀ to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fedspan.algebra.lowrank import LowRank, distance, norm
from fedspan.methods import create
from fedspan.methods.base import aggregate
from fedspan.methods.messages import Factors, Payload, Template, Update
from fedspan.streaming import Progress, aggregate_stream
from fedspan.streaming.spool import Spool
from fedspan.support import parallel
from fedspan.support.seeding import generator

NOISE = 0.3
"""‖E‖_F over ‖U S‖_F, and ‖F‖_F over ‖V‖_F."""
SIGNS = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))
LAYER_7B = {
    **{f"self_attn.{x}_proj": (4096, 4096) for x in "qkvo"},
    **{f"mlp.{x}_proj": (11008, 4096) for x in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}


class Planted:
    """The updates of clients 0 … number−1, made anew at every iteration."""

    def __init__(
        self, modules: Mapping[str, tuple[int, int]], rank: int, number: int, dtype: torch.dtype, block: int
    ) -> None:
        self.template = Template(modules, rank, alpha=float(rank))
        self.number = number
        self.dtype = dtype
        self.block = block  # clients made together
        self.truth = {name: self._truth(name, *shape) for name, shape in modules.items()}

    def _truth(self, name: str, m: int, n: int) -> LowRank:
        rank = self.template.rank
        u, v = (
            torch.linalg.qr(torch.randn(size, rank, generator=generator(0, name, side)))[0]
            for size, side in ((m, "u"), (n, "v"))
        )
        return LowRank(u * 0.8 ** torch.arange(rank), v.mT.contiguous())

    def __iter__(self) -> Iterator[Update]:
        for first in range(0, self.number, self.block):
            made = {name: self._block(name, first) for name in self.template.modules}
            for k in range(min(self.block, self.number - first)):
                modules: dict[str, Payload] = {n: Factors(b[k], a[k], 1.0) for n, (b, a) in made.items()}
                yield Update(f"client{first + k:07d}", 10.0 + (first + k) // 4 % 7, modules, {})

    def _block(self, name: str, first: int) -> tuple[Tensor, Tensor]:
        """B (clients, m, r) and A (clients, r, n) of a block of clients."""
        truth, rank, fours = self.truth[name], self.template.rank, min(self.block, self.number - first) // 4
        made = generator(1, name, first)
        e = self._noise(made, truth.b, fours)
        f = self._noise(made, truth.a, fours)
        sigma, tau = torch.tensor(SIGNS).repeat(fours, 1)[:, :, None, None].unbind(1)
        b = truth.b + sigma * e.repeat_interleave(4, 0)
        a = truth.a + tau * f.repeat_interleave(4, 0)
        gauge = torch.linalg.qr(torch.randn(len(b), rank, rank, generator=made))[0]
        return (b @ gauge).to(self.dtype), (gauge.mT @ a).to(self.dtype)

    def _noise(self, made: torch.Generator, like: Tensor, number: int) -> Tensor:
        size = NOISE * float(like.norm()) / math.sqrt(like.numel())
        return torch.randn((number, *like.shape), generator=made).mul_(size)


class Timed(Mapping[str, Payload]):
    """An update's modules; the time spent in reading them is added up over all threads."""

    seconds = 0.0
    bytes = 0
    lock = Lock()

    def __init__(self, inner: Mapping[str, Payload]) -> None:
        self.inner = inner

    def __getitem__(self, name: str) -> Payload:
        began = time.perf_counter()
        payload = self.inner[name]
        took = time.perf_counter() - began
        assert isinstance(payload, Factors)
        with Timed.lock:
            Timed.seconds += took
            Timed.bytes += payload.b.nbytes + payload.a.nbytes
        return payload

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __contains__(self, name: object) -> bool:
        return name in self.inner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, help="how many simulated clients, a multiple of 4")
    parser.add_argument("--size", type=int, default=1024, help="m = n of the simulated module")
    parser.add_argument("--limit-mib", type=int, default=1024, help="RLIMIT_DATA of the simulation")
    parser.add_argument("--spool", type=Path, help="folder for the updates of a 7B-shaped model")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--spool-clients", type=int, default=100)
    parser.add_argument("--rank", type=int, help="default: 8 for the simulation, 16 for the spool")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="glora,flexlora")
    parser.add_argument("--cold", action="store_true", help="ask the system to forget the files before each step")
    parser.add_argument("--keep", action="store_true", help="keep the spool")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part:
        PARTS[arguments.part.partition(":")[0]](arguments, arguments.part.partition(":")[2])
        return
    methods = arguments.methods.split(",")
    if arguments.clients:
        for method in methods:
            tell(arguments, child(arguments, f"clients:{method}"))
    if arguments.spool:
        try:
            tell(arguments, child(arguments, "write:"))
            tell(arguments, child(arguments, "read:"))
            for method in methods:
                tell(arguments, child(arguments, f"spool:{method}"))
        finally:
            if not arguments.keep:
                shutil.rmtree(arguments.spool, ignore_errors=True)


def child(arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    """One step in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def tell(arguments: argparse.Namespace, line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def peak_mib() -> float:
    """The largest resident memory that this process has had (it has no children)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def error(source: Planted, modules: Mapping[str, Mapping[str, Tensor]]) -> float:
    """‖T − U·C‖_F / ‖T‖_F over all modules, T the planted truth."""
    off = [distance(truth, LowRank(modules[name]["u"], modules[name]["c"])) for name, truth in source.truth.items()]
    return math.hypot(*off) / math.hypot(*(norm(truth) for truth in source.truth.values()))


def simulate(arguments: argparse.Namespace, name: str) -> None:
    """All passes over the simulated clients, under a limit on the memory that this process can take."""
    if arguments.clients % 4:
        raise ValueError(f"--clients {arguments.clients}: expected a multiple of 4")
    limit = arguments.limit_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    shape = (arguments.size, arguments.size)
    source = Planted({"layer": shape}, arguments.rank or 8, arguments.clients, torch.float32, 64)
    began = time.perf_counter()
    for _ in source:
        pass
    making = time.perf_counter() - began
    method = create(name)
    passes: list[int] = []

    def progress(at: Progress) -> None:
        passes.append(at.pass_num)
        if at.num_clients % 25_600 == 0:
            print(f"{name}: pass {at.pass_num + 1}, {at.num_clients} clients", file=sys.stderr, flush=True)

    began = time.perf_counter()
    with parallel.threads(arguments.threads):
        state, told = aggregate_stream(
            method, method.init(source.template, {}), source, block=source.block, on_progress=progress
        )
    seconds, number = time.perf_counter() - began, max(passes) + 1
    line = {
        "kind": "simulated_clients",
        "method": name,
        "clients": arguments.clients,
        "m_n_r": [*shape, source.template.rank],
        "seconds": round(seconds, 2),
        "passes": number,
        "seconds_making_updates": round(making * number, 2),
        "updates_per_second": round(arguments.clients * number / seconds),
        "bytes_of_updates": arguments.clients * sum(shape) * source.template.rank * 4,
        "limit_mib": arguments.limit_mib,
        "peak_mib": round(peak_mib(), 1),
        "error": error(source, state.modules),
        "truncation_error": told["truncation_error"],
    }
    print(json.dumps(line))


def planted_7b(arguments: argparse.Namespace) -> Planted:
    modules = {f"layers.{i}.{name}": shape for i in range(arguments.layers) for name, shape in LAYER_7B.items()}
    return Planted(modules, arguments.rank or 16, arguments.spool_clients, torch.float16, 4)


def write(arguments: argparse.Namespace, _: str) -> None:
    """The spool, four clients at a time."""
    source, spool = planted_7b(arguments), Spool(arguments.spool)
    need = arguments.spool_clients * sum(sum(s) for s in source.template.modules.values()) * source.template.rank * 2
    arguments.spool.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(arguments.spool).free
    if free < 2 * need:
        raise ValueError(f"{arguments.spool} has {free / 1e9:.1f} GB free: expected {2 * need / 1e9:.1f} GB")
    held = set(spool.clients())
    began = time.perf_counter()
    for update in source:
        if update.client_id not in held:
            spool.add(update)
    line = {"kind": "spool_written", "clients": len(spool), "modules": len(source.template.modules), "bytes": need}
    print(json.dumps({**line, "seconds": round(time.perf_counter() - began, 2)}))


def forget(spool: Spool) -> None:
    """Ask the system to drop what it holds of the files, so that they come from the disk."""
    for path in spool.folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(arguments: argparse.Namespace, _: str) -> None:
    """Every factor once, module by module as a server step does, and nothing else: the floor of the disk."""
    spool = Spool(arguments.spool)
    if arguments.cold:
        forget(spool)
    began = time.perf_counter()
    updates = list(spool)
    opened = time.perf_counter() - began

    def one(name: str) -> None:
        for update in updates:
            update.factors(name)

    with parallel.threads(arguments.threads):
        parallel.ordered_map(one, updates[0].modules)
    line = {"kind": "spool_read", "cold": arguments.cold, "threads": arguments.threads, "opening": round(opened, 2)}
    print(json.dumps({**line, "seconds": round(time.perf_counter() - began, 2), "peak_mib": round(peak_mib(), 1)}))


def step(arguments: argparse.Namespace, name: str) -> None:
    """One server step over the spool, each factor read once."""
    spool = Spool(arguments.spool)
    if arguments.cold:
        forget(spool)
    modules = {f"layers.{i}.{x}": shape for i in range(arguments.layers) for x, shape in LAYER_7B.items()}
    rank = arguments.rank or 16
    method = create(name)
    state = method.init(Template(modules, rank, alpha=float(rank)), {})
    began = time.perf_counter()
    with parallel.threads(arguments.threads):
        updates = [replace(update, modules=Timed(update.modules)) for update in spool]
        state, told = aggregate(method, state, updates)
    seconds, peak = time.perf_counter() - began, peak_mib()
    line = {
        "kind": "spool_step",
        "method": name,
        "clients": len(updates),
        "modules": len(modules),
        "rank": rank,
        "cold": arguments.cold,
        "threads": arguments.threads,
        "seconds": round(seconds, 2),
        "thread_seconds_reading": round(Timed.seconds, 2),
        "bytes_read": Timed.bytes,
        "peak_mib": round(peak, 1),
        "error": error(planted_7b(arguments), state.modules),
        "truncation_error": told["truncation_error"],
    }
    print(json.dumps(line))


PARTS = {"clients": simulate, "write": write, "read": read, "spool": step}

if __name__ == "__main__":
    main()
