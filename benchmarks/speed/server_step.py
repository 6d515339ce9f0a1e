"""CPU seconds of one server step over K clients' factors of one d×d layer, beside its floors, as JSON lines.

    python benchmarks/speed/server_step.py > server_step.jsonl
    python benchmarks/speed/server_step.py --before OLD/src >> server_step.jsonl     # another version, turn by turn

Floors: `square`, the operations of a range finder with one power iteration at the rate of square products, which is
the floor of `fedspan bench server`; `products`, the same four passes over the factors, as products with 24 columns;
`read`, every factor once (a sum over them); `core_svd`, the bare SVD of T by thin QRs of the stacked factors and their
core (up to 100 clients). The versions take turns, one process for each case, so that a disturbance affects both; CPU
time, because a machine is rarely idle. One thread. With --modules L a step is over L layers, which shows what layers
of one shape share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = ((1024, 3), (1024, 10), (1024, 100), (4096, 3), (4096, 10), (4096, 100))
METHODS = ("glora", "flexlora", "fedit", "flora", "fedex_lora", "lora_fair", "lora_fair_ridge", "flora_na")
RANK = 16


def cpu_seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    """Return the CPU seconds of every call after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return times


def arms(d: int, k: int, names: list[str], modules: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed, with whichever version of the library is imported."""
    import torch

    from fedspan.algebra import lowrank
    from fedspan.bench.server_suite import OVERSAMPLING, draw_factors
    from fedspan.methods import METHODS as KNOWN
    from fedspan.methods.base import aggregate
    from fedspan.methods.messages import Request, Template, Update

    torch.set_num_threads(1)
    factors = draw_factors(d, RANK, k, torch.device("cpu"))
    layers = [f"layer{i}" for i in range(modules)]
    pairs = [f.delta() for f in factors]
    columns, square = torch.randn(d, RANK + OVERSAMPLING), torch.ones(512, 512)

    def four_passes() -> None:
        for f in factors * modules * 2:
            columns.addmm(f.b, f.a @ columns)
            columns.addmm(f.a.mT, f.b.mT @ columns)

    def square_products() -> None:
        operations = 4 * 2.0 * 2 * d * k * RANK * (RANK + OVERSAMPLING) * modules
        for _ in range(round(operations / (2 * len(square) ** 3))):
            square @ square

    found: dict[str, Callable[[], Any]] = {
        "square": square_products,
        "products": four_passes,
        "read": lambda: [(float(f.b.sum()), float(f.a.sum())) for f in factors for _ in layers],
    }
    if k <= 100:
        found["core_svd"] = lambda: [lowrank.svd(lowrank.stack(pairs, [1 / k] * k)) for _ in layers]
    for name in names:
        method = KNOWN[name]()
        state = method.init(Template(dict.fromkeys(layers, (d, d)), RANK, alpha=16.0), {})
        sent = method.start(method.broadcast(state, Request(RANK)), None)
        updates = [Update(f"client-{i:04d}", 1.0, dict.fromkeys(layers, f), {}) for i, f in enumerate(factors)]
        updates = [method.encode(update, sent, None)[0] for update in updates]
        found[name] = lambda method=method, state=state, updates=updates: aggregate(method, state, updates)
    return found


def one(options: argparse.Namespace) -> None:
    """Time one case with one version: what a child process does."""
    d, k = options.case
    for name, work in arms(d, k, options.methods, options.modules).items():
        if name not in options.methods and options.label != "now":
            continue
        times = cpu_seconds(work, options.repeats)
        line = {"version": options.label, "d": d, "K": k, "r": RANK, "modules": options.modules, "arm": name}
        print(json.dumps(line | {"cpu_seconds": min(times), "most": max(times)}), flush=True)


def main() -> None:
    """Time every case in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the src folder of another version, timed beside this one")
    parser.add_argument("--case", type=int, nargs=2, metavar=("D", "K"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--modules", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--label", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.label:
        one(options)
        return
    versions = {"now": Path(__file__).resolve().parents[2] / "src"}
    if options.before:
        versions["before"] = options.before
    for d, k in [options.case] if options.case else CASES:
        for label, source in versions.items():
            rest = ["--methods", *options.methods, "--modules", str(options.modules), "--repeats", str(options.repeats)]
            command = [sys.executable, __file__, "--label", label, "--case", str(d), str(k), *rest]
            environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
