"""Check and time a GPU, in parts that append JSON lines to one file as they go.

    python benchmarks/gpu/measure.py --out FILE.jsonl [--part passes] [--device cuda]

A line that the file holds already is not measured again, so that an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import io
import json
import os
import pstats
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import minilm
import parity
import torch
import torch.nn.functional as F

from fedspan.algebra import lowrank
from fedspan.algebra.lowrank import LowRank
from fedspan.client import calibration, cohort, grouping
from fedspan.client.training import Assignment, TrainingSettings
from fedspan.config import from_mapping
from fedspan.data import Encoded
from fedspan.methods import METHODS, stacked
from fedspan.methods.base import ServerState, aggregate
from fedspan.methods.messages import Factors, Template, Update
from fedspan.models import FederatedModel, attention_kernel
from fedspan.models.counted_dropout import CountedDropout, mask, masked, step_seeds
from fedspan.runs import checkpoint
from fedspan.runs.events import Event
from fedspan.runs.execution import resume, run


class Lines:
    """A file of JSON lines, one for each thing that was measured, by the line's `part` and `case`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = {(line["part"], line["case"]) for line in self._read()}

    def _read(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            yield json.loads(line)

    def measure(self, part: str, case: str, function: Callable[[], Mapping[str, Any]]) -> None:
        """Append the figures that the function returns, unless they are there; an error is a line too."""
        if (part, case) in self.done:
            return
        began = time.perf_counter()
        try:
            figures = dict(function())
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
        line = {"part": part, "case": case, **figures, "wall_seconds": round(time.perf_counter() - began, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps({k: v for k, v in line.items() if k not in ("kernels", "python")}), flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
    import transformers

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {"gpu": gpu, "torch": torch.__version__, "transformers": transformers.__version__}


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> dict[str, Any]:
    """Return the median, smallest and largest seconds of a call, after two that warm up, and the first's."""
    times = []
    for _ in range(2 + repeats):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - began)
    kept = times[2:]
    return {"seconds": statistics.median(kept), "least": min(kept), "most": max(kept), "first": times[0]}


def kernel(device: torch.device) -> dict[str, Any]:
    """Compare the dropout kernel with its definition, bit by bit."""
    seeds = torch.tensor([step_seeds(k, 3)[2] for k in range(4)], device=device)
    numbers = torch.randint(0, 16, (64,), device=device)
    equal = {}
    for shape in ((64, 384), (64, 40, 1536), (64, 12, 40, 40)):
        x = torch.randn(shape, device=device)
        equal[str(shape)] = all(
            torch.equal(masked(x, seeds, numbers, call, 0.1), x * mask(x, seeds, numbers, call, 0.1))
            for call in (1, 20)
        )
    return {"equal": equal}


class Passes:
    """Client-steps a second of a base of MiniLM's shape: a plain PEFT loop beside every way of sharing a pass."""

    def __init__(self, device: torch.device, folder: Path, most: int = 100) -> None:
        self.device = device
        self.base = minilm.write_base(folder / "minilm")
        self.data: Encoded = minilm.sentences(self.base, most * minilm.ROWS_EACH)
        self.model: FederatedModel = minilm.load(self.base, device)
        self.clients: list[Assignment] = minilm.clients(self.model, most)

    @classmethod
    @functools.cache
    def once(cls, device: torch.device, folder: Path) -> Passes:
        """Return the one that both the times and the profiles are taken with."""
        return cls(device, folder)

    def plain(self, num_clients: int = 2) -> dict[str, Any]:
        """Time the plain loop."""
        loop = minilm.PlainLoop(self.base, self.device, list(self.model.modules()))
        work = [(a.broadcast.adapter, minilm.batches_of(self.data, a)) for a in self.clients[:num_clients]]

        def train() -> list[float]:
            return [loop.train(adapter, chosen) for adapter, chosen in work]

        return self._figures(seconds(self.device, train, 3), num_clients) | {"losses": train()[:2]}

    def shared(self, num_clients: int, chosen: TrainingSettings, repeats: int = 5) -> dict[str, Any]:
        """Time a round of clients as the settings divide it."""
        work = self.clients[:num_clients]
        groups = grouping.plan(self.model, self.data, work, chosen)
        rounds = iter(range(1, 10_000))

        def train(round_num: int | None = None) -> list[float]:
            number = next(rounds) if round_num is None else round_num
            found = {}
            for group in groups:
                results = cohort.work(self.model, self.data, [work[i] for i in group], chosen, number)
                found |= {i: r.train_loss for i, r in zip(group, results, strict=True)}
            return [found[i] for i in range(len(work))]

        torch.cuda.reset_peak_memory_stats(self.device)
        figures = self._figures(seconds(self.device, train, repeats), num_clients)
        figures |= {"groups": [len(group) for group in groups][:8], "num_groups": len(groups)}
        figures |= {"peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30}
        return figures | {"losses": train(0)[:2]}

    def _figures(self, times: dict[str, Any], num_clients: int) -> dict[str, Any]:
        client_steps = num_clients * minilm.STEPS
        return times | {"client_steps_per_second": client_steps / times["seconds"]}

    def calibration(self) -> dict[str, Any]:
        """Choose a width, and say what every width was measured at."""
        chosen, rates = minilm.settings("auto"), {}
        most = grouping.most_that_fit(self.model, self.data, self.clients, chosen)

        def rate(width: int) -> float:
            rates[width] = calibration._client_steps_per_second(self.model, self.data, self.clients[:width], chosen)
            return rates[width]

        return {"width": calibration.best_width(rate, most), "most": most, "rates": rates}

    def profile(self, num_clients: int, chosen: TrainingSettings, top: int = 25) -> dict[str, Any]:
        """Return where the time of one pass of a group goes, kernel by kernel."""
        from torch.profiler import ProfilerActivity, profile

        group = self.clients[:num_clients]
        for number in range(3):
            cohort.work(self.model, self.data, group, chosen, number)
        synchronise(self.device)
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            cohort.work(self.model, self.data, group, chosen, 0)
            synchronise(self.device)
        wall = time.perf_counter() - began
        kernels = [e for e in seen.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels.sort(key=lambda e: -e.self_device_time_total)
        listed = [[e.key[:90], e.count, round(e.self_device_time_total / 1e3, 3)] for e in kernels[:top]]
        steps = minilm.STEPS
        interpreter = cProfile.Profile()
        interpreter.runcall(cohort.work, self.model, self.data, group, chosen, 0)
        text = io.StringIO()
        pstats.Stats(interpreter, stream=text).sort_stats("tottime").print_stats(14)
        return {
            "python": [line[-90:] for line in text.getvalue().splitlines()[7:] if line.strip()],
            "wall_profiled": wall,
            "kernels_per_step": sum(e.count for e in kernels) / steps,
            "kernel_ms_per_step": sum(e.self_device_time_total for e in kernels) / 1e3 / steps,
            "kernels": listed,
        }


def passes(lines: Lines, device: torch.device, folder: Path) -> None:
    """Measure the passes."""
    suite = Passes.once(device, folder)
    lines.measure("passes", "plain PEFT loop", suite.plain)
    lines.measure("passes", "sequential, 2 clients", lambda: suite.shared(2, minilm.settings("sequential"), 3))
    for precision in ("float32", "auto"):
        for size in (1, 10):
            chosen = minilm.settings("cohort", cohort_size=size, precision=precision)
            lines.measure("passes", f"cohort of {size}, {precision}", lambda c=chosen, n=size: suite.shared(n, c))
    lines.measure("passes", "calibration of 100 clients", suite.calibration)
    for size in (16, 34, 100):
        chosen = minilm.settings("cohort", cohort_size=size)
        lines.measure("passes", f"100 clients in cohorts of {size}, auto", lambda c=chosen: suite.shared(100, c, 3))
    chosen = minilm.settings("cohort", cohort_size=34)
    with mock.patch.object(attention_kernel, "usable", return_value=False):
        suite.model.passes.clear()
        case = "100 clients in cohorts of 34, auto, attention in ordinary operations"
        lines.measure("passes", case, lambda c=chosen: suite.shared(100, c, 3))
        suite.model.passes.clear()
    for count in (10, 100):
        lines.measure("passes", f"auto, {count} clients", lambda n=count: suite.shared(n, minilm.settings("auto"), 3))


def profiles(lines: Lines, device: torch.device, folder: Path) -> None:
    """Profile recorded passes."""
    suite = Passes.once(device, folder)
    for size in (10, 34):
        chosen = minilm.settings("cohort", cohort_size=size)
        lines.measure("profile", f"cohort of {size}, auto", lambda c=chosen, n=size: suite.profile(n, c))


def parities(lines: Lines, device: torch.device, folder: Path) -> None:
    """Compare every method's results with those on the CPU, several methods at once."""
    missing = [case for case in parity.CASES if ("parity", f"{case}, auto") not in lines.done]
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for case, found in zip(missing, pool.map(parity.both, missing), strict=True):
            for arm, figures in found.items():
                lines.measure("parity", f"{case}, {arm}", lambda f=figures: f)


class _Stop(Exception):
    pass


def whole_run(device: torch.device, folder: Path) -> dict[str, Any]:
    """Time whole runs of ten clients, and compare one that is interrupted and resumed with one that is not."""
    folder.mkdir(parents=True, exist_ok=True)
    base = minilm.write_base(folder / "base")
    rng = random.Random(0)
    rows = [{"text": " ".join(f"w{rng.randrange(4, 400)}" for _ in range(rng.randrange(3, 30)))} for _ in range(3000)]
    lines = [json.dumps(row | {"label": "ab"[len(row["text"]) % 2]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = from_mapping(
        {
            "device": str(device),
            "model": {"name": str(base)},
            "data": {"task": "files", "train": [str(folder / "rows.jsonl")], "holdout": 0.2},
            "federation": {"num_clients": 10, "rounds": 5, "participation": 1.0, "ranks": 8, "partition": "iid"},
            "local": {"steps": 10, "batch_size": 16},
            "evaluation": {"local": False, "diagnostics": False},
            "engine": {"workers": 1},
        }
    )
    ends: list[float] = []

    def note(event: Event) -> None:
        if event.kind in ("start", "phase", "round"):
            ends.append(time.perf_counter())

    def stop(event: Event) -> None:
        if event.kind == "round" and event.data["record"]["round_num"] == 2:
            raise _Stop

    began = time.perf_counter()
    whole = run(config, folder / "whole", note)
    with contextlib.suppress(_Stop):
        run(config, folder / "parts", stop)
    parts = resume(folder / "parts")
    adapters = [(x.adapter / "adapter_model.safetensors").read_bytes() for x in (whole, parts) if x.adapter]
    return {
        "start_seconds": ends[0] - began,
        "round_seconds": [round(b - a, 3) for a, b in pairwise(ends)],
        "client_seconds": [round(r["client_seconds"], 3) for r in whole.history],
        "server_seconds": [round(r["server_seconds"], 3) for r in whole.history],
        "notes": checkpoint.read(folder / "whole" / "checkpoint" / "federation.safetensors").notes,
        "resumed_has_the_same_bits": adapters[0] == adapters[1],
        "train_loss": [r["train_loss"] for r in whole.history],
    }


def runs(lines: Lines, device: torch.device, folder: Path) -> None:
    """Measure whole runs."""
    lines.measure("run", "ten clients of MiniLM's shape", lambda: whole_run(device, folder / "run"))


def attention(device: torch.device) -> dict[str, Any]:
    """Compare the attention kernel with ordinary operations: relative distances of the output and the gradients."""
    seeds = torch.tensor([step_seeds(k, 3)[2] for k in range(4)], device=device)
    distances = {}
    torch.set_float32_matmul_precision("high")  # in float32 the kernel is not used
    for t in (16, 40):
        wide = torch.randn(3, 16, t, 12, 32, device=device)
        seen = (torch.arange(t) < torch.randint(1, t + 1, (16, 1)))[:, None, None].to(device)
        found = []
        for fused in (True, False):
            q, k, v = (x.transpose(1, 2).detach().requires_grad_(True) for x in wide)
            with CountedDropout(seeds), contextlib.ExitStack() as stack:
                if not fused:
                    stack.enter_context(mock.patch.object(attention_kernel, "usable", return_value=False))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.expand(16, 1, t, t), dropout_p=0.1)
            found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        distances[str(t)] = [float((x - y).norm() / y.norm()) for x, y in zip(*found, strict=True)]
    torch.set_float32_matmul_precision("highest")
    return {"distances": distances}


SEVEN_B = {
    **{f"layer{i}.{name}": (4096, 4096) for i in range(32) for name in "qkvo"},
    **{f"layer{i}.{name}": (11008, 4096) for i in range(32) for name in ("gate", "up")},
    **{f"layer{i}.down": (4096, 11008) for i in range(32)},
}
"""The 224 linear layers of a model of 7B."""


def server_step(
    device: torch.device, name: str, num_clients: int, rank: int = 16, together: bool = True
) -> dict[str, Any]:
    """Time a server's step over the factors of all clients, which are on the device, and reading them once.

    Parameters
    ----------
    together
        False: many clients' layers one at a time, as on a CPU; the line has how far the two results are apart.
    """
    random_numbers = torch.Generator(device).manual_seed(0)

    def factors(m: int, n: int) -> Factors:
        b = torch.randn((m, rank), device=device, generator=random_numbers)
        return Factors(b, torch.randn((rank, n), device=device, generator=random_numbers), 1.0)

    method = METHODS[name]()
    state = method.init(Template(SEVEN_B, rank), {})
    updates = [
        Update(f"client-{i:04d}", 1.0, {layer: factors(*shape) for layer, shape in SEVEN_B.items()}, {})
        for i in range(num_clients)
    ]
    tensors = [t for update in updates for f in update.modules.values() for t in f.tensors().values()]
    apart: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if not together:
            expected, _ = aggregate(method, state, updates)
            stack.enter_context(mock.patch.object(stacked, "applies", return_value=False))
            found, _ = aggregate(method, state, updates)
            apart = {"largest_distance": max(_distance(found, expected, layer) for layer in list(SEVEN_B)[:7])}
        whole = seconds(device, lambda: aggregate(method, state, updates), 3)
    reading = seconds(device, lambda: torch._foreach_norm(tensors), 3)["seconds"]
    return whole | apart | {"reading_seconds": reading, "bytes": sum(t.numel() for t in tensors) * 4}


def _distance(x: ServerState, y: ServerState, layer: str) -> float:
    """Return the relative distance of one layer's products U·C."""
    one, other = (LowRank(state.modules[layer]["u"], state.modules[layer]["c"]) for state in (x, y))
    return lowrank.distance(one, other) / lowrank.norm(other)


def servers(lines: Lines, device: torch.device, folder: Path) -> None:
    """Measure server steps over all layers of a model of 7B: few clients, whose layers share calls, and many."""
    for name in ("glora", "flexlora", "fedit"):
        for count in (3, 10, 100):
            case = f"{name}, 224 layers, {count} clients"
            lines.measure("server", case, lambda n=name, k=count: server_step(device, n, k))
    for name in ("glora", "flexlora"):
        case = f"{name}, 224 layers, 100 clients, a layer at a time"
        lines.measure("server", case, lambda n=name: server_step(device, n, 100, together=False))


PARTS = {"server": servers, "passes": passes, "run": runs, "parity": parities, "profile": profiles}


def main() -> None:
    """Measure the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case", action="append", help="of the parity part; all of them unless given")
    options = parser.parse_args()
    if options.case:
        parity.CASES = {name: parity.CASES[name] for name in options.case}
    device, lines = torch.device(options.device), Lines(options.out)
    lines.measure("machine", str(device), lambda: machine(device))
    if device.type == "cuda":
        lines.measure("kernels", "dropout", lambda: kernel(device))
        lines.measure("kernels", "attention", lambda: attention(device))
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if options.part is None or name in options.part:
                part(lines, device, Path(folder))


if __name__ == "__main__":
    main()
