"""One run in one process, in 2 and 4 worker processes, and in 2 and 4 processes of torchrun: CPU seconds and bytes.

    python benchmarks/speed/ranks.py [--rounds 1 6] [--arms one workers2 …] [--set KEY=VALUE …] >> ranks.jsonl

One JSON line per arm. Every arm is run at two numbers of rounds, so that the difference is the cost of a round without
that of starting (each process imports torch, which takes seconds): CPU seconds of all processes of the command, which
other work on the machine disturbs less than wall seconds, and both are given. The adapters of all arms must have the
same bits: their digest is in the line. `bytes` counts what one other process is sent and sends back; `overhead`
measures what messages, waiting and torchrun's agent cost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_FIXED = ("evaluation.base=false", "evaluation.local=false", "evaluation.every=1000", "federation.participation=1.0")


def _command(arm: str, folder: str, settings: list[str]) -> list[str]:
    options = [part for setting in settings for part in ("--set", setting)]
    run = ["-m", "fedspan", "run", "--out", folder, *options]
    if arm.startswith("ranks"):
        return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", arm.removeprefix("ranks"), *run]
    return [sys.executable, *run, "--set", f"engine.workers={arm.removeprefix('workers') if arm != 'one' else 1}"]


def _used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def _measured(arm: str, rounds: int, settings: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        began, used = time.perf_counter(), _used()
        command = _command(arm, out, [*_FIXED, *settings, f"federation.rounds={rounds}"])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        adapter = Path(out, "adapter", "adapter_model.safetensors").read_bytes()
        return {
            "rounds": rounds,
            "cpu_seconds": round(_used() - used, 2),
            "wall_seconds": round(time.perf_counter() - began, 2),
            "adapter": hashlib.sha256(adapter).hexdigest()[:16],
        }


class _Counting:
    """A channel that counts the bytes that pass."""

    def __init__(self, channel: Any) -> None:
        self.channel, self.sent, self.received = channel, 0, 0

    def send_bytes(self, buf: Any, /) -> None:
        self.sent += len(buf)
        self.channel.send_bytes(buf)

    def recv_bytes(self) -> bytes:
        data: bytes = self.channel.recv_bytes()
        self.received += len(data)
        return data

    def recv_bytes_into(self, buf: Any, /) -> int:
        size: int = self.channel.recv_bytes_into(buf)
        self.received += size
        return size


def _bytes(rounds: int, settings: list[str]) -> dict[str, Any]:
    """Return the bytes between process 0 and one other, which is forked here and reached through a pipe."""
    from fedspan.client.processes import answer_messages
    from fedspan.config import load
    from fedspan.distributed.dealer import Dealer
    from fedspan.distributed.environment import Place
    from fedspan.runs.distributed import DistributedProvision, FollowerWork
    from fedspan.runs.execution import run

    near, far = multiprocessing.get_context("fork").Pipe()
    channel = _Counting(near)

    class Leader:
        place = Place(0, 2)

        def open(self) -> Dealer:
            given = (far, FollowerWork(Place(1, 2, 1)))
            other = multiprocessing.get_context("fork").Process(target=answer_messages, args=given, daemon=True)
            other.start()
            return Dealer({1: channel}, lambda rank, how: RuntimeError(how))

        def watch(self, hosts: Any) -> None:
            self.start = channel.sent, channel.received

    leader: Any = Leader()
    config = load(None, [*_FIXED, *settings, f"federation.rounds={rounds}", "engine.workers=1"])
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder, "run"), provision=DistributedProvision(leader))
        totals = result.summary["totals"]
    sent, received = leader.start
    return {
        "rounds": rounds,
        "setup_sent": sent,
        "setup_received": received,
        "sent": channel.sent - sent,
        "received": channel.received - received,
        "all_clients_down": totals["bytes_down"],
        "all_clients_up": totals["bytes_up"],
    }


def _talk(rank: int, port: int, results: Any) -> None:
    """Send a message of 0.53 MB to and fro with 0.43 MB, then wait for one more."""
    import torch
    import torch.distributed as dist

    from fedspan.distributed.channel import RankChannel
    from fedspan.wire import packing

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    channel: Any = RankChannel(1 - rank)
    for count in (5, 200):  # the first ones warm up
        used = time.process_time()
        for _ in range(count):
            if rank == 0:
                packing.send(channel, {}, [torch.zeros(132_000)])
            packing.receive(channel)
            if rank == 1:
                packing.send(channel, {}, [torch.zeros(108_000)])
    exchanged = (time.process_time() - used) / 200
    used, began = time.process_time(), time.perf_counter()
    if rank == 0:
        time.sleep(10)
        packing.send(channel, {}, [])
    else:
        packing.receive(channel)
    results.put((rank, exchanged, (time.process_time() - used) / (time.perf_counter() - began)))


def _overhead() -> dict[str, Any]:
    """Return what processes cost beside their work: messages, waiting for one, and torchrun's agent."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    pair = [context.Process(target=_talk, args=(rank, 29871, results)) for rank in (0, 1)]
    for process in pair:
        process.start()
    found = sorted(results.get() for _ in pair)
    agents = []
    for seconds in (2, 42):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--no-python"]
        used, began = _used(), time.perf_counter()
        subprocess.run([*command, "sleep", str(seconds)], check=True, capture_output=True)
        agents.append((_used() - used, time.perf_counter() - began))
    (short, short_wall), (long, long_wall) = agents
    return {
        "cpu_seconds_a_message_and_answer": round(sum(exchanged for _, exchanged, _ in found), 5),
        "cpu_seconds_in_a_second_of_waiting": round(found[1][2], 5),
        "cpu_seconds_of_the_agent_in_a_second": round((long - short) / (long_wall - short_wall), 5),
    }


def main() -> None:
    """Measure the arms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, nargs=2, default=[1, 6])
    parser.add_argument(
        "--arms", nargs="+", default=["one", "workers2", "ranks2", "workers4", "ranks4", "bytes", "overhead"]
    )
    parser.add_argument("--set", nargs="*", default=[])
    given = parser.parse_args()
    for arm in given.arms:
        line: dict[str, Any] = {"arm": arm, "settings": given.set}
        if arm == "bytes":
            line |= _bytes(given.rounds[1], given.set)
        elif arm == "overhead":
            line |= _overhead()
        else:
            short, long = (_measured(arm, rounds, given.set) for rounds in given.rounds)
            between = long["rounds"] - short["rounds"]
            line |= {"short": short, "long": long}
            for name in ("cpu_seconds", "wall_seconds"):
                line[f"{name}_a_round"] = round((long[name] - short[name]) / between, 3)
        line |= {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
